"""The sampler: every law of a row first, then its distribution, then rows that cannot be drawn."""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from folojax import sampling
from folojax.sampling import SamplingClass, SamplingSpec, truncate
from folojax.state import SamplingRows, StepOutput

V = 1000
X = 4
PARAMS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": V,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 0,
    "banned": (),
}


def make_rows(*params: dict[str, Any]) -> SamplingRows:
    """Rows of parameters; what a row does not name is off."""
    full = [PARAMS | row for row in params]

    def array(name: str, dtype: Any) -> jax.Array:
        return jnp.array([row[name] for row in full], dtype)

    seeds = [(row["seed"] >> 32, row["seed"] & 0xFFFFFFFF) for row in full]
    banned = [(*row["banned"], *[V] * (X - len(row["banned"]))) for row in full]
    return SamplingRows(
        temperature=array("temperature", jnp.float32),
        top_k=array("top_k", jnp.int32),
        top_p=array("top_p", jnp.float32),
        min_p=array("min_p", jnp.float32),
        seed=jnp.array(seeds, jnp.uint32),
        banned=jnp.array(banned, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=3)
def draw(
    logits: jax.Array, rows: SamplingRows, positions: jax.Array, needed: SamplingClass
) -> StepOutput:
    return sampling.sample(logits, rows, positions, SamplingSpec(needed))


@functools.partial(jax.jit, static_argnums=3)
def draw_many(
    logits: jax.Array, rows: SamplingRows, positions: jax.Array, needed: SamplingClass
) -> jax.Array:
    """Tokens of every row at each of the positions: [positions, B]."""

    def at(position: jax.Array) -> jax.Array:
        position = jnp.broadcast_to(position, logits.shape[:1])
        return sampling.sample(logits, rows, position, SamplingSpec(needed)).tokens

    return jax.lax.map(at, positions)


def random_logits(num_rows: int, seed: int = 0, scale: float = 2.0) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(seed).normal(scale=scale, size=(num_rows, V)).astype(np.float32)
    )


def pick(rows: Any, index: Sequence[int] | np.ndarray) -> Any:
    """The given rows of arrays, parameters or outputs."""
    return jax.tree.map(lambda x: x[np.array(index)], rows)


# One batch with all kinds of rows: greedy, plain, each truncation, all at once, bans.
MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "temperature": 0.7, "top_k": 5},
    {"seed": 3, "temperature": 1.5, "top_p": 0.9},
    {"seed": 4, "min_p": 0.1},
    {"seed": 5, "top_k": 500, "top_p": 0.97, "min_p": 0.001},
    {"seed": 6, "banned": (0, 1, 2, 3)},
    {"temperature": 0.0, "banned": (7,), "top_k": 500},
]


