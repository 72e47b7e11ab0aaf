"""What a token's bits do not depend on, whichever kernel attends.

Broken numbers elsewhere, neighbours, rows, pages, chunks: in the programs that users run.
"""

import jax
import numpy as np
import pytest

from tests.attention.kernel_cases import (
    ALL,
    DIFFERENT_WAYS,
    HEADS,
    LATENTS,
    LENGTHS,
    NUM_PAGES,
    OF_LATENTS,
    PAGE_SIZE,
    Case,
    check_close,
    check_same,
    cut,
    in_turn,
    make_case,
    run_calls,
    run_step,
    whole,
)
from tests.paged_sequences import (
    Chunk,
    Tokens,
    Way,
    make_cache,
    random_sequences,
    reference,
    run_rows,
    store,
)

pytestmark = pytest.mark.usefixtures("optimised", "precise")

STEPS = pytest.mark.parametrize("step", ["chunk", "token"])


def broken(sequence: Tokens) -> Tokens:
    """The same with a NaN, an infinity or both in every token's key and value."""
    key, value = sequence.key.copy(), sequence.value.copy()
    key[..., 0], value[..., 0] = np.nan, np.inf
    key[::2], value[::2] = np.inf, np.nan
    return sequence._replace(key=key, value=value)


@STEPS
def test_old_nans_in_a_page_do_not_reach_its_next_owner(way: Way, step: str) -> None:
    """In every page of the pool, also those that tables are padded with."""
    case = make_case(way)
    clean = make_cache(way, HEADS, PAGE_SIZE, NUM_PAGES)
    every_page = [list(range(8)), list(range(8, 16))]
    old = [broken(one) for one in random_sequences([64, 64], HEADS, dtype=way.dtype)]
    used = store(clean, old, every_page)
    used = store(used, [one.first(-1) for one in case.sequences], case.pages)
    order = [*ALL[1:], None]
    check_same(run_step(step, case._replace(cache=used), order), run_step(step, case, order))


