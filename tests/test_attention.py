"""Attention over pages against plain attention, and the laws of a row.

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

from folojax import kv_cache
from folojax.attention import attend_chunks, attend_tokens, plan_chunks, plan_tokens
from folojax.kv_cache import KVCache, KVLayout
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


@jax.jit
def _attend_chunks(cache: KVCache, inputs: PrefillInputs, tokens: Tokens) -> Any:
    return attend_chunks(plan_chunks(inputs, cache), cache, LAYER, *tokens)


@jax.jit
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
SEGMENTS = {4: (8, 8, 16), 16: (4, 4, 8)}
TABLE_PAGES = {4: 8, 16: 2}


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
    ("heads", "page_size"), [(Heads(2, 3), 4), (Heads(3, 1), 16)], ids=str
)
ALL = list(range(len(LENGTHS)))


# --- against plain attention ----------------------------------------------------------------


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_tokens_attend_like_plain_attention(heads: Heads, page_size: int) -> None:
    case = make_case(heads, page_size)
    cache, out = decode(case.cache, case.sequences, case.pages, [*ALL, None, None])
    for index in ALL:
        expected = reference(case.sequences[index])[-1]
        np.testing.assert_allclose(out[index], expected, rtol=0, atol=2e-6)
    # The new tokens are cached: they are what the next chunk sees.
    check_stored(cache, case.sequences, case.pages)


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_chunks_attend_like_plain_attention(heads: Heads, page_size: int) -> None:
    sequences = random_sequences(LENGTHS, heads)
    pages = place(LENGTHS, page_size, sum(SEGMENTS[page_size]))
    cache = make_cache(heads, page_size, SEGMENTS[page_size])
    chunks = [Chunk(index, 0, length) for index, length in enumerate(LENGTHS)]
    cache, out = prefill(cache, sequences, pages, chunks, 32, TABLE_PAGES[page_size])
    for index in ALL:
        np.testing.assert_allclose(out[index], reference(sequences[index]), rtol=0, atol=2e-6)
    check_stored(cache, sequences, pages)


def check_stored(cache: KVCache, sequences: list[Tokens], pages: list[list[int]]) -> None:
    for sequence, table in zip(sequences, pages, strict=True):
        _, key, value = sequence
        padded = np.array([[*table, *[0] * (8 - len(table))]])
        keys, values = map(np.asarray, _gather(cache, LAYER, padded, jnp.dtype("float32")))
        keys = keys[0].transpose(0, 3, 1, 2).reshape(-1, *key.shape[1:])
        values = values[0].transpose(0, 2, 1, 3).reshape(-1, *key.shape[1:])
        np.testing.assert_array_equal(keys[: sequence.size], key)
        np.testing.assert_array_equal(values[: sequence.size], value)


def test_attention_in_bfloat16() -> None:
    heads, page_size = Heads(2, 3), 4
    sequences = random_sequences(LENGTHS, heads, dtype=jnp.bfloat16)
    pages = place(LENGTHS, page_size, 32)
    cache = make_cache(heads, page_size, SEGMENTS[page_size], jnp.bfloat16)
    chunks = [Chunk(index, 0, length) for index, length in enumerate(LENGTHS)]
    _, chunk_out = prefill(cache, sequences, pages, chunks, 32, 8)
    cache = store(cache, [sequence.first(-1) for sequence in sequences], pages)
    _, token_out = decode(cache, sequences, pages, ALL)
    for index in ALL:
        assert chunk_out[index].dtype == token_out[index].dtype == jnp.bfloat16
        expected = reference(sequences[index])
        np.testing.assert_allclose(chunk_out[index].astype(float), expected, rtol=0, atol=0.05)
        np.testing.assert_allclose(token_out[index].astype(float), expected[-1], rtol=0, atol=0.05)


def test_large_scores_do_not_overflow() -> None:
    case = make_case(Heads(2, 3), 4)
    large = [sequence._replace(query=sequence.query * 1e4) for sequence in case.sequences]
    _, out = decode(case.cache, large, case.pages, ALL)
    for index in ALL:
        np.testing.assert_allclose(out[index], reference(large[index])[-1], rtol=0, atol=1e-4)


# --- laws of a decode row -------------------------------------------------------------------


@LAW_CASES
def test_a_token_does_not_depend_on_its_neighbours(heads: Heads, page_size: int) -> None:
    case = make_case(heads, page_size)
    _, expected = decode(case.cache, case.sequences, case.pages, ALL)
    others = random_sequences(LENGTHS, heads, seed=1)
    for row in ALL:
        mixed = [case.sequences[i] if i == row else others[i] for i in ALL]
        # Shorter, longer and other neighbours, in the same pages.
        mixed = [mixed[i] if i == row or i % 2 else mixed[i].first(1) for i in ALL]
        cache = store(
            make_cache(heads, page_size, SEGMENTS[page_size]),
            [s.first(-1) for s in mixed],
            case.pages,
        )
        _, out = decode(cache, mixed, case.pages, ALL)
        np.testing.assert_array_equal(out[row], expected[row])


@LAW_CASES
def test_a_token_does_not_depend_on_its_row_or_the_bucket(heads: Heads, page_size: int) -> None:
    case = make_case(heads, page_size)
    _, expected = decode(case.cache, case.sequences, case.pages, ALL)
    orders: list[list[int | None]] = [
        [5, 3, 1, 0, 2, 4],
        [None, 4, 2, None, 1, 0],
        [None, 4, None, 3, 2, None, 1, 0],
        [*ALL, *[None] * 10],
        [2, 3],
    ]
    orders += [[index] for index in ALL]
    orders += [[index, None] for index in ALL]
    for order in orders:
        _, out = decode(case.cache, case.sequences, case.pages, order)
        # Another number of rows is another executable, which may round its sums differently.
        atol = 0.0 if len(order) == len(ALL) else 2e-6
        for row, index in enumerate(order):
            if index is not None:
                np.testing.assert_allclose(out[row], expected[index], rtol=0, atol=atol)


@LAW_CASES
def test_a_token_does_not_depend_on_where_its_pages_lie(heads: Heads, page_size: int) -> None:
    case = make_case(heads, page_size)
    _, expected = decode(case.cache, case.sequences, case.pages, ALL)
    for placement in range(1, 4):
        moved = make_case(heads, page_size, placement=placement)
        _, out = decode(moved.cache, moved.sequences, moved.pages, ALL)
        np.testing.assert_array_equal(out, expected)


@LAW_CASES
def test_a_token_does_not_depend_on_the_segments(heads: Heads, page_size: int) -> None:
    usable = sum(SEGMENTS[page_size]) * 3 // 4
    first, *_ = SEGMENTS[page_size]
    case = make_case(heads, page_size, num_usable=usable)
    _, expected = decode(case.cache, case.sequences, case.pages, ALL)
    for segments in [(usable,), (1, 1, usable - 2, first, 40)]:
        other = make_case(heads, page_size, segments, num_usable=usable)
        count = int(np.searchsorted(np.cumsum(segments), usable)) + 1
        for num_segments in range(count, len(segments) + 1):
            _, out = decode(other.cache, other.sequences, other.pages, ALL, num_segments)
            np.testing.assert_array_equal(out, expected)


def test_pages_beyond_the_new_token_are_not_read() -> None:
    case = make_case(Heads(2, 3), 4)
    _, expected = decode(case.cache, case.sequences, case.pages, ALL)
    used = {page for table in case.pages for page in table}
    spare = [page for page in range(32) if page not in used]
    pages = [[*table, spare[i]] if i < 2 else table for i, table in enumerate(case.pages)]
    _, out = decode(case.cache, case.sequences, pages, ALL)
    np.testing.assert_array_equal(out, expected)


def test_padding_rows_write_nothing_and_give_numbers() -> None:
    case = make_case(Heads(2, 3), 4)
    cache, out = decode(case.cache, case.sequences, case.pages, [None] * 4)
    assert np.isfinite(out).all()
    for new, old in zip(jax.tree.leaves(cache), jax.tree.leaves(case.cache), strict=True):
        np.testing.assert_array_equal(new, old)


# --- laws of a prefill row ------------------------------------------------------------------


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


@LAW_CASES
def test_a_chunk_does_not_depend_on_its_neighbours(heads: Heads, page_size: int) -> None:
    _, expected = prefilled(heads, page_size, 32, [whole()])
    others = random_sequences(LENGTHS, heads, seed=1)
    sequences = random_sequences(LENGTHS, heads)
    for row in ALL:
        mixed = [sequences[i] if i == row else others[i] for i in ALL]
        chunks = [Chunk(i, 0, LENGTHS[i] if i == row else 1) for i in ALL]
        _, out = prefilled(heads, page_size, 32, [chunks], sequences=mixed)
        np.testing.assert_array_equal(out[row], expected[row])


@LAW_CASES
def test_a_chunk_does_not_depend_on_its_row_or_its_pages(heads: Heads, page_size: int) -> None:
    _, expected = prefilled(heads, page_size, 32, [whole()])
    for order in ([5, 3, 1, 0, 2, 4], [1, None, 3, None, 4, 2]):
        assert_same(prefilled(heads, page_size, 32, [whole(order)])[1], expected)
    assert_same(prefilled(heads, page_size, 32, [whole()], placement=1)[1], expected)
    more = (*SEGMENTS[page_size], 40)
    assert_same(prefilled(heads, page_size, 32, [whole()], segments=more)[1], expected)


@LAW_CASES
@pytest.mark.parametrize("columns", [4, 5, 16])
def test_chunked_equals_whole(heads: Heads, page_size: int, columns: int) -> None:
    """In one call, where rows see earlier rows of the same call, and over several calls."""
    cache, expected = prefilled(heads, page_size, 32, [whole()])
    at_once = [chunk for index in ALL for chunk in cut(index, columns)]
    longest = max(len(cut(index, columns)) for index in ALL)
    in_turn = [
        [cut(i, columns)[turn] if turn < len(cut(i, columns)) else Chunk(None) for i in ALL]
        for turn in range(longest)
    ]
    for calls in ([at_once], in_turn):
        other_cache, out = prefilled(heads, page_size, columns, calls)
        for new, old in zip(jax.tree.leaves(other_cache), jax.tree.leaves(cache), strict=True):
            np.testing.assert_array_equal(new, old)
        assert_close(out, expected)


@LAW_CASES
def test_a_chunk_in_another_bucket_is_the_same_but_for_rounding(
    heads: Heads, page_size: int
) -> None:
    _, expected = prefilled(heads, page_size, 32, [whole()])
    orders: list[list[int | None]] = [[*ALL, *[None] * 10], [3], [4, None]]
    for order in orders:
        assert_close(prefilled(heads, page_size, 32, [whole(order)])[1], expected)
    for factor in (2, 4):
        wider = TABLE_PAGES[page_size] * factor
        assert_close(prefilled(heads, page_size, 32, [whole()], table_pages=wider)[1], expected)


def test_a_chunk_split_over_rows_equals_the_same_rows_in_turn() -> None:
    """Rows of one call see each other's tokens: bitwise what two calls of that shape give."""
    heads, page_size, index = Heads(2, 3), 4, 4
    first, second = cut(index, 16)
    _, at_once = prefilled(heads, page_size, 16, [[first, second]])
    _, in_turn = prefilled(heads, page_size, 16, [[first, Chunk(None)], [Chunk(None), second]])
    assert_same(at_once, in_turn)


