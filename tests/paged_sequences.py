"""Sequences in pages and rows, for the tests of attention.

A *sequence* here is what one request would have: queries, keys and values of every token. The
helpers put sequences into pages and rows as the runner does, and give back each one's result.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folojax.kv_cache import KVCache, KVLayout

from folojax import kv_cache
from folojax.attention import attend_chunks, attend_tokens, plan_chunks, plan_tokens
from folojax.models.row_sums import REORDERED
from folojax.state import DecodeInputs, PrefillInputs

M, V = 8, 16
D = 8
LAYER = 1


class Tokens(NamedTuple):
    """Consecutive tokens of a sequence."""

    query: Any  # [T, H, D]
    key: Any  # [T, K, D]
    value: Any  # [T, K, D]

    @property
    def size(self) -> int:
        """T."""
        return self.query.shape[0]

    def first(self, count: int) -> "Tokens":
        """The first `count` tokens; a negative count leaves so many out."""
        return Tokens(*(x[:count] for x in self))


class Heads(NamedTuple):
    """K kv heads, each with G query heads."""

    kv: int
    groups: int


def random_sequences(
    lengths: Sequence[int], heads: Heads, seed: int = 0, dtype: Any = np.float32
) -> list[Tokens]:
    rng = np.random.default_rng(seed)

    def one(length: int) -> Tokens:
        shapes = [(length, heads.kv * heads.groups, D), *[(length, heads.kv, D)] * 2]
        return Tokens(*(rng.normal(scale=1.5, size=shape).astype(dtype) for shape in shapes))

    return [one(length) for length in lengths]


def reference(sequence: Tokens) -> np.ndarray:
    """Causal attention, one query at a time in float64: [T, H, D]."""
    query, key, value = (np.asarray(x, np.float64) for x in sequence)
    groups = query.shape[1] // key.shape[1]
    out = np.zeros_like(query)
    for t in range(query.shape[0]):
        for head in range(query.shape[1]):
            scores = key[: t + 1, head // groups] @ query[t, head] / np.sqrt(D)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ value[: t + 1, head // groups]
    return out


def make_cache(
    heads: Heads, page_size: int, segments: tuple[int, ...], dtype: Any = jnp.float32
) -> KVCache:
    """A cache full of old numbers: pages are never cleaned."""
    layout = KVLayout(
        segments=segments,
        page_size=page_size,
        num_layers=LAYER + 1,
        num_kv_heads=heads.kv,
        head_dim=D,
        dtype=jnp.dtype(dtype),
    )
    rng = np.random.default_rng(99)

    def fill(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(np.abs(rng.normal(scale=20, size=leaf.shape)).astype(leaf.dtype))

    return jax.tree.map(fill, kv_cache.init_cache(layout))


def place(lengths: Sequence[int], page_size: int, num_pages: int, seed: int = 0) -> list[list[int]]:
    """Pages for sequences, scattered over the pool."""
    free = np.random.default_rng(seed).permutation(num_pages).tolist()
    return [[free.pop() for _ in range(-(-length // page_size))] for length in lengths]


_write = functools.partial(jax.jit, static_argnums=1)(kv_cache.write)
_gather = functools.partial(jax.jit, static_argnums=(1, 3))(kv_cache.gather_pages)


# As the engine compiles them.
_jit = functools.partial(jax.jit, compiler_options=REORDERED)


@_jit
def _attend_chunks(cache: KVCache, inputs: PrefillInputs, tokens: Tokens) -> Any:
    return attend_chunks(plan_chunks(inputs, cache), cache, LAYER, *tokens)


@_jit
def _attend_tokens(cache: KVCache, inputs: DecodeInputs, tokens: Tokens) -> Any:
    return attend_tokens(plan_tokens(inputs, cache), cache, LAYER, *tokens)


def store(cache: KVCache, sequences: list[Tokens], pages: list[list[int]]) -> KVCache:
    """Puts whole sequences into their pages."""
    size = kv_cache.page_size(cache)
    for sequence, table in zip(sequences, pages, strict=True):
        position = np.arange(64)  # padded, so that all lengths share an executable
        is_token = position < sequence.size
        page = np.full(64, kv_cache.num_pages(cache))
        page[is_token] = np.array(table)[position[is_token] // size]
        _, key, value = sequence
        pad = [(0, 64 - sequence.size), (0, 0), (0, 0)]
        cache = _write(
            cache, LAYER, jnp.asarray(page), position % size, np.pad(key, pad), np.pad(value, pad)
        )
    return cache


class Chunk(NamedTuple):
    """Tokens `start` to `end` of a sequence; None is a padding row."""

    sequence: int | None
    start: int = 0
    end: int = 0


def prefill(
    cache: KVCache,
    sequences: list[Tokens],
    pages: list[list[int]],
    chunks: Sequence[Chunk],
    columns: int,
    table_pages: int,
) -> tuple[KVCache, list[np.ndarray]]:
    """One call; returns the output of each chunk's tokens [end - start, H, D] (padding: all C)."""
    rows, num_pages = len(chunks), kv_cache.num_pages(cache)
    start, length = np.zeros((2, rows), np.int32)
    table = np.full((rows, table_pages), num_pages, np.int32)
    flat = Tokens(*(np.zeros((rows * columns, *x.shape[1:]), x.dtype) for x in sequences[0]))
    for row, chunk in enumerate(chunks):
        if chunk.sequence is None:
            continue
        start[row], length[row] = chunk.start, chunk.end - chunk.start
        table[row, : len(pages[chunk.sequence])] = pages[chunk.sequence]
        for x, tokens in zip(flat, sequences[chunk.sequence], strict=True):
            x[row * columns :][: length[row]] = tokens[chunk.start : chunk.end]
            x[row * columns :][length[row] : columns] = 7.0  # padding tokens compute something
    ids = np.zeros((rows, columns), np.int32)
    arrays: list[Any] = [ids, start, length, table]
    inputs = PrefillInputs(*arrays)
    cache, out = _attend_chunks(cache, inputs, flat)
    out = np.asarray(out).reshape(rows, columns, *out.shape[1:])
    is_real = [chunk.sequence is not None for chunk in chunks]
    return cache, [out[i, : length[i]] if is_real[i] else out[i] for i in range(rows)]


