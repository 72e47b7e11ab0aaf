"""Attention in C++: what it promises beside what all kernels do, which is the same bits."""

import concurrent.futures
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import kv
from folojax.attention import KERNELS, AttentionSpec, choose_kernel, native
from folojax.backend.backend import CPU
from folojax.kv import KVCache, KVLayout, PageFormat, Placement, place_tokens
from folojax.models.core.interface import PLAIN, Scoring
from folojax.models.machine import compiler as native_code


class Shape(NamedTuple):
    """Of an attention: heads, their size, and a page's."""

    kv_heads: int = 2
    groups: int = 3
    dim: int = 64
    page_size: int = 16


FLOAT32 = jnp.dtype(jnp.float32)


def make_spec(shape: Shape, scoring: Scoring = PLAIN) -> AttentionSpec:
    page_format = PageFormat(shape.page_size, "heads", CPU.kernels)
    return AttentionSpec(FLOAT32, FLOAT32, shape.dim, page_format, scoring)


def make_cache(shape: Shape, num_pages: int = 12) -> KVCache:
    layout = KVLayout(
        num_pages=num_pages,
        num_layers=1,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        dtype=FLOAT32,
        storage_dtype=FLOAT32,
        format=make_spec(shape).page_format,
    )
    rng = np.random.default_rng(1)
    empty = kv.init_cache(layout)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), empty)


def make_query(shape: Shape, rows: int, columns: int) -> jax.Array:
    size = (rows, columns, shape.kv_heads * shape.groups, shape.dim)
    return jnp.asarray(np.random.default_rng(2).normal(size=size), jnp.float32)


TABLE = np.array([[5, 0, 11, 12], [3, 12, 12, 12], [7, 9, 12, 12], [12, 12, 12, 12]])
# Three rows that begin in the first, at the end of the first and in the first page; and padding.
FIRST, LENGTH = np.array([20, 0, 15, 0]), np.array([20, 1, 13, 0])
COLUMNS = 20


@functools.partial(jax.jit, static_argnames=("name", "scoring"))
def _attend(
    cache: KVCache, query: jax.Array, placement: Placement, name: str, scoring: Scoring
) -> jax.Array:
    spec = AttentionSpec(query.dtype, cache.dtype, query.shape[-1], cache.format, scoring)
    assert KERNELS[name].refusal(spec) is None
    # No more than the shape of these is read.
    flat = query.reshape(-1, *query.shape[2:])
    own = flat[:, : cache.layers[0].shape[2]]
    _, out = KERNELS[name].attend(flat, own, own, cache.layers[0], placement, spec)
    return out.reshape(query.shape)


def make_placement(
    table: np.ndarray = TABLE,
    first: np.ndarray = FIRST,
    length: np.ndarray = LENGTH,
    columns: int = COLUMNS,
) -> Placement:
    nowhere = jnp.full(len(table) * columns, 10**6)  # nothing is stored
    return Placement(nowhere, nowhere, *map(jnp.asarray, (table, first, length)))


def attend(
    cache: KVCache,
    query: jax.Array,
    table: np.ndarray = TABLE,
    first: np.ndarray = FIRST,
    length: np.ndarray = LENGTH,
    scoring: Scoring = PLAIN,
    name: str = "native",
) -> np.ndarray:
    placement = make_placement(table, first, length, query.shape[1])
    return np.asarray(_attend(cache, query, placement, name=name, scoring=scoring))


def attend_by_xla(cache: KVCache, query: jax.Array, scoring: Scoring) -> np.ndarray:
    out = attend(cache, query, scoring=scoring, name="reference")
    is_real = (np.arange(COLUMNS) < LENGTH[:, None])[:, :, None, None]
    return np.where(is_real, out, 0)


@pytest.mark.parametrize(
    ("shape", "scoring"),
    [
        *((Shape(), one) for one in (PLAIN, Scoring(scale=0.1), Scoring(window=17))),
        *((Shape(*one), PLAIN) for one in [(1, 1, 8), (2, 1, 136)]),
        *((Shape(*one), Scoring(window=7)) for one in [(3, 2, 40), (1, 8, 96), (4, 7, 32)]),
    ],
    ids=str,
)
def test_it_is_what_xla_computes(shape: Shape, scoring: Scoring) -> None:
    cache, query = make_cache(shape), make_query(shape, 4, COLUMNS)
    got = attend(cache, query, scoring=scoring)
    np.testing.assert_allclose(got, attend_by_xla(cache, query, scoring), rtol=0, atol=3e-6)


def test_large_scores_and_tiny_weights() -> None:
    """Weights from 1 to below the least float32."""
    cache, query = make_cache(Shape()), make_query(Shape(), 4, COLUMNS) * 30
    np.testing.assert_allclose(
        attend(cache, query), attend_by_xla(cache, query, PLAIN), rtol=0, atol=3e-5
    )