# --- greedy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", list(SamplingClass))
def test_greedy_is_argmax_and_the_lowest_id_wins_a_tie(needed: SamplingClass) -> None:
    rng = np.random.default_rng(0)
    # Few distinct values, so that almost every row's maximum is tied; also signed zeros.
    logits = rng.integers(-3, 4, size=(64, V)).astype(np.float32)
    logits[32:] = rng.normal(size=(32, V))
    logits[0] = -0.0
    logits[0, V // 2] = 0.0
    rows = make_rows(*[{"temperature": 0.0}] * 64)
    out = draw(jnp.asarray(logits), rows, jnp.arange(64), needed)
    np.testing.assert_array_equal(out.tokens, np.argmax(logits, axis=1))
    assert np.asarray(out.is_valid).all()


@pytest.mark.parametrize("needed", [SamplingClass.TRUNCATED, SamplingClass.EDITED])
def test_a_greedy_row_in_a_mixed_batch_is_what_it_is_alone(needed: SamplingClass) -> None:
    # Large logits, where a division by a tiny temperature would overflow, and a near tie,
    # which a division would close or turn round.
    logits = np.asarray(random_logits(8)).copy()
    logits[0, 10], logits[0, 20] = np.float32(3e38), np.nextafter(np.float32(3e38), np.float32(0))
    logits[7] = -logits[0]
    rows = make_rows(*[{**row, "banned": ()} for row in MIXED])
    positions = jnp.arange(8)
    out = draw(jnp.asarray(logits), rows, positions, needed)
    alone = [0, 7]
    expected = draw(
        jnp.asarray(logits[alone]), pick(rows, alone), positions[:2], SamplingClass.GREEDY
    )
    chex.assert_trees_all_equal(pick(out, alone), expected)
    np.testing.assert_array_equal(expected.tokens, logits[alone].argmax(axis=1))


# --- truncation -----------------------------------------------------------------------------


def reference_kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens one row keeps, in float64 and by sorting."""
    x = logits.astype(np.float64)
    kept = np.exp(x - x.max()) >= min_p
    if top_k < V:
        kept &= x >= np.sort(x)[-top_k]
    if top_p < 1:
        mass = np.where(kept, np.exp(x - x.max()), 0.0)
        order = np.argsort(-x, kind="stable")
        reached = np.cumsum(mass[order]) >= top_p * mass.sum()
        kept &= x >= x[order[np.argmax(reached)]]
    return kept


def truncation_cases() -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Hundreds of rows: every mix of settings on flat, usual, peaked and tied logits."""
    rng = np.random.default_rng(0)
    logits, params = [], []
    for top_k in (1, 2, 63, 64, 65, 500, V):
        for top_p in (1e-6, 0.1, 0.5, 0.9, 0.99, 1.0):
            for min_p in (0.0, 0.01, 0.3, 1.0):
                for kind in range(4):
                    x = rng.normal(scale=(0.01, 2.0, 8.0, 2.0)[kind], size=V)
                    # Ties: a grid of 0.3, on which neither 0.01 nor 0.3 of the maximum lies.
                    logits.append(np.round(x / 0.3) * 0.3 if kind == 3 else x)
                    params.append({"top_k": top_k, "top_p": top_p, "min_p": min_p})
    return np.array(logits, np.float32), params


def test_truncation_is_exact_on_both_paths() -> None:
    logits, params = truncation_cases()
    rows, scaled = make_rows(*params), jnp.asarray(logits)
    candidates = jax.jit(sampling._threshold_of_candidates)(scaled, rows)
    bisection = np.asarray(jax.jit(sampling._threshold_by_bisection)(scaled, rows))
    threshold = np.asarray(jax.jit(truncate)(scaled, rows))
    is_settled = np.asarray(candidates.is_settled)
    assert is_settled.sum() > 100
    assert (~is_settled).sum() > 100

    kept = np.array(
        [
            reference_kept(x, p["top_k"], p["top_p"], p["min_p"])
            for x, p in zip(logits, params, strict=True)
        ]
    )
    wrong = np.flatnonzero(((logits >= threshold[:, None]) != kept).any(axis=1))
    assert not wrong.size, [params[i] for i in wrong]
    wrong = np.flatnonzero(((logits >= bisection[:, None]) != kept).any(axis=1))
    assert not wrong.size, [params[i] for i in wrong]
    np.testing.assert_array_equal(
        np.asarray(candidates.threshold)[is_settled], bisection[is_settled]
    )
    is_off = [(p["top_k"], p["top_p"], p["min_p"]) == (V, 1.0, 0.0) for p in params]
    assert (threshold[is_off] == -np.inf).all()
    # Ties at the threshold are kept: on the grid, top_k = 1 keeps every token at the maximum.
    assert kept[: len(params) // 7][3::4].sum(axis=1).max() > 1


def test_a_row_that_needs_bisection_leaves_the_thresholds_of_others() -> None:
    logits, params = truncation_cases()
    scaled, rows = jnp.asarray(logits), make_rows(*params)
    is_settled = np.asarray(jax.jit(sampling._threshold_of_candidates)(scaled, rows).is_settled)
    settled = np.flatnonzero(is_settled)
    alone = jax.jit(truncate)(scaled[settled], pick(rows, settled))
    np.testing.assert_array_equal(jax.jit(truncate)(scaled, rows)[settled], alone)


@pytest.mark.parametrize("top_k", [500, V])
@pytest.mark.parametrize("top_p", [0.0, 1e-30, 1 - 2**-24])
def test_a_top_p_at_the_end_of_its_range_keeps_the_likeliest(top_k: int, top_p: float) -> None:
    # 0 is what a top_p below float32's range becomes; the other end may exceed a rounded sum.
    logits = random_logits(16, scale=0.1)
    rows = make_rows(*[{"top_k": top_k, "top_p": top_p}] * 16)
    for threshold in (truncate, sampling._threshold_by_bisection):
        kept = np.asarray(logits) >= np.asarray(jax.jit(threshold)(logits, rows))[:, None]
        if top_p < 0.5:
            np.testing.assert_array_equal(kept, np.asarray(logits == logits.max(1, keepdims=True)))
        else:
            assert (kept.sum(axis=1) >= top_k - 2).all()


def test_truncation_with_fewer_finite_logits_than_top_k() -> None:
    logits = np.full((3, V), -np.inf, np.float32)
    logits[:, :100] = np.random.default_rng(0).normal(size=(3, 100))
    rows = make_rows({"top_k": 500}, {"top_k": 500, "top_p": 0.9}, {"top_k": 50, "top_p": 0.9})
    kept = logits >= np.asarray(truncate(jnp.asarray(logits), rows))[:, None]
    for row, params in enumerate([(500, 1.0), (500, 0.9), (50, 0.9)]):
        expected = reference_kept(logits[row], *params, 0.0)
        np.testing.assert_array_equal(kept[row, :100], expected[:100])


def test_truncation_of_a_vocabulary_smaller_than_the_candidates() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 7)).astype(np.float32)
    rows = make_rows({"top_k": 3, "top_p": 0.9}, {"top_k": 9})
    threshold = np.asarray(truncate(jnp.asarray(logits), rows))
    assert threshold[1] == -np.inf
    assert 1 <= (logits[0] >= threshold[0]).sum() <= 3