def decode(
    cache: KVCache,
    sequences: list[Tokens],
    pages: list[list[int]],
    order: Sequence[int | None],
    num_segments: int | None = None,
) -> tuple[KVCache, list[np.ndarray]]:
    """Feeds the last token of each sequence; returns the output [H, D] of each row in `order`.

    Args:
        cache: Holds all earlier tokens.
        sequences: With the new token.
        pages: Of the sequences; pages beyond the new token's are allowed.
        order: Sequence of each row; None is a padding row.
        num_segments: As many segments are handed over, and all of them for None.
    """
    count = len(cache.keys) if num_segments is None else num_segments
    head, tail = kv_cache.take_segments(cache, count)
    size, num_pages, rows = kv_cache.page_size(cache), kv_cache.num_pages(head), len(order)
    table = np.full((rows, max(map(len, pages))), num_pages, np.int32)
    position = np.zeros(rows, np.int32)
    new = Tokens(*(np.full((rows, *x.shape[1:]), 7.0, x.dtype) for x in sequences[0]))
    for row, index in enumerate(order):
        if index is None:
            continue
        position[row] = sequences[index].size - 1
        assert len(pages[index]) > position[row] // size
        table[row, : len(pages[index])] = pages[index]
        for x, tokens in zip(new, sequences[index], strict=True):
            x[row] = tokens[-1]
    slot = np.full(rows, M, np.int32)
    arrays: list[Any] = [slot, np.full(rows, -1, np.int32), position, table]
    inputs = DecodeInputs(*arrays)
    head, out = _attend_tokens(head, inputs, new)
    return kv_cache.join_segments(head, tail), list(np.asarray(out))