def test_padding_chunks_write_nothing_and_give_numbers() -> None:
    heads, page_size = Heads(2, 3), 4
    cache = make_cache(heads, page_size, SEGMENTS[page_size])
    sequences = random_sequences(LENGTHS, heads)
    new, out = prefill(cache, sequences, [], [Chunk(None)] * 3, 8, 8)
    assert np.isfinite(out).all()
    for after, before in zip(jax.tree.leaves(new), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_token_equals_a_chunk_of_one() -> None:
    case = make_case(Heads(2, 3), 4)
    _, token = decode(case.cache, case.sequences, case.pages, ALL)
    chunks = [Chunk(index, length - 1, length) for index, length in enumerate(LENGTHS)]
    _, chunk = prefill(case.cache, case.sequences, case.pages, chunks, 4, 8)
    np.testing.assert_allclose(np.concatenate(chunk), token, rtol=0, atol=2e-6)


# --- numbers that are none ------------------------------------------------------------------


def broken(sequence: Tokens) -> Tokens:
    """The same with a NaN, an infinity or both in every token's key and value."""
    key, value = sequence.key.copy(), sequence.value.copy()
    key[..., 0], value[..., 0] = np.nan, np.inf
    key[::2], value[::2] = np.inf, np.nan
    return sequence._replace(key=key, value=value)


@pytest.mark.parametrize("step", ["chunk", "token"])
def test_old_nans_in_a_page_do_not_reach_its_next_owner(step: str) -> None:
    heads, page_size = Heads(2, 3), 4
    sequences = random_sequences(LENGTHS, heads)
    pages = place(LENGTHS, page_size, 32)
    clean = make_cache(heads, page_size, SEGMENTS[page_size])
    every_page = [list(range(first, first + 16)) for first in (0, 16)]
    used = store(clean, [broken(one) for one in random_sequences([64, 64], heads)], every_page)

    def run(cache: KVCache) -> list[np.ndarray]:
        if step == "chunk":
            return prefill(cache, sequences, pages, whole(), 32, 8)[1]
        cache = store(cache, [sequence.first(-1) for sequence in sequences], pages)
        return decode(cache, sequences, pages, ALL)[1]

    for row, expected in zip(run(used), run(clean), strict=True):
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("step", ["chunk", "token"])
def test_a_row_with_broken_numbers_shows_them_and_its_neighbours_do_not(step: str) -> None:
    heads, page_size, bad = Heads(2, 3), 4, 3
    sequences = random_sequences(LENGTHS, heads)
    pages = place(LENGTHS, page_size, 32)

    def run(sequences: list[Tokens]) -> list[np.ndarray]:
        cache = make_cache(heads, page_size, SEGMENTS[page_size])
        if step == "chunk":
            return prefill(cache, sequences, pages, whole(), 32, 8)[1]
        cache = store(cache, [sequence.first(-1) for sequence in sequences], pages)
        return decode(cache, sequences, pages, ALL)[1]

    out = run([broken(one) if i == bad else one for i, one in enumerate(sequences)])
    assert np.isnan(out[bad]).all()
    for index, expected in enumerate(run(sequences)):
        if index != bad:
            np.testing.assert_array_equal(out[index], expected)