# --- the distribution -----------------------------------------------------------------------

DISTRIBUTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 20},
    {"top_k": 200, "temperature": 1.5},
    {"top_p": 0.6},
    {"min_p": 0.05},
    {"temperature": 0.8, "top_k": 100, "top_p": 0.9, "min_p": 0.02},
]


def test_draws_follow_the_distribution_and_never_leave_its_support() -> None:
    num_draws = 4000
    logits = np.asarray(random_logits(1, seed=1, scale=1.5))[0]
    params = [row | {"seed": 1000 + i} for i, row in enumerate(DISTRIBUTIONS)]
    batch = jnp.asarray(np.tile(logits, (len(params), 1)))
    tokens = np.asarray(
        draw_many(batch, make_rows(*params), jnp.arange(num_draws), SamplingClass.TRUNCATED)
    )
    for row, given in enumerate(params):
        full = PARAMS | given
        scaled = logits.astype(np.float64) / full["temperature"]
        kept = reference_kept(scaled, full["top_k"], full["top_p"], full["min_p"])
        probability = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
        probability /= probability.sum()
        counts = np.bincount(tokens[:, row], minlength=V)
        assert not counts[~kept].any(), given
        expected = probability * num_draws
        is_rare = expected < 5  # too few for a chi-square each: one bin for all
        bins = np.append(expected[~is_rare], expected[is_rare].sum())
        observed = np.append(counts[~is_rare], counts[is_rare].sum())
        assert (bins > 0).sum() >= 10, given
        test = stats.chisquare(observed[bins > 0], bins[bins > 0])
        assert test.pvalue > 1e-4, (given, test)