HEADS = [Heads(1, 3), Heads(2, 1), Heads(3, 3)]
LENGTHS = [1, 4, 5, 17, 30, 16]
# By page size. One segment of pages of 8 is what attention in C++ is for.
SEGMENTS = {4: (8, 8, 16), 8: (16,), 16: (4, 4, 8)}
TABLE_PAGES = {4: 8, 8: 4, 16: 2}


class Case(NamedTuple):
    """Sequences in their pages, with all but the newest token of each cached."""

    sequences: list[Tokens]
    pages: list[list[int]]
    cache: KVCache


def make_case(
    heads: Heads,
    page_size: int,
    segments: tuple[int, ...] | None = None,
    placement: int = 0,
    num_usable: int | None = None,
) -> Case:
    segments = segments or SEGMENTS[page_size]
    sequences = random_sequences(LENGTHS, heads)
    pages = place(LENGTHS, page_size, num_usable or sum(segments), placement)
    earlier = [sequence.first(-1) for sequence in sequences]
    return Case(sequences, pages, store(make_cache(heads, page_size, segments), earlier, pages))


LAW_CASES = pytest.mark.parametrize(
    ("heads", "page_size"), [(Heads(2, 3), 4), (Heads(3, 1), 16), (Heads(2, 3), 8)], ids=str
)
ALL = list(range(len(LENGTHS)))


def check_stored(cache: KVCache, sequences: list[Tokens], pages: list[list[int]]) -> None:
    for sequence, table in zip(sequences, pages, strict=True):
        _, key, value = sequence
        padded = np.array([[*table, *[0] * (8 - len(table))]])
        keys, values = map(np.asarray, _gather(cache, LAYER, padded, jnp.dtype("float32")))
        keys = keys[0].transpose(0, 3, 1, 2).reshape(-1, *key.shape[1:])
        values = values[0].transpose(0, 2, 1, 3).reshape(-1, *key.shape[1:])
        np.testing.assert_array_equal(keys[: sequence.size], key)
        np.testing.assert_array_equal(values[: sequence.size], value)


def prefilled(
    heads: Heads, page_size: int, columns: int, calls: list[list[Chunk]], **options: Any
) -> tuple[KVCache, dict[int, np.ndarray]]:
    """Runs calls one after the other; returns the outputs of each sequence, joined."""
    segments = options.get("segments", SEGMENTS[page_size])
    sequences = options.get("sequences") or random_sequences(LENGTHS, heads)
    pages = place(LENGTHS, page_size, sum(SEGMENTS[page_size]), options.get("placement", 0))
    table_pages = options.get("table_pages", TABLE_PAGES[page_size])
    cache = make_cache(heads, page_size, segments)
    parts: dict[int, list[np.ndarray]] = {}
    for chunks in calls:
        cache, out = prefill(cache, sequences, pages, chunks, columns, table_pages)
        for chunk, part in zip(chunks, out, strict=True):
            if chunk.sequence is not None:
                parts.setdefault(chunk.sequence, []).append(part)
    return cache, {index: np.concatenate(part) for index, part in parts.items()}


def whole(order: Sequence[int | None] = tuple(ALL)) -> list[Chunk]:
    return [Chunk(None) if i is None else Chunk(i, 0, LENGTHS[i]) for i in order]


def cut(index: int, columns: int) -> list[Chunk]:
    """A sequence in rows of so many tokens."""
    length = LENGTHS[index]
    return [
        Chunk(index, start, min(start + columns, length)) for start in range(0, length, columns)
    ]


# XLA's CPU backend chooses how to multiply and to sum by the shape of the operands: the scores by
# columns and keys, the softmax's sum by the number of rows. So where R, C or N differ, the results
# of a row agree up to rounding only: outputs are below 8, whose last place is worth 5e-7.
def assert_close(got: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> None:
    for index, out in got.items():
        np.testing.assert_allclose(out, expected[index], rtol=0, atol=2e-6)


def assert_same(got: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> None:
    for index, out in got.items():
        np.testing.assert_array_equal(out, expected[index])
