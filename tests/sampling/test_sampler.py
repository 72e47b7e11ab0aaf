"""The sampler: the laws of a row first, then what is reported, then rows that cannot be drawn."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.sampling import sampler as sampling
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from tests.sampling_rows import (
    OFF,
    V,
    draw,
    draw_many,
    make_rows,
    pick,
    random_logits,
    reference_probability,
)

SPECS = [SamplingSpec(needed) for needed in SamplingClass]
TRUNCATED = SamplingSpec(SamplingClass.TRUNCATED)
EDITED = SamplingSpec(SamplingClass.EDITED, num_logprobs=3, is_processed=True)

# One batch with all kinds of rows: greedy, plain, each truncation, all at once.
MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "temperature": 0.7, "top_k": 5},
    {"seed": 3, "temperature": 1.5, "top_p": 0.9},
    {"seed": 4, "min_p": 0.1},
    {"seed": 5, "top_k": 500, "top_p": 0.97, "min_p": 0.001},
    {"seed": 6, "top_k": 50},
    {"temperature": 0.0, "top_k": 500},
]


# --- greedy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.needed.name)
def test_greedy_is_argmax_and_the_lowest_id_wins_a_tie(spec: SamplingSpec) -> None:
    rng = np.random.default_rng(0)
    # Few distinct values, so that almost every row's maximum is tied; also signed zeros.
    logits = rng.integers(-3, 4, size=(64, V)).astype(np.float32)
    logits[32:] = rng.normal(size=(32, V))
    logits[0] = -0.0
    logits[0, V // 2] = 0.0
    rows = make_rows(*[{"temperature": 0.0}] * 8)
    for some in np.split(logits, 8):
        out = draw(jnp.asarray(some), rows, jnp.arange(8), spec)
        np.testing.assert_array_equal(out.tokens, np.argmax(some, axis=1))
        assert np.asarray(out.is_valid).all()


def test_a_greedy_row_in_a_mixed_batch_is_what_it_is_alone() -> None:
    # Large logits, where a division by a tiny temperature would overflow, and a near tie,
    # which a division would close or turn round.
    logits = np.asarray(random_logits(8)).copy()
    logits[0, 10], logits[0, 20] = np.float32(3e38), np.nextafter(np.float32(3e38), np.float32(0))
    logits[7] = -logits[0]
    rows, positions, alone = make_rows(*MIXED), jnp.arange(8), [0, 7]
    greedy = SamplingSpec(SamplingClass.GREEDY)
    expected = draw(jnp.asarray(logits[alone]), pick(rows, alone), positions[:2], greedy)
    np.testing.assert_array_equal(expected.tokens, logits[alone].argmax(axis=1))
    for needed in (SamplingClass.TRUNCATED, SamplingClass.EDITED):
        out = draw(jnp.asarray(logits), rows, positions, SamplingSpec(needed))
        chex.assert_trees_all_equal(pick(out, alone), expected)


# --- rows are independent -------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits, rows, position = random_logits(8), make_rows(*MIXED), jnp.arange(8) + 30
    expected = draw(logits, rows, position, EDITED)
    strange: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"seed": 77, "top_k": 1},
        {"seed": 78, "top_k": 999, "top_p": 0.999},
        {"seed": 79, "top_p": 1e-6, "temperature": 9.0},
    ]
    for row in range(8):
        others = np.arange(8) != row
        for shift, params in enumerate(strange):
            changed = make_rows(*[MIXED[i] if i == row else params for i in range(8)])
            other = jnp.where(others[:, None], random_logits(8, seed=9 + shift, scale=9.0), logits)
            out = draw(other, changed, jnp.where(others, 5, position), EDITED)
            chex.assert_trees_all_equal(pick(out, [row]), pick(expected, [row]))


def test_a_row_is_the_same_in_every_batch_size_and_place() -> None:
    logits, rows, position = random_logits(8), make_rows(*MIXED), jnp.arange(8) + 30
    expected = draw(logits, rows, position, TRUNCATED)

    def check(index: Sequence[int]) -> None:
        out = draw(*pick((logits, rows, position), index), TRUNCATED)
        chex.assert_trees_all_equal(pick(out, range(len(index))), pick(expected, index))

    for row in range(8):
        check([row])
        check([row, (row + 3) % 8])
    check([3, 1, 4, 0, 5, 2, 7, 6])


def test_a_row_is_the_same_in_every_class_that_serves_it() -> None:
    logits, position = random_logits(8), jnp.arange(8)
    plain = make_rows(*[{"seed": i, "temperature": 0.2 * i} for i in range(8)])
    cut = make_rows(*[{"seed": i, "top_k": 3**i, "top_p": 0.1 + 0.1 * i} for i in range(8)])
    chex.assert_trees_all_equal(*[draw(logits, plain, position, spec) for spec in SPECS[1:]])
    chex.assert_trees_all_equal(*[draw(logits, cut, position, spec) for spec in SPECS[2:]])


def test_what_is_reported_changes_no_token() -> None:
    logits, rows, position = random_logits(8), make_rows(*MIXED), jnp.arange(8) + 30
    expected = draw(logits, rows, position, TRUNCATED).tokens
    np.testing.assert_array_equal(draw(logits, rows, position, EDITED).tokens, expected)


def test_values_of_parameters_compile_nothing() -> None:
    logits = random_logits(8)
    traced = chex.assert_max_traces(sampling.sample, n=1)
    step = jax.jit(traced, static_argnums=3)
    for params in (MIXED, MIXED[::-1], [{"top_k": 999, "top_p": 0.1, "seed": 2**60}] * 8):
        step(logits, make_rows(*params), jnp.arange(8), TRUNCATED)


# --- randomness -----------------------------------------------------------------------------


def tokens_of_seeds(*seeds: int) -> np.ndarray:
    """Draws from a uniform distribution at 50 positions: a row for each seed."""
    flat = jnp.zeros((len(seeds), V))
    rows = make_rows(*[{"seed": seed} for seed in seeds])
    return np.asarray(draw_many(flat, rows, jnp.arange(50), SPECS[SamplingClass.RANDOM])).T


def test_a_seed_and_a_position_give_the_token() -> None:
    tokens = tokens_of_seeds(5, 5, 6, 7, 8, 9)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert (tokens[0] == tokens[2]).mean() < 0.1
    assert len(set(tokens[0].tolist())) > 40  # of 50: another position is another draw


def test_all_64_bits_of_a_seed_count() -> None:
    seeds = [5, 5 + (1 << 32), 5 << 32, 5 + (1 << 63), 5 ^ 1, 2**64 - 1]
    tokens = tokens_of_seeds(*seeds)
    for i in range(len(seeds)):
        for j in range(i):
            assert (tokens[i] == tokens[j]).mean() < 0.1, (seeds[i], seeds[j])


# --- log-probabilities ----------------------------------------------------------------------


def reference_logprobs(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of rows in float64."""
    x = logits.astype(np.float64)
    top = x.max(axis=1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(axis=1, keepdims=True))