# --- rows are independent -------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits, rows, position = random_logits(8), make_rows(*MIXED), jnp.arange(8) + 30
    expected = draw(logits, rows, position, SamplingClass.EDITED)
    strange: list[dict[str, Any]] = [
        {"temperature": 0.0, "banned": (1, 2)},
        {"seed": 77, "top_k": 1},
        {"seed": 78, "top_k": 999, "top_p": 0.999},
    ]
    for row in range(8):
        others = np.arange(8) != row
        for shift, params in enumerate(strange):
            changed = make_rows(*[MIXED[i] if i == row else params for i in range(8)])
            other = jnp.where(others[:, None], random_logits(8, seed=9 + shift, scale=9.0), logits)
            out = draw(other, changed, jnp.where(others, 5, position), SamplingClass.EDITED)
            chex.assert_trees_all_equal(pick(out, [row]), pick(expected, [row]))


def test_a_row_is_the_same_in_every_batch_size_and_place() -> None:
    logits, rows, position = random_logits(8), make_rows(*MIXED), jnp.arange(8) + 30
    expected = draw(logits, rows, position, SamplingClass.EDITED)

    def check(index: Sequence[int]) -> None:
        out = draw(*pick((logits, rows, position), index), SamplingClass.EDITED)
        chex.assert_trees_all_equal(pick(out, range(len(index))), pick(expected, index))

    for row in range(8):
        check([row])
        check([row, (row + 3) % 8])
    check([3, 1, 4, 0, 5, 2, 7, 6])


def test_a_row_is_the_same_in_every_class_that_serves_it() -> None:
    logits, position = random_logits(8), jnp.arange(8)
    plain = make_rows(*[{"seed": i, "temperature": 0.2 * i} for i in range(8)])
    cut = make_rows(*[{"seed": i, "top_k": 3**i, "top_p": 0.1 + 0.1 * i} for i in range(8)])
    out = [draw(logits, plain, position, needed) for needed in list(SamplingClass)[1:]]
    chex.assert_trees_all_equal(*out)
    out = [draw(logits, cut, position, needed) for needed in list(SamplingClass)[2:]]
    chex.assert_trees_all_equal(*out)


# --- randomness -----------------------------------------------------------------------------


def tokens_of_seeds(*seeds: int) -> np.ndarray:
    """Draws from a uniform distribution at 50 positions: a row for each seed."""
    flat = jnp.zeros((len(seeds), V))
    rows = make_rows(*[{"seed": seed} for seed in seeds])
    return np.asarray(draw_many(flat, rows, jnp.arange(50), SamplingClass.RANDOM)).T


def test_a_seed_and_a_position_give_the_token() -> None:
    tokens = tokens_of_seeds(5, 5, 6)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert (tokens[0] == tokens[2]).mean() < 0.1
    assert len(set(tokens[0].tolist())) > 40  # of 50: another position is another draw


def test_all_64_bits_of_a_seed_count() -> None:
    seeds = [5, 5 + (1 << 32), 5 << 32, 5 + (1 << 63), 5 ^ 1, 2**64 - 1]
    tokens = tokens_of_seeds(*seeds)
    for i in range(len(seeds)):
        for j in range(i):
            assert (tokens[i] == tokens[j]).mean() < 0.1, (seeds[i], seeds[j])


# --- bans and log-probabilities -------------------------------------------------------------


def test_banned_ids_are_never_sampled() -> None:
    logits = np.zeros((3, V), np.float32)
    logits[:, [11, 22, 33, 44]] = 10.0, 9.0, 8.0, 7.0
    banned = (11, 22)
    rows = make_rows(
        {"temperature": 0.0, "banned": banned},
        {"seed": 1, "banned": banned},
        {"seed": 2, "banned": banned, "top_k": 2},
    )
    tokens = np.asarray(draw_many(jnp.asarray(logits), rows, jnp.arange(500), SamplingClass.EDITED))
    assert not np.isin(tokens, banned).any()
    assert (tokens[:, 0] == 33).all()
    assert 33 in tokens[:, 1]
    # The places of banned tokens are given to the next ones.
    assert set(tokens[:, 2].tolist()) == {33, 44}