@STEPS
def test_a_row_with_broken_numbers_shows_them_and_its_neighbours_do_not(
    way: Way, step: str
) -> None:
    case, bad = make_case(way), 3
    expected = run_step(step, case)
    sequences = [broken(one) if i == bad else one for i, one in enumerate(case.sequences)]
    cache = store(case.cache, [one.first(-1) for one in sequences], case.pages)
    got = run_step(step, case._replace(sequences=sequences, cache=cache))
    assert np.isnan(got.pop(bad)).all()
    check_same(got, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_numbers_do_not_reach_earlier_tokens_of_their_row(way: Way, bad: float) -> None:
    """Others may share the pages of these."""
    case, row, token = make_case(way), 4, 13
    expected = run_step("chunk", case)
    one = case.sequences[row]
    key, value = one.key.copy(), one.value.copy()
    key[token, 0, 2], value[token, :, 3] = bad, bad
    sequences = [*case.sequences]
    sequences[row] = one._replace(key=key, value=value)
    got = run_step("chunk", case._replace(sequences=sequences))
    check_same({row: got[row][:token]}, {row: expected[row][:token]})
    assert np.isnan(got[row][token:]).any(axis=(1, 2)).all()


@DIFFERENT_WAYS
def test_latents_that_are_broken_are_told_by_the_rest_of_their_key(way: Way) -> None:
    """The token itself and those behind it see that, and no later owner of the page."""
    if not way.takes_latents:
        return
    case, row, token = make_case(way, LATENTS), 4, 13
    _, expected = run_calls(case, [whole()], 32, scoring=OF_LATENTS)
    key = case.sequences[row].key.copy()
    key[token, 0, 3] = np.inf
    sequences = [*case.sequences]
    sequences[row] = Tokens(sequences[row].query, key, key[..., :16])
    broken_case = case._replace(sequences=sequences)
    cache, got = run_calls(broken_case, [whole()], 32, scoring=OF_LATENTS)
    check_same({row: got[row][:token]}, {row: expected[row][:token]})
    assert np.isnan(got[row][token:]).any(axis=(1, 2)).all()
    # Of the page's next owner, what lies behind its tokens.
    pages = [[*case.pages[row]]] * len(ALL)
    lengths = [token if index == row else 0 for index in ALL]
    sequences = [case.sequences[row].first(token)] * len(ALL)
    chunks = [Chunk(row if n else None, 0, n) for n in lengths]
    _, out = run_rows(cache, sequences, pages, chunks, 32, scoring=OF_LATENTS)
    check_same({row: out[row]}, {row: expected[row][:token]})


@STEPS
def test_a_token_does_not_depend_on_its_neighbours(way: Way, step: str) -> None:
    case = make_case(way)
    expected = run_step(step, case)
    others = random_sequences(LENGTHS, HEADS, seed=1, dtype=way.dtype)
    for row in ALL:
        # Shorter, longer and other neighbours, in the same pages.
        mixed = [case.sequences[i] if i == row else others[i] for i in ALL]
        if step == "token":
            mixed = [mixed[i] if i == row or i % 2 else mixed[i].first(1) for i in ALL]
        cache = store(case.cache, [one.first(-1) for one in mixed], case.pages)
        out = run_step(step, Case(mixed, case.pages, cache))
        check_same({row: out[row]}, expected)


@STEPS
def test_a_token_does_not_depend_on_its_row_or_the_bucket(way: Way, step: str) -> None:
    case = make_case(way)
    expected = run_step(step, case)
    for order in ([5, 3, 1, 0, 2, 4], [None, 4, 2, None, 1, 0]):
        check_same(run_step(step, case, order), expected)
    # Another number of rows is another executable, which may round its sums differently.
    orders: list[list[int | None]] = [[*ALL, *[None] * 10], [2], [4]]
    for order in orders:
        check_close(way, run_step(step, case, order), expected)


def test_a_chunk_does_not_depend_on_the_width_of_its_table(way: Way) -> None:
    case = make_case(way)
    _, expected = run_calls(case, [whole()], 32)
    check_close(way, run_calls(case, [whole()], 32, table_pages=4)[1], expected)


@STEPS
def test_a_token_does_not_depend_on_where_its_pages_lie(way: Way, step: str) -> None:
    expected = run_step(step, make_case(way))
    for placement in range(1, 4):
        check_same(run_step(step, make_case(way, placement=placement)), expected)


@STEPS
def test_a_token_does_not_depend_on_the_size_of_the_pool(way: Way, step: str) -> None:
    small, large = make_case(way), make_case(way, num_pages=NUM_PAGES + 40)
    check_same(run_step(step, large), run_step(step, small))


def test_pages_beyond_the_new_token_are_not_read(way: Way) -> None:
    case = make_case(way)
    used = {page for table in case.pages for page in table}
    spare = [page for page in range(NUM_PAGES) if page not in used]
    pages = [[*table, spare[i]] if i < 2 else table for i, table in enumerate(case.pages)]
    check_same(run_step("token", case._replace(pages=pages)), run_step("token", case))


@STEPS
def test_padding_rows_write_nothing_and_give_numbers(way: Way, step: str) -> None:
    case = make_case(way)
    columns = 1 if step == "token" else 32
    new, out = run_rows(case.cache, case.sequences, [], [Chunk(None)] * len(ALL), columns)
    assert np.isfinite(out).all()
    for after, before in zip(jax.tree.leaves(new), jax.tree.leaves(case.cache), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("columns", [1, 5])
def test_chunked_equals_whole(way: Way, columns: int) -> None:
    """In one call, where rows see earlier rows of the same call, and over several calls."""
    case = make_case(way)
    cache, expected = run_calls(case, [whole()], 32)
    # A call sees what is cached before it or stands in it: nothing of the token that comes last.
    fresh = case._replace(cache=make_cache(way, HEADS, PAGE_SIZE, NUM_PAGES))
    at_once = [chunk for index in ALL for chunk in cut(index, columns)]
    for calls in ([at_once], in_turn(columns)):
        other_cache, out = run_calls(fresh, calls, columns)
        for new, old in zip(jax.tree.leaves(other_cache), jax.tree.leaves(cache), strict=True):
            np.testing.assert_array_equal(new, old)
        check_close(way, out, expected)


def test_a_chunk_split_over_rows_equals_the_same_rows_in_turn(way: Way) -> None:
    """Rows of one call see each other's tokens: bitwise what two calls of that shape give."""
    case = make_case(way)
    case = case._replace(cache=make_cache(way, HEADS, PAGE_SIZE, NUM_PAGES))
    first, second = cut(4, 16)
    _, at_once = run_calls(case, [[first, second]], 16)
    _, turned = run_calls(case, [[first, Chunk(None)], [Chunk(None), second]], 16)
    check_same(at_once, turned)


def test_many_rows_of_any_lengths_attend_like_plain_attention(way: Way) -> None:
    """In any order: some end pages before the others, two are empty, one has a single token."""
    rows, rng = 33, np.random.default_rng(33)
    lengths = [1, *rng.integers(1, 40, rows - 3).tolist()]
    case = make_case(way, num_pages=200, lengths=lengths)
    order: list[int | None] = [None, *range(rows - 2), None]
    rng.shuffle(order)
    expected = [reference(one)[-1] for one in case.sequences]
    check_close(way, run_step("token", case, order), expected)


def test_a_token_among_many_does_not_depend_on_how_long_its_neighbours_are(way: Way) -> None:
    """To the bit."""
    rows = 20
    case = make_case(way, num_pages=200, lengths=[33] * rows)
    expected = run_step("token", case, range(rows))
    rng = np.random.default_rng(0)
    for _ in range(3):
        kept = rng.random(rows) < 0.5
        mixed = [
            one
            if kept[row]
            else random_sequences([int(rng.integers(1, 33))], HEADS, dtype=way.dtype)[0]
            for row, one in enumerate(case.sequences)
        ]
        cache = store(case.cache, [one.first(-1) for one in mixed], case.pages)
        out = run_step("token", Case(mixed, case.pages, cache), range(rows))
        check_same({row: out[row] for row in np.flatnonzero(kept).tolist()}, expected)
