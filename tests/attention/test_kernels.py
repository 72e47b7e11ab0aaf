"""Every kernel of attention against plain attention in float64.

Chunks of prompts and tokens that continue a row are the same to a kernel, but for the columns.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.core.interface import PLAIN, Scoring
from tests.attention.kernel_cases import (
    ALL,
    DIFFERENT_WAYS,
    HEADS,
    LATENTS,
    LENGTHS,
    OF_LATENTS,
    PAGE_SIZE,
    Case,
    check_close,
    in_turn,
    make_case,
    run_calls,
    run_step,
    whole,
)
from tests.paged_sequences import (
    Chunk,
    Heads,
    Way,
    check_stored,
    decode,
    random_sequences,
    reference,
    run_rows,
    store,
)

pytestmark = pytest.mark.usefixtures("precise")


def check_steps(way: Way, case: Case, scoring: Scoring = PLAIN) -> None:
    """Whole prompts, chunks behind cached prefixes, and single tokens."""
    expected = [reference(one, scoring) for one in case.sequences]
    cache, out = run_calls(case, [whole([*ALL, None])], 32, scoring=scoring)
    check_close(way, out, expected)
    check_stored(cache, case.sequences, case.pages)
    cache, out = run_calls(case, in_turn(5), 5, scoring=scoring)
    check_close(way, out, expected)
    check_stored(cache, case.sequences, case.pages)
    cache, tokens = decode(
        case.cache, case.sequences, case.pages, [*ALL, None, None], scoring=scoring
    )
    check_close(way, dict(enumerate(tokens[:-2])), [one[-1] for one in expected])
    check_stored(cache, case.sequences, case.pages)
    assert np.isfinite(tokens).all()


# Windows of one token, above a chunk (5) and below a page, above both, and above all; scores that
# are scaled or capped. (Plain scores in chunks behind cached prefixes: test_kernel_bits.)
@DIFFERENT_WAYS
@pytest.mark.parametrize(
    ("heads", "page_size", "scoring"),
    [
        (Heads(1, 1, 8), 8, Scoring(window=1)),
        (Heads(3, 2, 40), 16, Scoring(window=7, scale=0.1)),
        (HEADS, PAGE_SIZE, Scoring(window=200)),
        (Heads(1, 8, 64), 4, Scoring(softcap=2.0, window=9, scale=0.3)),
        pytest.param(Heads(1, 8, 64), 8, PLAIN, marks=pytest.mark.slow),
        pytest.param(Heads(3, 2, 40), 16, PLAIN, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_attention(way: Way, heads: Heads, page_size: int, scoring: Scoring) -> None:
    if page_size in way.sizes and (way.caps or scoring.softcap is None):
        check_steps(way, make_case(way, heads, page_size), scoring)


@DIFFERENT_WAYS
def test_values_may_be_the_first_numbers_of_keys(way: Way) -> None:
    if way.takes_latents:
        check_steps(way, make_case(way, LATENTS), OF_LATENTS)


def test_large_scores_do_not_overflow(way: Way) -> None:
    case = make_case(way)
    large = [one._replace(query=one.query * way.dtype(1e3)) for one in case.sequences]
    for step in ("chunk", "token"):
        out = run_step(step, case._replace(sequences=large))
        expected = [reference(one) for one in large]
        wanted = expected if step == "chunk" else [one[-1] for one in expected]
        # Two keys whose scores nearly tie share the weight as the last bits of these say.
        check_close(way, out, wanted, 2e-3 if way.dtype == np.float32 else 0.5)


def test_in_bfloat16(way: Way) -> None:
    """Where pages may be of it."""
    if way.kernel == "native":
        return
    sequences = random_sequences(LENGTHS, HEADS, dtype=jnp.bfloat16)
    case = make_case(way._replace(dtype=jnp.bfloat16))._replace(sequences=sequences)
    expected = [reference(one) for one in sequences]
    chunks = run_step("chunk", case)
    cache = store(case.cache, [one.first(-1) for one in sequences], case.pages)
    tokens = run_step("token", case._replace(cache=cache))
    assert chunks[0].dtype == tokens[0].dtype == jnp.bfloat16
    check_close(way, chunks, expected, 0.05)
    check_close(way, tokens, [one[-1] for one in expected], 0.05)


def test_a_token_equals_a_chunk_of_one(way: Way) -> None:
    case = make_case(way)
    token = run_step("token", case)
    chunks = [Chunk(index, length - 1, length) for index, length in enumerate(LENGTHS)]
    _, chunk = run_rows(case.cache, case.sequences, case.pages, chunks, 5)
    check_close(way, {index: one[0] for index, one in enumerate(chunk)}, token)
