"""Attention of chunks over pages against plain attention, and the laws of a prefill row."""

import jax
import numpy as np
import pytest

from folojax.models.platforms import tracing_for
from tests.paged_sequences import (
    ALL,
    HEADS,
    LAW_CASES,
    LENGTHS,
    SEGMENTS,
    TABLE_PAGES,
    Chunk,
    Heads,
    assert_close,
    assert_same,
    check_stored,
    cut,
    make_cache,
    place,
    prefill,
    prefilled,
    random_sequences,
    reference,
    whole,
)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
@pytest.mark.parametrize("page_size", [4, 8, 16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_chunks_attend_like_plain_attention(heads: Heads, page_size: int, name: str) -> None:
    """In the layout of each platform."""
    with tracing_for(name):
        check_chunks(heads, page_size)


def check_chunks(heads: Heads, page_size: int) -> None:
    sequences = random_sequences(LENGTHS, heads)
    pages = place(LENGTHS, page_size, sum(SEGMENTS[page_size]))
    cache = make_cache(heads, page_size, SEGMENTS[page_size])
    chunks = [Chunk(index, 0, length) for index, length in enumerate(LENGTHS)]
    cache, out = prefill(cache, sequences, pages, chunks, 32, TABLE_PAGES[page_size])
    for index in ALL:
        np.testing.assert_allclose(out[index], reference(sequences[index]), rtol=0, atol=2e-6)
    check_stored(cache, sequences, pages)


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
    *first, last = SEGMENTS[page_size]
    more = (*first, last + 40)
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
