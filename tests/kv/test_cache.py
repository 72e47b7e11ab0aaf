"""The paged cache: what is written is read back, and nothing else moves."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import kv
from folojax.backend.backend import CPU, GPU
from folojax.kv import KVCache, KVLayout, PageFormat, place_tokens
from folojax.kv.cache import PageOrder
from folojax.kv.page_copies import PageCopies
from folojax.runner.host_store import read_tokens, write_tokens
from tests import paged_sequences

P, S, L, K, D = 11, 4, 2, 2, 8
ORDERS = get_args(PageOrder)


def make_layout(
    dtype: Any = jnp.float32, num_pages: int = P, order: Any = "heads", storage: Any = None
) -> KVLayout:
    return KVLayout(
        num_pages=num_pages,
        num_layers=L,
        num_kv_heads=K,
        head_dim=D,
        dtype=jnp.dtype(dtype),
        storage_dtype=jnp.dtype(dtype if storage is None else storage),
        format=PageFormat(S, order, ("reference",)),
    )


write = functools.partial(jax.jit, static_argnums=1)(paged_sequences.write)


def random_tokens(num_tokens: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Keys and values: [T, K, D] each, in float32."""
    key, value = np.random.default_rng(seed).normal(size=(2, num_tokens, K, D)).astype(np.float32)
    return jnp.asarray(key), jnp.asarray(value)


