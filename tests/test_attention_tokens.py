"""Attention of single tokens over pages against plain attention, and the laws of a decode row."""

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
    Heads,
    check_stored,
    decode,
    make_cache,
    make_case,
    place,
    random_sequences,
    reference,
    store,
)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
@pytest.mark.parametrize("page_size", [4, 8, 16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_tokens_attend_like_plain_attention(heads: Heads, page_size: int, name: str) -> None:
    """In the layout of each platform."""
    with tracing_for(name):
        check_tokens(heads, page_size)


def check_tokens(heads: Heads, page_size: int) -> None:
    case = make_case(heads, page_size)
    cache, out = decode(case.cache, case.sequences, case.pages, [*ALL, None, None])
    for index in ALL:
        expected = reference(case.sequences[index])[-1]
        np.testing.assert_allclose(out[index], expected, rtol=0, atol=2e-6)
    # The new tokens are cached: they are what the next chunk sees.
    check_stored(cache, case.sequences, case.pages)


def test_large_scores_do_not_overflow() -> None:
    case = make_case(Heads(2, 3), 4)
    large = [sequence._replace(query=sequence.query * 1e4) for sequence in case.sequences]
    _, out = decode(case.cache, large, case.pages, ALL)
    for index in ALL:
        np.testing.assert_allclose(out[index], reference(large[index])[-1], rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("rows", [9, 16, 20, 33])
def test_many_rows_of_any_lengths_attend_like_plain_attention(rows: int) -> None:
    """More than are read together, in any order: some end pages before the others, some are empty.

    The rows between are padding, and one has a single token.
    """
    heads, page_size = Heads(2, 3), 4
    rng = np.random.default_rng(rows)
    lengths = [1, *rng.integers(1, 40, rows - 3).tolist()]
    sequences = random_sequences(lengths, heads)
    pages = place(lengths, page_size, 400)
    cache = make_cache(heads, page_size, (400,))
    cache = store(cache, [sequence.first(-1) for sequence in sequences], pages)
    order: list[int | None] = [None, *range(rows - 2), None]
    rng.shuffle(order)
    _, out = decode(cache, sequences, pages, order)
    for row, index in enumerate(order):
        if index is not None:
            expected = reference(sequences[index])[-1]
            np.testing.assert_allclose(out[row], expected, rtol=0, atol=2e-6)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("rows", [12, 20])
def test_a_token_among_many_does_not_depend_on_how_long_its_neighbours_are(rows: int) -> None:
    """To the bit: whether its pages are read with all rows or with a few."""
    heads, page_size = Heads(2, 3), 4
    sequences = random_sequences([33] * rows, heads)
    pages = place([33] * rows, page_size, 400)
    cache = store(make_cache(heads, page_size, (400,)), [one.first(-1) for one in sequences], pages)
    _, expected = decode(cache, sequences, pages, range(rows))
    rng = np.random.default_rng(0)
    for _ in range(3):
        kept = rng.random(rows) < 0.5
        mixed = [
            one if kept[row] else random_sequences([int(rng.integers(1, 33))], heads)[0]
            for row, one in enumerate(sequences)
        ]
        shorter = store(cache, [one.first(-1) for one in mixed], pages)
        _, out = decode(shorter, mixed, pages, range(rows))
        for row in np.flatnonzero(kept):
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


@pytest.mark.parametrize(("heads", "page_size"), [(Heads(2, 3), 4), (Heads(3, 1), 16)], ids=str)
def test_a_token_does_not_depend_on_the_segments(heads: Heads, page_size: int) -> None:
    """Where there are several: a CPU's cache has one."""
    with tracing_for("gpu"):
        check_segments(heads, page_size)


def check_segments(heads: Heads, page_size: int) -> None:
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


@LAW_CASES
def test_a_token_does_not_depend_on_the_size_of_the_pool(heads: Heads, page_size: int) -> None:
    usable = sum(SEGMENTS[page_size])
    small = make_case(heads, page_size, (usable,))
    large = make_case(heads, page_size, (usable + 40,), num_usable=usable)
    _, expected = decode(small.cache, small.sequences, small.pages, ALL)
    _, out = decode(large.cache, large.sequences, large.pages, ALL)
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