def check_report(out: Any, expected: np.ndarray, atol: float) -> None:
    """What is reported of each row, against the log-probabilities of all tokens."""
    token = np.asarray(out.tokens)[:, None]
    chosen = np.take_along_axis(expected, token, axis=1)
    np.testing.assert_allclose(out.logprobs, chosen[:, 0], rtol=0, atol=atol)
    index = np.arange(expected.shape[1])[None, :]
    is_before = (expected > chosen) | ((expected == chosen) & (index < token))
    np.testing.assert_array_equal(out.ranks, 1 + is_before.sum(axis=1))
    count = out.top_tokens.shape[1]
    order = np.argsort(-expected, axis=1, kind="stable")[:, :count]
    top = np.take_along_axis(expected, order, axis=1)
    np.testing.assert_allclose(out.top_logprobs, top, rtol=0, atol=atol)
    # Ids of tokens without probability are in no order.
    is_finite = np.isfinite(top)
    np.testing.assert_array_equal(np.asarray(out.top_tokens)[is_finite], order[is_finite])


@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("needed", list(SamplingClass))
def test_raw_logprobs_are_those_of_the_model(needed: SamplingClass, scale: float) -> None:
    logits = random_logits(8, scale=scale) + 50.0
    out = draw(logits, make_rows(*MIXED), jnp.arange(8), SamplingSpec(needed, num_logprobs=3))
    check_report(out, reference_logprobs(np.asarray(logits)), 1e-5 * max(1.0, scale / 2))


@pytest.mark.parametrize("needed", list(SamplingClass))
def test_processed_logprobs_are_of_what_is_drawn_from(needed: SamplingClass) -> None:
    logits = random_logits(8)
    params = [row | {"temperature": row.get("temperature", 1.0)} for row in MIXED]
    if needed < SamplingClass.TRUNCATED:
        params = [
            OFF | {"temperature": row["temperature"], "seed": i} for i, row in enumerate(params)
        ]
    if needed == SamplingClass.GREEDY:
        params = [{"temperature": 0.0}] * 8
    spec = SamplingSpec(needed, num_logprobs=3, is_processed=True)
    out = draw(logits, make_rows(*params), jnp.arange(8), spec)
    # A greedy row's are of its logits, not of the single token that it takes.
    asked = [{} if row["temperature"] == 0 else row for row in params]
    probability = [
        reference_probability(np.asarray(x), p) for x, p in zip(logits, asked, strict=True)
    ]
    with np.errstate(divide="ignore"):
        check_report(out, np.log(np.array(probability)), 1e-5)