def read(cache: KVCache, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of a layer in the order of page ids: [P, S, K, D] each."""
    pages = np.array(cache.format.by_token(cache.layers[layer]))
    assert pages.shape == (cache.num_pages, 2, S, K, D)
    return pages[:, 0], pages[:, 1]


def full_cache(order: Any = "heads") -> tuple[KVCache, np.ndarray, np.ndarray]:
    """A cache whose layer 1 holds a different number everywhere, and these [P, S, K, D]."""
    key, value = random_tokens(P * S)
    page, offset = jnp.arange(P * S) // S, jnp.arange(P * S) % S
    cache = write(kv.init_cache(make_layout(order=order)), 1, page, offset, key, value)
    shape = (P, S, K, D)
    return cache, np.array(key).reshape(shape), np.array(value).reshape(shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_every_page_round_trips(order: str, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    where = rng.permutation(P * S)  # tokens come in any order
    key, value = (x.astype(dtype) for x in random_tokens(P * S))
    cache = kv.init_cache(make_layout(dtype, order=order))
    cache = write(cache, 1, jnp.asarray(where // S), jnp.asarray(where % S), key, value)
    keys, values = read(cache, 1)
    assert cache.dtype == keys.dtype == values.dtype == dtype
    np.testing.assert_array_equal(keys.reshape(-1, K, D)[where], key)
    np.testing.assert_array_equal(values.reshape(-1, K, D)[where], value)
    other_keys, other_values = read(cache, 0)
    assert not other_keys.any()
    assert not other_values.any()


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("order", ORDERS)
def test_a_write_changes_its_token_alone(order: str, count: int) -> None:
    cache, keys, values = full_cache(order)
    page, offset = np.array([0, 2, 3, 5, 6, P - 1])[:count], np.array([3, 3, 1, 2, 0, 3])[:count]
    key, value = random_tokens(count, seed=1)
    new_keys, new_values = read(write(cache, 1, page, offset, key, value), 1)
    keys[page, offset], values[page, offset] = key, value
    np.testing.assert_array_equal(new_keys, keys)
    np.testing.assert_array_equal(new_values, values)


@pytest.mark.parametrize("page", [P, P + 1, 2 * P, 2**31 - 1, -1, -3, -P, -P - 1, -(2**31)])
@pytest.mark.parametrize("order", ORDERS)
def test_a_page_outside_the_cache_is_dropped_and_never_wraps(order: str, page: int) -> None:
    cache, keys, values = full_cache(order)
    key, value = random_tokens(3, seed=1)
    pages = jnp.array([page, 4, page], jnp.int32)
    new_keys, new_values = read(write(cache, 1, pages, jnp.array([0, 1, 2]), key, value), 1)
    keys[4, 1], values[4, 1] = key[1], value[1]
    np.testing.assert_array_equal(new_keys, keys)
    np.testing.assert_array_equal(new_values, values)


@pytest.mark.parametrize("order", ORDERS)
def test_a_single_token_outside_is_dropped(order: str) -> None:
    cache, keys, values = full_cache(order)
    key, value = random_tokens(1, seed=1)
    new_keys, new_values = read(write(cache, 1, jnp.array([P]), jnp.array([3]), key, value), 1)
    np.testing.assert_array_equal(new_keys, keys)
    np.testing.assert_array_equal(new_values, values)


@pytest.mark.parametrize("order", ORDERS)
def test_sizes_are_those_of_the_layout(order: str) -> None:
    layout = make_layout(jnp.bfloat16, order=order)
    cache = kv.init_cache(layout)
    assert cache.num_pages == layout.num_pages == P
    assert cache.page_size == layout.page_size == S
    assert cache.format == layout.format
    leaves = jax.tree.leaves(cache)
    assert len(leaves) == L
    assert sum(leaf.nbytes for leaf in leaves) == layout.num_pages * layout.bytes_per_page
    assert not any(np.asarray(leaf).any() for leaf in leaves)


@pytest.mark.parametrize(
    ("backend", "shape", "dtype"),
    [(CPU, (P, 2, K, S, D), jnp.float32), (GPU, (P, 2, S, K, D), jnp.bfloat16)],
    ids=["cpu", "gpu"],
)
def test_pages_lie_as_the_backend_wants_them(
    backend: Any, shape: tuple, dtype: Any, tiny_model: tuple
) -> None:
    config = tiny_model[0].config
    shape = tuple({K: config.num_kv_heads, D: config.head_dim}.get(n, n) for n in shape[2:])
    for is_deterministic in (False, True):
        one = backend.deterministic(config, jnp.float32) if is_deterministic else backend
        layout = one.kv_layout(config, jnp.bfloat16, P, S)
        cache = jax.eval_shape(lambda layout=layout: kv.init_cache(layout))
        assert cache.layers[0].shape == (P, 2, *shape)
        assert len(cache.layers) == config.num_layers
        assert cache.dtype == layout.storage_dtype == dtype
        assert layout.dtype == jnp.bfloat16
        kernels = backend.exact_kernels if is_deterministic else backend.kernels
        assert cache.format.kernels == kernels


def test_tokens_are_placed_in_their_pages() -> None:
    """Those of padding nowhere, also in a row of it and behind the end of the table."""
    cache = kv.init_cache(make_layout())
    table = jnp.array([[7, 2, P], [5, P, P], [P, P, P], [1, 3, 9]])
    first, length = jnp.array([2, 0, 0, 11]), jnp.array([5, 1, 0, 1])
    placement, position = place_tokens(cache, table, first, length, 5)
    outside = [P] * 5
    assert placement.page.reshape(4, 5).tolist() == [
        [7, 7, 2, 2, 2],
        [5, *outside[1:]],
        outside,
        [9, *outside[1:]],
    ]
    assert placement.offset.reshape(4, 5).tolist()[0] == [2, 3, 0, 1, 2]
    assert position.reshape(4, 5).tolist()[3] == [11, 12, 13, 14, 15]
    assert (placement.first == first).all()
    assert (placement.length == length).all()
    assert (placement.page_table == table).all()


@pytest.mark.parametrize("storage", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("order", ORDERS)
def test_every_bit_pattern_of_bfloat16_survives(order: str, storage: Any) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    num_pages = 2**16 // (S * K * D)
    numbers = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16).reshape(-1, K, D)
    token = jnp.arange(num_pages * S)
    cache = kv.init_cache(make_layout(jnp.bfloat16, num_pages, order, storage))
    assert cache.dtype == storage
    finite = jnp.where(jnp.isfinite(numbers), numbers, 1)[::-1]
    cache = write(cache, 0, token // S, token % S, numbers, finite)
    keys, values = (x.astype(jnp.bfloat16) for x in read(cache, 0))
    # A NaN stays one; which of them is nobody's business.
    is_nan = np.isnan(np.asarray(numbers, np.float32)).ravel()
    np.testing.assert_array_equal(np.isnan(keys.astype(np.float32)).ravel(), is_nan)
    np.testing.assert_array_equal(keys.view(np.uint16).ravel()[~is_nan], bits[~is_nan])
    np.testing.assert_array_equal(
        values.view(np.uint16).reshape(-1, K, D), np.asarray(finite).view(np.uint16)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_a_value_that_is_no_number_is_stored_as_zero_with_a_nan_for_key(
    order: str, dtype: Any, bad: float
) -> None:
    key, value = (x.astype(dtype) for x in random_tokens(3))
    cache = kv.init_cache(make_layout(dtype, order=order))
    page, offset = jnp.array([2, 3, 9]), jnp.array([0, 1, 2])
    cache = write(cache, 1, page, offset, key, value.at[1, 0, 3].set(bad))
    keys, values = (x[page, offset] for x in read(cache, 1))
    # That number of token 1 in head 0, and nothing else.
    assert np.isnan(keys[1, 0, 3].astype(np.float32))
    assert values[1, 0, 3] == 0
    keys[1, 0, 3], values[1, 0, 3] = np.asarray(key)[1, 0, 3], np.asarray(value)[1, 0, 3]
    np.testing.assert_array_equal(keys, key)
    np.testing.assert_array_equal(values, value)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_donated_cache_is_written_in_place(dtype: Any, count: int) -> None:
    """In the order of a CPU's pages; those are of float32 there."""
    donating = functools.partial(jax.jit, static_argnums=1, donate_argnums=0)(paged_sequences.write)
    layout = make_layout(dtype, 128, storage=jnp.float32)
    cache = kv.init_cache(layout)
    key, value = (x.astype(dtype) for x in random_tokens(count))
    page, offset = jnp.array([3, 100])[:count], jnp.array([0, 1])[:count]
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    new = donating(cache, 1, page, offset, key, value)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(new)] == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    # Nor does the executable copy the cache on the way.
    shapes = jax.eval_shape(lambda: kv.init_cache(layout))
    memory = donating.lower(shapes, 1, page, offset, key, value).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < new.layers[0].nbytes