def test_bans_reach_the_first_and_the_last_id_and_padding_bans_none() -> None:
    best = {0: 8.0, V - 1: 9.0, V - 2: 7.0}
    logits = jnp.zeros((2, V)).at[:, np.array(list(best))].set(np.array(list(best.values())))
    rows = make_rows({"temperature": 0.0, "banned": (0, V - 1)}, {"temperature": 0.0})
    out = draw(logits, rows, jnp.arange(2), SamplingClass.EDITED)
    np.testing.assert_array_equal(out.tokens, [V - 2, V - 1])


@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("needed", list(SamplingClass))
def test_logprob_is_of_the_raw_distribution(needed: SamplingClass, scale: float) -> None:
    logits = random_logits(8, scale=scale) + 50.0
    out = draw(logits, make_rows(*MIXED), jnp.arange(8), needed)
    x = np.asarray(logits, np.float64)
    log_mass = np.log(np.exp(x - x.max(axis=1, keepdims=True)).sum(axis=1)) + x.max(axis=1)
    expected = x[np.arange(8), np.asarray(out.tokens)] - log_mass
    np.testing.assert_allclose(out.logprobs, expected, rtol=0, atol=1e-5 * max(1.0, scale / 2))


# --- rows that cannot be drawn --------------------------------------------------------------


@pytest.mark.parametrize("needed", list(SamplingClass))
@pytest.mark.parametrize("kind", ["nan", "all nan", "all -inf", "inf", "all inf"])
def test_an_unusable_row_is_reported_and_leaves_the_others(
    kind: str, needed: SamplingClass
) -> None:
    good = random_logits(8)
    params = [{**row, "banned": ()} for row in MIXED]
    rows, position = make_rows(*params), jnp.arange(8)
    expected = draw(good, rows, position, needed)
    assert np.asarray(expected.is_valid).all()
    value = np.float32(kind.removeprefix("all "))
    place: Any = slice(None) if kind.startswith("all") else 123
    for bad_row in (0, 2, 5):
        out = draw(good.at[bad_row, place].set(value), rows, position, needed)
        others = [row for row in range(8) if row != bad_row]
        assert np.asarray(out.is_valid).tolist() == [row != bad_row for row in range(8)]
        assert 0 <= int(out.tokens[bad_row]) < V
        chex.assert_trees_all_equal(pick(out, others), pick(expected, others))


def test_a_row_with_every_finite_logit_banned_is_unusable() -> None:
    logits = jnp.full((2, V), -jnp.inf).at[:, 3].set(1.0)
    rows = make_rows({"banned": (3,)}, {"banned": (4,)})
    out = draw(logits, rows, jnp.arange(2), SamplingClass.EDITED)
    np.testing.assert_array_equal(out.is_valid, [False, True])
    assert int(out.tokens[1]) == 3


def test_a_single_finite_logit_is_always_drawn() -> None:
    logits = jnp.full((8, V), -jnp.inf).at[:, 3].set(-70.0)
    rows = make_rows(*[{**row, "banned": (5,)} for row in MIXED])
    out = draw(logits, rows, jnp.arange(8), SamplingClass.EDITED)
    np.testing.assert_array_equal(out.tokens, jnp.full(8, 3))
    np.testing.assert_array_equal(out.logprobs, jnp.zeros(8))
    assert out.is_valid.all()


def test_a_top_k_beyond_the_vocabulary_is_off() -> None:
    logits, position = random_logits(2), jnp.arange(2)
    beyond = make_rows({"seed": 1, "top_k": V + 1}, {"seed": 2, "top_k": 2**31 - 1})
    off = make_rows({"seed": 1}, {"seed": 2})
    out = [draw(logits, rows, position, SamplingClass.TRUNCATED) for rows in (beyond, off)]
    chex.assert_trees_all_equal(*out)


def test_argmax_of_nan_is_in_range() -> None:
    x = jnp.array([[jnp.nan, 1.0], [2.0, 1.0], [1.0, 2.0], [-jnp.inf, -jnp.inf]])
    np.testing.assert_array_equal(sampling.argmax(x), [1, 0, 1, 0])