def test_a_token_has_the_same_bits_alone_in_any_chunk_and_any_row() -> None:
    shape = Shape()
    cache, query = make_cache(shape), make_query(shape, 4, COLUMNS)
    whole = attend(cache, query)
    for row, token in [(0, 0), (0, 7), (0, 19), (1, 0), (2, 12)]:
        place = FIRST[row : row + 1] + token
        one = attend(
            cache, query[row, token][None, None], TABLE[row : row + 1], place, np.array([1])
        )
        np.testing.assert_array_equal(one[0, 0], whole[row, token])
    order = [2, 3, 0, 1]
    turned = attend(cache, query[jnp.asarray(order)], TABLE[order], FIRST[order], LENGTH[order])
    np.testing.assert_array_equal(turned, whole[order])
    wide = np.pad(TABLE, ((0, 0), (0, 9)), constant_values=12)
    np.testing.assert_array_equal(attend(cache, query, wide), whole)


def test_what_lies_behind_a_row_is_not_read() -> None:
    """Behind its tokens in a page, in later pages of its table, and in pages of others."""
    shape = Shape()
    cache, query = make_cache(shape), make_query(shape, 4, COLUMNS)
    expected = attend(cache, query)
    seen = np.zeros((12, shape.page_size), bool)
    for row in range(4):
        for position in range(FIRST[row] + LENGTH[row]):
            seen[TABLE[row, position // shape.page_size], position % shape.page_size] = True
    mask = jnp.asarray(seen)[:, None, None, :, None]
    stale = KVCache((jnp.where(mask, cache.layers[0], jnp.nan),), cache.format)
    table = np.where(TABLE == 12, 1, TABLE)  # of pages that nobody has
    table[3] = 12
    np.testing.assert_array_equal(attend(stale, query, table), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_numbers_are_seen_in_their_row(value: float) -> None:
    shape = Shape()
    cache, query = make_cache(shape), make_query(shape, 4, COLUMNS)
    expected = attend(cache, query)
    page = TABLE[2, 0]
    broken = KVCache((cache.layers[0].at[page, 0, :, 3].set(value),), cache.format)
    got = attend(broken, query)
    assert np.isnan(got[2, : LENGTH[2]]).all()
    np.testing.assert_array_equal(got[[0, 1, 3]], expected[[0, 1, 3]])


def test_many_at_once_do_not_disturb_each_other() -> None:
    """Calls of several programs share the threads of XLA's pool."""
    shape = Shape()
    cache, query = make_cache(shape), make_query(shape, 4, COLUMNS)
    queries = [query * (1 + i / 8) for i in range(8)]
    expected = [attend(cache, one) for one in queries]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            got = list(pool.map(functools.partial(attend, cache), queries))
            for one, other in zip(got, expected, strict=True):
                np.testing.assert_array_equal(one, other)


def test_in_a_loop_of_steps() -> None:
    shape = Shape()
    cache, query = make_cache(shape), make_query(shape, 4, COLUMNS)
    placement = make_placement()

    def step(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        out = _attend(cache, x, placement, name="native", scoring=PLAIN)
        return out, out

    _, found = jax.jit(lambda x: jax.lax.scan(step, x, None, 3))(query)
    expected = np.asarray(query)
    for one in found:
        expected = attend(cache, jnp.asarray(expected))
        np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize(
    ("shape", "scoring"),
    [
        (Shape(page_size=12), PLAIN),
        (Shape(dim=20), PLAIN),
        (Shape(), Scoring(softcap=30.0)),
    ],
    ids=str,
)
def test_what_is_left_to_xla(shape: Shape, scoring: Scoring) -> None:
    spec = make_spec(shape, scoring)
    assert KERNELS["native"].refusal(spec) is not None
    assert choose_kernel(spec)[0] == "reference"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"storage_dtype": jnp.dtype(jnp.bfloat16)}, "reads pages of float32"),
        ({"page_format": PageFormat(16, "tokens", ())}, "in the order of heads"),
        ({"scoring": Scoring(softcap=30.0)}, "does not cap scores"),
        ({"head_dim": 20}, "multiples of 8"),
        ({"page_format": PageFormat(12, "heads", ())}, "multiples of 8"),
    ],
)
def test_it_says_what_it_is_not_for(fields: dict[str, Any], reason: str) -> None:
    spec = AttentionSpec(**{**vars(make_spec(Shape())), **fields})
    assert reason in str(KERNELS["native"].refusal(spec))


def test_nothing_is_copied() -> None:
    """A program that stores a token and attends reads the cache where it lies."""
    shape = Shape()
    cache, query = make_cache(shape, 64), make_query(shape, 4, 1)

    def step(cache: KVCache, query: jax.Array) -> tuple[KVCache, jax.Array]:
        row = jnp.arange(4)
        table = jnp.broadcast_to(row[:, None], (4, 4))
        placement, _ = place_tokens(cache, table, row, row * 0 + 1, 1)
        new = query[:, 0, : shape.kv_heads]
        given = query[:, 0], new, new, cache.layers[0], placement, make_spec(shape)
        pages, out = KERNELS["native"].attend(*given)
        return KVCache((pages,), cache.format), out

    compiled = jax.jit(step, donate_argnums=0).lower(cache, query).compile()
    analysis: Any = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert analysis.temp_size_in_bytes < cache.layers[0].nbytes / 8


def test_without_a_compiler_attention_is_xlas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_code, "register", functools.cache(native_code.register.__wrapped__))
    monkeypatch.setattr(native, "problem", functools.cache(native.problem.__wrapped__))
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    spec = make_spec(Shape())
    assert str(KERNELS["native"].refusal(spec)).startswith("cannot be compiled: ")
    assert choose_kernel(spec)[0] == "reference"
