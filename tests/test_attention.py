"""What attention of chunks and of single tokens have in common: dtypes, and broken numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from folojax.kv_cache import KVCache

from folojax.models.platforms import tracing_for
from tests.paged_sequences import (
    ALL,
    LENGTHS,
    SEGMENTS,
    Chunk,
    Heads,
    Tokens,
    decode,
    make_cache,
    make_case,
    place,
    prefill,
    random_sequences,
    reference,
    store,
    whole,
)


@pytest.mark.parametrize("page_size", [4, 8])
def test_attention_in_bfloat16(page_size: int) -> None:
    heads = Heads(2, 3)
    sequences = random_sequences(LENGTHS, heads, dtype=jnp.bfloat16)
    pages = place(LENGTHS, page_size, sum(SEGMENTS[page_size]))
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


@pytest.mark.parametrize("page_size", [4, 8])
def test_a_token_equals_a_chunk_of_one(page_size: int) -> None:
    case = make_case(Heads(2, 3), page_size)
    _, token = decode(case.cache, case.sequences, case.pages, ALL)
    chunks = [Chunk(index, length - 1, length) for index, length in enumerate(LENGTHS)]
    _, chunk = prefill(case.cache, case.sequences, case.pages, chunks, 4, 8)
    np.testing.assert_allclose(np.concatenate(chunk), token, rtol=0, atol=2e-6)


def broken(sequence: Tokens) -> Tokens:
    """The same with a NaN, an infinity or both in every token's key and value."""
    key, value = sequence.key.copy(), sequence.value.copy()
    key[..., 0], value[..., 0] = np.nan, np.inf
    key[::2], value[::2] = np.inf, np.nan
    return sequence._replace(key=key, value=value)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
@pytest.mark.parametrize("page_size", [4, 8])
@pytest.mark.parametrize("step", ["chunk", "token"])
def test_old_nans_in_a_page_do_not_reach_its_next_owner(
    step: str, page_size: int, name: str
) -> None:
    """In the layout of each platform."""
    with tracing_for(name):
        check_old_nans(step, page_size)


def check_old_nans(step: str, page_size: int) -> None:
    heads = Heads(2, 3)
    sequences = random_sequences(LENGTHS, heads)
    pages = place(LENGTHS, page_size, sum(SEGMENTS[page_size]))
    clean = make_cache(heads, page_size, SEGMENTS[page_size])
    half = 64 // page_size
    every_page = [list(range(first, first + half)) for first in (0, half)]
    used = store(clean, [broken(one) for one in random_sequences([64, 64], heads)], every_page)

    def run(cache: KVCache) -> list[np.ndarray]:
        if step == "chunk":
            return prefill(cache, sequences, pages, whole(), 32, 8)[1]
        cache = store(cache, [sequence.first(-1) for sequence in sequences], pages)
        return decode(cache, sequences, pages, ALL)[1]

    for row, expected in zip(run(used), run(clean), strict=True):
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("page_size", [4, 8])
@pytest.mark.parametrize("step", ["chunk", "token"])
def test_a_row_with_broken_numbers_shows_them_and_its_neighbours_do_not(
    step: str, page_size: int
) -> None:
    heads, bad = Heads(2, 3), 3
    sequences = random_sequences(LENGTHS, heads)
    pages = place(LENGTHS, page_size, sum(SEGMENTS[page_size]))

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
