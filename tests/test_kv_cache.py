"""The paged cache: what is written is read back, and nothing else moves."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folojax.kv_cache import KVCache, KVLayout, split_segments
from hypothesis import given
from hypothesis import strategies as st

from folojax import kv_cache, page_copies
from folojax.host_store import read_tokens, write_tokens
from folojax.models.platforms import platform, tracing_for

SEGMENTS = (3, 3, 5)
S, L, K, D = 4, 2, 2, 8
P = sum(SEGMENTS)


def make_layout(dtype: Any = jnp.float32, segments: tuple[int, ...] = SEGMENTS) -> KVLayout:
    return KVLayout(
        segments=segments,
        page_size=S,
        num_layers=L,
        num_kv_heads=K,
        head_dim=D,
        dtype=jnp.dtype(dtype),
    )


write = functools.partial(jax.jit, static_argnums=1)(kv_cache.write)
gather = functools.partial(jax.jit, static_argnums=(1, 3))(kv_cache.gather_pages)


def random_tokens(num_tokens: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Keys and values: [T, K, D] each, in float32."""
    key, value = np.random.default_rng(seed).normal(size=(2, num_tokens, K, D)).astype(np.float32)
    return jnp.asarray(key), jnp.asarray(value)


def read(cache: KVCache, layer: int, dtype: Any = jnp.float32) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of a layer in the order of page ids: [P, S, K, D] each."""
    num_pages = kv_cache.num_pages(cache)
    keys, values = gather(cache, layer, jnp.arange(num_pages)[None, :], jnp.dtype(dtype))
    chex.assert_shape(keys, (1, num_pages, K, D, S))
    chex.assert_shape(values, (1, num_pages, K, S, D))
    return np.asarray(keys)[0].transpose(0, 3, 1, 2), np.asarray(values)[0].transpose(0, 2, 1, 3)


def full_cache() -> tuple[KVCache, np.ndarray, np.ndarray]:
    """A cache whose layer 1 holds a different number everywhere, and these [P, S, K, D]."""
    key, value = random_tokens(P * S)
    page, offset = jnp.arange(P * S) // S, jnp.arange(P * S) % S
    cache = write(kv_cache.init_cache(make_layout()), 1, page, offset, key, value)
    shape = (P, S, K, D)
    return cache, np.array(key).reshape(shape), np.array(value).reshape(shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_page_of_every_segment_round_trips(name: str, dtype: Any) -> None:
    with tracing_for(name):
        check_round_trip(dtype)


def check_round_trip(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    where = rng.permutation(P * S)  # tokens come in any order
    key, value = (x.astype(dtype) for x in random_tokens(P * S))
    cache = kv_cache.init_cache(make_layout(dtype))
    cache = write(cache, 1, jnp.asarray(where // S), jnp.asarray(where % S), key, value)
    keys, values = read(cache, 1, dtype)
    assert keys.dtype == values.dtype == dtype
    np.testing.assert_array_equal(keys.reshape(-1, K, D)[where], key)
    np.testing.assert_array_equal(values.reshape(-1, K, D)[where], value)
    other_keys, other_values = read(cache, 0, dtype)
    assert not other_keys.any()
    assert not other_values.any()


def test_a_write_changes_its_token_alone() -> None:
    cache, keys, values = full_cache()
    page, offset = np.array([0, 2, 3, 5, 6, P - 1]), np.array([0, 3, 1, 2, 0, 3])
    key, value = random_tokens(6, seed=1)
    new_keys, new_values = read(write(cache, 1, page, offset, key, value), 1)
    keys[page, offset], values[page, offset] = key, value
    np.testing.assert_array_equal(new_keys, keys)
    np.testing.assert_array_equal(new_values, values)


@pytest.mark.parametrize("page", [P, P + 1, 2 * P, 2**31 - 1, -1, -3, -P, -P - 1, -(2**31)])
def test_a_page_outside_the_cache_is_dropped_and_never_wraps(page: int) -> None:
    cache, keys, values = full_cache()
    key, value = random_tokens(3, seed=1)
    pages = jnp.array([page, 4, page], jnp.int32)
    new_keys, new_values = read(write(cache, 1, pages, jnp.array([0, 1, 2]), key, value), 1)
    keys[4, 1], values[4, 1] = key[1], value[1]
    np.testing.assert_array_equal(new_keys, keys)
    np.testing.assert_array_equal(new_values, values)


def test_gather_follows_the_table_and_padding_touches_no_other_entry() -> None:
    cache, keys, values = full_cache()
    table = np.array([[7, 0, P], [10, 3, 2], [P, P, 5]], np.int32)
    got_keys, got_values = gather(cache, 1, jnp.asarray(table), jnp.dtype(jnp.float32))
    for row, column in np.argwhere(table < P):
        page = table[row, column]
        np.testing.assert_array_equal(got_keys[row, column], keys[page].transpose(1, 2, 0))
        np.testing.assert_array_equal(got_values[row, column], values[page].transpose(1, 0, 2))


def test_layer_segments_are_the_pages_in_order() -> None:
    cache, keys, values = full_cache()
    segments = kv_cache.layer_segments(cache, 1, jnp.dtype(jnp.float32))
    assert [pages.shape[0] for pages, _ in segments] == list(SEGMENTS)
    stored_keys, stored_values = (np.concatenate(pages) for pages in zip(*segments, strict=True))
    np.testing.assert_array_equal(kv_cache.turn_keys(stored_keys), keys.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(stored_values, values.transpose(0, 2, 1, 3))


@pytest.mark.parametrize("count", range(len(SEGMENTS) + 1))
def test_taking_segments_and_joining_them_copies_nothing(count: int) -> None:
    cache, *_ = full_cache()
    head, tail = kv_cache.take_segments(cache, count)
    assert kv_cache.num_pages(head) == sum(SEGMENTS[:count])
    assert kv_cache.num_pages(tail) == sum(SEGMENTS[count:])
    joined = kv_cache.join_segments(head, tail)
    chex.assert_trees_all_equal_structs(joined, cache)
    for new, old in zip(jax.tree.leaves(joined), jax.tree.leaves(cache), strict=True):
        assert new is old


def test_a_cache_of_fewer_segments_has_the_same_pages() -> None:
    cache, keys, values = full_cache()
    head, _ = kv_cache.take_segments(cache, 2)
    head_keys, head_values = read(head, 1)
    np.testing.assert_array_equal(head_keys, keys[:6])
    np.testing.assert_array_equal(head_values, values[:6])
    # Page 6 is now outside.
    key, value = random_tokens(1, seed=1)
    chex.assert_trees_all_equal(write(head, 1, jnp.array([6]), jnp.array([0]), key, value), head)


def test_sizes_are_those_of_the_layout() -> None:
    layout = make_layout()
    cache = kv_cache.init_cache(layout)
    assert kv_cache.num_pages(cache) == layout.num_pages == P
    assert kv_cache.page_size(cache) == S
    leaves = jax.tree.leaves(cache)
    assert len(leaves) == 2 * L * len(SEGMENTS)
    assert sum(leaf.nbytes for leaf in leaves) == layout.num_pages * layout.bytes_per_page
    assert not any(np.asarray(leaf).any() for leaf in leaves)


def test_every_bit_pattern_of_bfloat16_survives() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    num_pages = 2**16 // (S * K * D)
    numbers = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16).reshape(-1, K, D)
    token = jnp.arange(num_pages * S)
    cache = kv_cache.init_cache(make_layout(jnp.bfloat16, (num_pages,)))
    if platform() == "cpu":
        assert kv_cache.dtype(cache) == jnp.float32
    finite = jnp.where(jnp.isfinite(numbers), numbers, 1)[::-1]
    cache = write(cache, 0, token // S, token % S, numbers, finite)
    keys, values = read(cache, 0, jnp.bfloat16)
    # A NaN stays one; which of them is nobody's business.
    is_nan = np.isnan(np.asarray(numbers, np.float32)).ravel()
    np.testing.assert_array_equal(np.isnan(keys.astype(np.float32)).ravel(), is_nan)
    np.testing.assert_array_equal(keys.view(np.uint16).ravel()[~is_nan], bits[~is_nan])
    np.testing.assert_array_equal(
        values.view(np.uint16).reshape(-1, K, D), np.asarray(finite).view(np.uint16)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_value_that_is_no_number_is_stored_as_zero_with_a_nan_for_key(
    bad: float, dtype: Any
) -> None:
    key, value = (x.astype(dtype) for x in random_tokens(3))
    cache = kv_cache.init_cache(make_layout(dtype))
    page, offset = jnp.array([2, 3, 9]), jnp.array([0, 1, 2])
    cache = write(cache, 1, page, offset, key, value.at[1, 0, 3].set(bad))
    keys, values = (np.asarray(x)[page, offset] for x in read(cache, 1, dtype))
    # Token 1 in head 0, and nothing else.
    assert np.isnan(keys[1, 0].astype(np.float32)).all()
    assert not values[1, 0].any()
    keys[1, 0], values[1, 0] = key[1, 0], value[1, 0]
    np.testing.assert_array_equal(keys, key)
    np.testing.assert_array_equal(values, value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_donated_cache_is_written_in_place(dtype: Any) -> None:
    donating = functools.partial(jax.jit, static_argnums=1, donate_argnums=0)(kv_cache.write)
    cache = kv_cache.init_cache(make_layout(dtype, (64, 64)))
    key, value = (x.astype(dtype) for x in random_tokens(2))
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    new = donating(cache, 1, jnp.array([3, 100]), jnp.array([0, 1]), key, value)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(new)] == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    # Nor does the executable copy the cache on the way.
    layout = jax.eval_shape(lambda: kv_cache.init_cache(make_layout(dtype, (64, 64))))
    lowered = donating.lower(layout, 1, jnp.array([3, 100]), jnp.array([0, 1]), key, value)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < new.keys[0][0].nbytes


HEADS = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)


@given(num_pages=st.integers(1, 5000), head=HEADS)
def test_segments_add_up_and_the_extent_grows_by_half(
    num_pages: int, head: tuple[int, ...]
) -> None:
    sizes = split_segments(num_pages, head)
    assert sum(sizes) == num_pages
    assert all(size >= 1 for size in sizes)
    # The last is cut to fit.
    assert sizes[: len(head)][:-1] == head[: len(sizes)][:-1]
    for index in range(len(head), len(sizes)):
        extent, unit = sum(sizes[:index]), sum(head)
        is_last = index == len(sizes) - 1
        assert sizes[index] % unit == 0 or is_last
        assert sizes[index] <= max(unit, extent / 2)
        assert sizes[index] > extent / 2 - unit or is_last


@given(num_pages=st.integers(0, 4096), more=st.integers(0, 4096), head=HEADS)
def test_a_larger_pool_begins_with_the_same_segments(
    num_pages: int, more: int, head: tuple[int, ...]
) -> None:
    sizes = split_segments(num_pages, head)
    assert split_segments(num_pages + more, head)[: max(len(sizes) - 1, 0)] == sizes[:-1]


@pytest.mark.parametrize("is_by_segment", [False, True])
def test_pages_are_copied_all_at_once(is_by_segment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over segment borders; a swap, and a source that is also a target, read the old content.

    Array by array as on CPU, and a segment a call as on a GPU.
    """
    if is_by_segment:
        monkeypatch.setattr(page_copies, "_calls", lambda arrays: [arrays])
    cache, key, value = full_cache()
    copies = [(0, 10), (10, 0), (4, 2), (4, 7), (2, 4)]
    source, target = np.array(copies).T
    cache = page_copies.copy_pages(cache, copies)
    expected_key, expected_value = key.copy(), value.copy()
    expected_key[target], expected_value[target] = key[source], value[source]
    got_key, got_value = read(cache, 1)
    np.testing.assert_array_equal(got_key, expected_key)
    np.testing.assert_array_equal(got_value, expected_value)
    assert not np.any(read(cache, 0))


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_pages_become_tokens_and_pages_again(name: str) -> None:
    """As they leave for the host and come back, in the layout of each platform."""
    with tracing_for(name):
        layout = make_layout()
        cache, keys, values = full_cache()
        pages = [9, 0, 4]
        kv = read_tokens(page_copies.take_pages(cache, pages), 2 * S + 1, layout)
        for got, expected in ((kv.keys[1], keys), (kv.values[1], values)):
            np.testing.assert_array_equal(got, expected[pages].reshape(-1, K, D)[: 2 * S + 1])
        fresh = kv_cache.init_cache(layout)
        fresh = page_copies.put_pages(fresh, [write_tokens(kv, layout)], {0: 2, 1: 7, 2: 5})
        new_keys, new_values = read(fresh, 1)
    for new, old in ((new_keys, keys), (new_values, values)):
        np.testing.assert_array_equal(new[[2, 7]], old[[9, 0]])
        np.testing.assert_array_equal(new[5, :1], old[4, :1])
