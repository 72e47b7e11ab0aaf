"""Sequences in pages and rows, for the tests of attention.

A *sequence* here is what one request would have: queries, keys and values of every token. The
helpers put sequences into pages and rows as a step does, and give back each row's result.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from folojax import kv
from folojax.attention import attend
from folojax.backend import choose_backend
from folojax.kv import KVCache, KVLayout, PageFormat, place_tokens
from folojax.kv.cache import PageOrder
from folojax.models.core.interface import PLAIN, Scoring
from folojax.models.machine.row_sums import REORDERED

LAYER = 1
MOST_TOKENS = 64


class Tokens(NamedTuple):
    """Consecutive tokens of a sequence."""

    query: Any  # [T, H, D]
    key: Any  # [T, K, D]
    value: Any  # [T, K, D]; [T, K, V] if they are the first numbers of the keys

    @property
    def size(self) -> int:
        """T."""
        return self.query.shape[0]

    def first(self, count: int) -> "Tokens":
        """The first `count` tokens; a negative count leaves so many out."""
        return Tokens(*(x[:count] for x in self))


class Heads(NamedTuple):
    """K kv heads of size D, each with G query heads."""

    kv: int
    groups: int
    dim: int = 8
    value_dim: int | None = None  # V, if values are the first numbers of keys


class Way(NamedTuple):
    """A kernel and the order of the pages that it reads."""

    kernel: str
    order: PageOrder
    dtype: Any = np.float32
    sizes: tuple[int, ...] = (4, 8, 16)
    caps: bool = True
    takes_latents: bool = True
    is_twin: bool = False  # of one that is the same code but for the order of the pages

    def __str__(self) -> str:
        return f"{self.kernel}-{self.order}"

    @property
    def atol(self) -> float:
        """Of results below 8: XLA sums in an order that depends on the shapes."""
        return 5e-6 if self.dtype == np.float32 else 0.02


WAYS = (
    Way("native", "heads", sizes=(8, 16), caps=False),
    Way("reference", "heads"),
    Way("reference", "tokens", is_twin=True),
    Way("alike", "heads", is_twin=True),
    Way("alike", "tokens"),
    Way("cudnn", "tokens", np.float16, (8, 16), caps=False, takes_latents=False),
)


def random_sequences(
    lengths: Sequence[int], heads: Heads, seed: int = 0, dtype: Any = np.float32
) -> list[Tokens]:
    rng = np.random.default_rng(seed)

    def one(length: int) -> Tokens:
        shapes = [(length, heads.kv * heads.groups, heads.dim), *[(length, *heads[:3:2])] * 2]
        found = [rng.normal(scale=1.5, size=shape).astype(dtype) for shape in shapes]
        if heads.value_dim is not None:
            found[2] = found[1][..., : heads.value_dim]
        return Tokens(*found)

    return [one(length) for length in lengths]


def reference(sequence: Tokens, scoring: Scoring = PLAIN) -> np.ndarray:
    """Causal attention in float64, one query at a time: [T, H, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in sequence)
    groups, dim = query.shape[1] // key.shape[1], query.shape[2]
    scale = dim**-0.5 if scoring.scale is None else scoring.scale
    out = np.zeros((*query.shape[:2], value.shape[2]))
    for t in range(query.shape[0]):
        first = 0 if scoring.window is None else max(0, t + 1 - scoring.window)
        for head in range(query.shape[1]):
            seen = slice(first, t + 1), head // groups
            scores = key[seen] @ query[t, head] * scale
            if scoring.softcap is not None:
                scores = scoring.softcap * np.tanh(scores / scoring.softcap)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ value[seen]
    return out