def test_ranks_count_ties_by_id_and_nothing_is_reported_unasked() -> None:
    logits = jnp.zeros((8, V)).at[:, 500].set(1.0)
    tokens = jnp.array([500, 0, 999, 501, 499, 1, 2, 3])
    _, ranks, top_tokens, _ = jax.jit(sampling.token_logprobs, static_argnums=2)(logits, tokens, 4)
    np.testing.assert_array_equal(ranks, [1, 2, 1000, 502, 501, 3, 4, 5])
    np.testing.assert_array_equal(top_tokens, [[500, 0, 1, 2]] * 8)
    out = draw(logits, make_rows(*MIXED), jnp.arange(8), TRUNCATED)
    assert out.top_tokens.shape == out.top_logprobs.shape == (8, 0)
    np.testing.assert_array_equal(out.ranks, [0] * 8)


# --- rows that cannot be drawn, tokens that must not be -------------------------------------


@pytest.mark.parametrize("needed", list(SamplingClass))
def test_padding_of_the_vocabulary_is_never_sampled(needed: SamplingClass) -> None:
    logits = np.asarray(random_logits(8)).copy()
    logits[:, 900:] += 20.0
    spec = SamplingSpec(needed, num_tokens=900)
    rows = make_rows(*[row | {"temperature": 0.0} for row in MIXED])
    if needed > SamplingClass.GREEDY:
        rows = make_rows(*MIXED)
    expected = logits[[0, 7], :900].argmax(axis=1)
    for position in range(20):
        tokens = draw(jnp.asarray(logits), rows, jnp.full(8, position), spec).tokens
        assert (tokens < 900).all()
        np.testing.assert_array_equal(tokens[np.array([0, 7])], expected)


@pytest.mark.parametrize("needed", list(SamplingClass))
@pytest.mark.parametrize("kind", ["nan", "all nan", "all -inf", "inf", "all inf"])
def test_an_unusable_row_is_reported_and_leaves_the_others(
    kind: str, needed: SamplingClass
) -> None:
    good, spec = random_logits(8), SamplingSpec(needed)
    rows, position = make_rows(*MIXED), jnp.arange(8)
    expected = draw(good, rows, position, spec)
    assert np.asarray(expected.is_valid).all()
    value = np.float32(kind.removeprefix("all "))
    place: Any = slice(None) if kind.startswith("all") else 123
    for bad_row in (0, 2, 5):
        out = draw(good.at[bad_row, place].set(value), rows, position, spec)
        others = [row for row in range(8) if row != bad_row]
        assert np.asarray(out.is_valid).tolist() == [row != bad_row for row in range(8)]
        assert 0 <= int(out.tokens[bad_row]) < V
        chex.assert_trees_all_equal(pick(out, others), pick(expected, others))


def test_a_row_with_finite_logits_in_the_padding_alone_is_unusable() -> None:
    logits = jnp.full((8, V), -jnp.inf).at[:, 950].set(1.0).at[1, 3].set(-5.0)
    spec = SamplingSpec(SamplingClass.TRUNCATED, num_tokens=900)
    out = draw(logits, make_rows(*MIXED), jnp.arange(8), spec)
    np.testing.assert_array_equal(out.is_valid, np.arange(8) == 1)
    assert int(out.tokens[1]) == 3


def test_a_single_finite_logit_is_always_drawn() -> None:
    logits = jnp.full((8, V), -jnp.inf).at[:, 3].set(-70.0)
    out = draw(logits, make_rows(*MIXED), jnp.arange(8), TRUNCATED)
    np.testing.assert_array_equal(out.tokens, [3] * 8)
    np.testing.assert_array_equal(out.logprobs, [0.0] * 8)
    assert out.is_valid.all()


def test_a_top_k_beyond_the_vocabulary_is_off() -> None:
    logits, position = random_logits(8), jnp.arange(8)
    beyond = make_rows(*[{"seed": i, "top_k": (V + 1, 2**31 - 1)[i % 2]} for i in range(8)])
    off = make_rows(*[{"seed": i} for i in range(8)])
    chex.assert_trees_all_equal(
        *[draw(logits, rows, position, TRUNCATED) for rows in (beyond, off)]
    )