@pytest.mark.parametrize("arrays_per_call", [1, None])
@pytest.mark.parametrize("order", ORDERS)
def test_pages_are_copied_all_at_once(order: str, arrays_per_call: int | None) -> None:
    """A swap, and a source that is also a target, read the old content."""
    cache, key, value = full_cache(order)
    copies = [(0, 10), (10, 0), (4, 2), (4, 7), (2, 4)]
    source, target = np.array(copies).T
    cache = PageCopies(arrays_per_call).copy(cache, copies)
    expected_key, expected_value = key.copy(), value.copy()
    expected_key[target], expected_value[target] = key[source], value[source]
    got_key, got_value = read(cache, 1)
    np.testing.assert_array_equal(got_key, expected_key)
    np.testing.assert_array_equal(got_value, expected_value)
    assert not np.any(read(cache, 0))


@pytest.mark.parametrize("arrays_per_call", [1, None])
def test_compiling_copies_moves_nothing(arrays_per_call: int | None) -> None:
    cache, key, value = full_cache()
    keys, values = read(PageCopies(arrays_per_call).compile(cache), 1)
    np.testing.assert_array_equal(keys, key)
    np.testing.assert_array_equal(values, value)


@pytest.mark.parametrize("order", ORDERS)
def test_many_pages_go_in_groups(order: str) -> None:
    """More than one call takes, of which the last is padded."""
    num_pages, copies = 50, PageCopies(None)
    layout = make_layout(num_pages=num_pages, order=order)
    rng = np.random.default_rng(0)
    cache = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), kv.init_cache(layout)
    )
    expected = [np.array(leaf) for leaf in cache.layers]
    source, target = np.split(rng.permutation(num_pages)[:42], 2)
    cache = copies.copy(cache, list(zip(source.tolist(), target.tolist(), strict=True)))
    for leaf, old in zip(cache.layers, expected, strict=True):
        old[target] = old[source]
        np.testing.assert_array_equal(leaf, old)


@pytest.mark.parametrize("order", ORDERS)
def test_pages_become_tokens_and_pages_again(order: str) -> None:
    """As they leave for the host and come back; tokens fit caches of the other order, too."""
    layout, copies = make_layout(order=order), PageCopies(1)
    cache, keys, values = full_cache(order)
    pages = [9, 0, 4]
    tokens = read_tokens(copies.take(cache, pages), 2 * S + 1, layout)
    for got, expected in ((tokens.keys[1], keys), (tokens.values[1], values)):
        np.testing.assert_array_equal(got, expected[pages].reshape(-1, K, D)[: 2 * S + 1])
    for other in ORDERS:
        new_layout = make_layout(order=other)
        fresh = kv.init_cache(new_layout)
        written = write_tokens(tokens, new_layout)
        taken = [written._replace(layers=list(map(jnp.asarray, written.layers)))]
        fresh = copies.put(fresh, taken, {0: 2, 1: 7, 2: 5})
        for new, old in zip(read(fresh, 1), (keys, values), strict=True):
            np.testing.assert_array_equal(new[[2, 7]], old[[9, 0]])
            np.testing.assert_array_equal(new[5, :1], old[4, :1])


def test_layers_of_other_heads_become_tokens_side_by_side() -> None:
    layout = dataclasses.replace(make_layout(), heads=((2, 8), (1, 24)))
    assert layout.bytes_per_page == 4 * S * 2 * (2 * 8 + 24)
    cache = kv.init_cache(layout)
    rng = np.random.default_rng(0)
    layers = tuple(jnp.asarray(rng.normal(size=one.shape), one.dtype) for one in cache.layers)
    cache, copies = dataclasses.replace(cache, layers=layers), PageCopies(1)
    tokens = read_tokens(copies.take(cache, [3, 8]), S + 3, layout)
    assert tokens.keys.shape == (1, S + 3, 1, 2 * 8 + 24)
    written = write_tokens(tokens, layout)
    for layer, pages in zip(layers, written.layers, strict=True):
        expected = layout.format.by_token(layer)
        np.testing.assert_array_equal(layout.format.by_token(pages)[0], expected[3])
        np.testing.assert_array_equal(layout.format.by_token(pages)[1, :, :3], expected[8, :, :3])