def make_cache(
    way: Way, heads: Heads, page_size: int, num_pages: int, dtype: Any = None
) -> KVCache:
    """A cache full of old numbers: pages are never cleaned."""
    dtype = jnp.dtype(way.dtype if dtype is None else dtype)
    layout = KVLayout(
        num_pages=num_pages,
        num_layers=LAYER + 1,
        num_kv_heads=heads.kv,
        head_dim=heads.dim,
        value_dim=heads.value_dim,
        dtype=dtype,
        storage_dtype=dtype,
        format=PageFormat(page_size, way.order, (way.kernel,), choose_backend().capability),
    )
    rng = np.random.default_rng(99)

    def fill(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(np.abs(rng.normal(scale=20, size=leaf.shape)).astype(leaf.dtype))

    return jax.tree.map(fill, kv.init_cache(layout))


def place(lengths: Sequence[int], page_size: int, num_pages: int, seed: int = 0) -> list[list[int]]:
    """Pages for sequences, scattered over the pool."""
    free = np.random.default_rng(seed).permutation(num_pages).tolist()
    return [[free.pop() for _ in range(-(-length // page_size))] for length in lengths]


def write(cache: KVCache, layer: int, page: Any, offset: Any, key: Any, value: Any) -> KVCache:
    """A cache with tokens stored in one of its layers."""
    layers = list(cache.layers)
    value = value if layers[layer].shape[1] == 2 else value.shape[-1]
    layers[layer] = kv.cache.write(layers[layer], page, offset, key, value, cache.format.order)
    return KVCache(tuple(layers), cache.format)


_write = functools.partial(jax.jit, static_argnums=1)(write)


# As the engine compiles it.
@functools.partial(jax.jit, static_argnames=("columns", "scoring"), compiler_options=REORDERED)
def attend_rows(
    cache: KVCache, rows: tuple[Any, Any, Any], tokens: Tokens, columns: int, scoring: Scoring
) -> Any:
    placement, _ = place_tokens(cache, *rows, columns)
    value = tokens.value if scoring.value_dim is None else None
    return attend(placement, cache, LAYER, tokens.query, tokens.key, value, scoring)


def store(cache: KVCache, sequences: list[Tokens], pages: list[list[int]]) -> KVCache:
    """Puts whole sequences into their pages."""
    for sequence, table in zip(sequences, pages, strict=True):
        position = np.arange(MOST_TOKENS)  # padded, so that all lengths share an executable
        is_token = position < sequence.size
        page = np.full(MOST_TOKENS, cache.num_pages)
        page[is_token] = np.array(table)[position[is_token] // cache.page_size]
        _, key, value = sequence
        pad = [(0, MOST_TOKENS - sequence.size), (0, 0), (0, 0)]
        offset = position % cache.page_size
        cache = _write(
            cache, LAYER, jnp.asarray(page), offset, np.pad(key, pad), np.pad(value, pad)
        )
    return cache


class Chunk(NamedTuple):
    """Tokens `start` to `end` of a sequence; None is a padding row."""

    sequence: int | None
    start: int = 0
    end: int = 0


def run_rows(
    cache: KVCache,
    sequences: list[Tokens],
    pages: list[list[int]],
    chunks: Sequence[Chunk],
    columns: int,
    *,
    table_pages: int | None = None,
    scoring: Scoring = PLAIN,
) -> tuple[KVCache, list[np.ndarray]]:
    """One call; returns the output of each chunk's tokens [end - start, H, D] (padding: all C)."""
    rows, num_pages = len(chunks), cache.num_pages
    table_pages = table_pages or MOST_TOKENS // cache.page_size
    first, length = np.zeros((2, rows), np.int32)
    table = np.full((rows, table_pages), num_pages, np.int32)
    flat = Tokens(*(np.full((rows * columns, *x.shape[1:]), 7.0, x.dtype) for x in sequences[0]))
    for row, chunk in enumerate(chunks):
        if chunk.sequence is None:
            continue
        first[row], length[row] = chunk.start, chunk.end - chunk.start
        table[row, : len(pages[chunk.sequence])] = pages[chunk.sequence]
        for x, tokens in zip(flat, sequences[chunk.sequence], strict=True):
            x[row * columns :][: length[row]] = tokens[chunk.start : chunk.end]
    arrays = tuple(map(jnp.asarray, (table, first, length)))
    cache, found = attend_rows(cache, arrays, flat, columns=columns, scoring=scoring)
    out = np.asarray(found).reshape(rows, columns, *found.shape[1:])
    is_real = [chunk.sequence is not None for chunk in chunks]
    return cache, [out[i, : length[i]] if is_real[i] else out[i] for i in range(rows)]


def decode(
    cache: KVCache,
    sequences: list[Tokens],
    pages: list[list[int]],
    order: Sequence[int | None],
    scoring: Scoring = PLAIN,
) -> tuple[KVCache, list[np.ndarray]]:
    """Feeds the last token of each sequence; returns the output [H, D] of each row in `order`.

    Args:
        cache: Holds all earlier tokens.
        sequences: With the new token.
        pages: Of the sequences; pages beyond the new token's are allowed.
        order: Sequence of each row; None is a padding row.
        scoring: Of the layer.
    """
    last = [
        Chunk(None) if i is None else Chunk(i, sequences[i].size - 1, sequences[i].size)
        for i in order
    ]
    cache, out = run_rows(cache, sequences, pages, last, 1, scoring=scoring)
    return cache, [one[0] for one in out]


def check_stored(cache: KVCache, sequences: list[Tokens], pages: list[list[int]]) -> None:
    stored = np.asarray(cache.format.by_token(cache.layers[LAYER]))
    for (_, key, value), table in zip(sequences, pages, strict=True):
        for place, expected in enumerate((key, value)[: stored.shape[1]]):
            found = stored[table, place].reshape(-1, *expected.shape[1:])[: len(expected)]
            np.testing.assert_array_equal(found, expected)
