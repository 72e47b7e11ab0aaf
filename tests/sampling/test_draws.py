"""Draws without a sort, against the sorted reference: in support, in distribution, in ties."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from folojax.sampling import sampler as sampling
from folojax.sampling.rows import SamplingRows
from folojax.sampling.sampler import SamplingClass, SamplingSpec, draws
from tests.sampling_rows import (
    OFF,
    V,
    draw_many,
    make_rows,
    pick,
    random_logits,
    reference_kept,
    reference_probability,
)

pytestmark = pytest.mark.usefixtures("optimised")

TRUNCATED = SamplingSpec(SamplingClass.TRUNCATED)


@jax.jit
def kept(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Which tokens have a weight, by the threshold: [B, V]."""
    blocks = draws.to_blocks(logits)
    support = sampling._support(blocks, blocks.max(axis=(1, 2)), rows, logits.shape[1], TRUNCATED)
    inside = sampling._kept(support, rows, draws.argmax(blocks), TRUNCATED)
    return inside.reshape(len(logits), -1)[:, : logits.shape[1]] > -jnp.inf


# --- the distribution -----------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 20},
    {"top_k": 1, "temperature": 1.5},
    {"top_k": 200, "temperature": 1.5},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"top_p": 0.95, "temperature": 0.7},
    {"min_p": 0.05},
    {"min_p": 0.2, "temperature": 1.8},
    {"top_k": 30, "top_p": 0.8},
    {"top_k": 300, "min_p": 0.01},
    {"top_p": 0.9, "min_p": 0.03, "temperature": 1.2},
    {"temperature": 0.8, "top_k": 100, "top_p": 0.9, "min_p": 0.02},
]


def check_frequencies(tokens: np.ndarray, probability: np.ndarray, name: str) -> None:
    """Chi-square at p > 1e-4; tokens outside of the support never occur."""
    counts = np.bincount(tokens, minlength=len(probability))
    assert not counts[probability == 0].any(), name
    expected = probability * len(tokens)
    is_rare = expected < 5  # too few for a chi-square each: one bin for all
    bins = np.append(expected[~is_rare], expected[is_rare].sum())
    observed = np.append(counts[~is_rare], counts[is_rare].sum())
    if (bins > 0).sum() > 1:
        test = stats.chisquare(observed[bins > 0], bins[bins > 0])
        assert test.pvalue > 1e-4, (name, test)


def test_20000_draws_of_every_setting_follow_the_reference() -> None:
    logits = np.asarray(random_logits(1, seed=1, scale=1.5))[0]
    rows = make_rows(*[row | {"seed": 1000 + i} for i, row in enumerate(SETTINGS)])
    batch = jnp.asarray(np.tile(logits, (len(SETTINGS), 1)))
    tokens = np.asarray(draw_many(batch, rows, jnp.arange(20_000), TRUNCATED))
    for row, setting in enumerate(SETTINGS):
        check_frequencies(tokens[:, row], reference_probability(logits, setting), str(setting))


def test_20000_draws_from_tokens_of_equal_weight() -> None:
    """Ties over block borders: every token as likely as the next, and never one that is cut."""
    logits = np.full((3, V), -np.inf, np.float32)
    logits[0, 120:140] = 3.0  # over the border of two blocks; half of them is the nucleus
    logits[1] = 0.0
    logits[2, ::10] = 1.0
    logits[2, 5::100] = 2.0  # top_k = 11 ties with all of the others
    rows = make_rows({"seed": 1, "top_p": 0.5}, {"seed": 2}, {"seed": 3, "top_k": 11})
    tokens = np.asarray(draw_many(jnp.asarray(logits), rows, jnp.arange(20_000), TRUNCATED))
    for row in range(3):
        probability = np.exp(logits[row].astype(np.float64))
        if row == 0:
            probability[130:] = 0.0
        check_frequencies(tokens[:, row], probability / probability.sum(), f"row {row}")


# --- the support ----------------------------------------------------------------------------


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


def test_the_support_is_that_of_the_sorted_reference() -> None:
    logits, params = truncation_cases()
    rows = make_rows(*[row | {"seed": i} for i, row in enumerate(params)])
    expected = np.array(
        [
            reference_kept(x, p["top_k"], p["top_p"], p["min_p"])
            for x, p in zip(logits, params, strict=True)
        ]
    )
    wrong = np.flatnonzero((np.asarray(kept(jnp.asarray(logits), rows)) != expected).any(axis=1))
    assert not wrong.size, [params[i] for i in wrong]

    # Draws accept or reject without knowing the threshold: they must mean the same one.
    tokens = np.asarray(draw_many(jnp.asarray(logits), rows, jnp.arange(30), TRUNCATED))
    is_inside = np.take_along_axis(expected, tokens.T, axis=1)
    wrong = np.flatnonzero(~is_inside.all(axis=1))
    assert not wrong.size, [params[i] for i in wrong]
    # Ties at the threshold are kept: on the grid, top_k = 1 keeps every token at the maximum.
    assert expected[: len(params) // 7][3::4].sum(axis=1).max() > 1


def test_every_token_of_a_small_nucleus_is_drawn_and_no_other() -> None:
    """Adversarial logits: the last token inside and the first outside are a rounding apart."""
    near = np.nextafter(np.float32(1), np.float32(0))
    cases: list[tuple[list[float], dict[str, Any], set[int]]] = [
        ([1.0, near, near, 0.0], {"top_k": 3}, {0, 1, 2}),
        ([1.0, near, 0.0, 0.0], {"top_k": 1}, {0}),
        ([0.0, 0.0, -1e30, -np.inf], {}, {0, 1}),
        ([3e38, 3e38, 2.9e38, 0.0], {"top_p": 0.9}, {0, 1}),
        ([-3e38, -3e38, -np.inf, -np.inf], {"min_p": 0.5}, {0, 1}),
        ([1e-40, 1e-40, -1e-3, -1.0], {"top_k": 4, "min_p": 0.9}, {0, 1, 2}),
        ([0.0, 0.0, 0.0, -1.0], {"top_p": 1e-30}, {0}),
        ([0.0, 0.0, 0.0, -1.0], {"top_p": 0.4}, {0, 1}),
        ([1.0, 1.0, 2.0, 1.0], {"top_p": 0.5}, {0, 2}),
        ([2.0, 1.0, 0.0, -1.0], {"top_p": 1 - 2**-24, "temperature": 3.0}, {0, 1, 2, 3}),
        ([2.0, 1.9, 1.8, -1.0], {"temperature": 1e-5}, {0}),
        ([2.0, -1.9, -1.8, -2.0], {"temperature": 1e38}, {0, 1, 2, 3}),
    ]
    logits = np.full((len(cases), V), -np.inf, np.float32)
    for row, (values, _, _) in enumerate(cases):
        logits[row, [3, 130, 131, 999]] = values
    rows = make_rows(*[params | {"seed": i} for i, (_, params, _) in enumerate(cases)])
    tokens = np.asarray(draw_many(jnp.asarray(logits), rows, jnp.arange(200), TRUNCATED))
    ids = np.array([3, 130, 131, 999])
    for row, (_, params, expected) in enumerate(cases):
        assert set(tokens[:, row].tolist()) == set(ids[list(expected)].tolist()), params


def test_a_neighbour_leaves_the_support() -> None:
    logits, params = truncation_cases()
    scaled, rows = jnp.asarray(logits), make_rows(*params)
    some = np.arange(0, len(params), 7)
    np.testing.assert_array_equal(
        kept(scaled[some], pick(rows, some)), np.asarray(kept(scaled, rows))[some]
    )


@pytest.mark.parametrize("top_k", [500, V])
@pytest.mark.parametrize("top_p", [0.0, 1e-30, 1 - 2**-24])
def test_a_top_p_at_the_end_of_its_range_keeps_the_likeliest(top_k: int, top_p: float) -> None:
    # 0 is what a top_p below float32's range becomes; the other end may exceed a rounded sum.
    logits = random_logits(16, scale=0.1)
    rows = make_rows(*[{"top_k": top_k, "top_p": top_p, "seed": i} for i in range(16)])
    inside = np.asarray(kept(logits, rows))
    tokens = np.asarray(draw_many(logits, rows, jnp.arange(5), TRUNCATED))
    if top_p < 0.5:
        np.testing.assert_array_equal(inside, np.asarray(logits == logits.max(1, keepdims=True)))
        assert (tokens == np.asarray(logits).argmax(axis=1)).all()
    else:
        assert (inside.sum(axis=1) >= top_k - 2).all()


def test_truncation_with_fewer_finite_logits_than_top_k() -> None:
    logits = np.full((3, V), -np.inf, np.float32)
    logits[:, :100] = np.random.default_rng(0).normal(size=(3, 100))
    params = [(500, 1.0), (500, 0.9), (50, 0.9)]
    rows = make_rows(*[{"top_k": top_k, "top_p": top_p} for top_k, top_p in params])
    inside = np.asarray(kept(jnp.asarray(logits), rows))
    assert not inside[:, 100:].any()
    for row, given in enumerate(params):
        np.testing.assert_array_equal(
            inside[row, :100], reference_kept(logits[row], *given, 0.0)[:100]
        )


def test_a_vocabulary_smaller_than_a_block() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    rows = make_rows({"top_k": 3}, {"top_k": 9}, {"top_k": 1})
    inside = np.asarray(kept(jnp.asarray(logits), rows))
    np.testing.assert_array_equal(inside.sum(axis=1), [3, 7, 1])
    tokens = np.asarray(draw_many(jnp.asarray(logits), rows, jnp.arange(100), TRUNCATED))
    assert [len(set(row)) for row in tokens.T.tolist()] == [3, 7, 1]


# --- ties at the end of the nucleus ---------------------------------------------------------


def documented_rule(probability: np.ndarray, top_p: float) -> np.ndarray:
    """The tokens that vLLM and transformers say they keep.

    Of tokens sorted by probability, ascending, those go whose sum does not exceed 1 - p; the
    likeliest always stays. Of equals, the lower id counts as the likelier here.
    """
    ids = np.arange(len(probability))
    order = np.lexsort((-ids, probability))
    is_gone = np.cumsum(probability[order]) <= 1 - top_p
    is_gone[-1] = False
    kept = np.ones(len(probability), bool)
    kept[order[is_gone]] = False
    return kept


@pytest.mark.parametrize(
    ("probability", "top_p", "expected"),
    [
        ([0.4, 0.3, 0.3], 0.6, {0, 1}),
        ([0.3, 0.3, 0.4], 0.6, {0, 2}),
        ([0.3, 0.4, 0.3], 0.75, {0, 1, 2}),
        ([0.25, 0.25, 0.25, 0.25], 0.5 - 1e-3, {0, 1}),
        ([0.25, 0.25, 0.25, 0.25], 0.5 + 1e-3, {0, 1, 2}),
        ([0.1, 0.5, 0.1, 0.1, 0.1, 0.1], 0.55, {0, 1}),
        ([0.1, 0.5, 0.1, 0.1, 0.1, 0.1], 0.75, {0, 1, 2, 3}),
        ([0.5, 0.3, 0.15, 0.05], 0.6, {0, 1}),
        ([0.5, 0.5], 1e-6, {0}),
        ([0.5, 0.5], 1.0, {0, 1}),
    ],
)
def test_the_smallest_set_of_equals_has_the_lowest_ids(
    probability: list[float], top_p: float, expected: set[int]
) -> None:
    assert set(np.flatnonzero(documented_rule(np.array(probability), top_p))) == expected
    for places in (np.arange(len(probability)), np.arange(len(probability)) * 130):
        logits = np.full((1, V), -np.inf, np.float32)
        logits[0, places] = np.log(np.array(probability, np.float32))
        rows = make_rows({"top_p": top_p, "seed": 4})
        inside = np.flatnonzero(np.asarray(kept(jnp.asarray(logits), rows))[0])
        assert set(inside) == set(places[list(expected)])
        tokens = np.asarray(draw_many(jnp.asarray(logits), rows, jnp.arange(300), TRUNCATED))
        assert set(tokens[:, 0]) == set(inside)


def test_nuclei_of_tied_logits_are_those_of_the_documented_rule() -> None:
    """As in C2C 21: the token that crosses the mass is in, and no equal of it that need not be."""
    rng = np.random.default_rng(3)
    logits = rng.integers(-3, 4, (60, V)).astype(np.float32)
    top_p = rng.uniform(0.01, 0.99, 60).astype(np.float32)
    rows = make_rows(*[{"top_p": float(p), "seed": i} for i, p in enumerate(top_p)])
    inside = np.asarray(kept(jnp.asarray(logits), rows))
    tokens = np.asarray(draw_many(jnp.asarray(logits), rows, jnp.arange(50), TRUNCATED))
    for row, (x, p) in enumerate(zip(logits.astype(np.float64), top_p, strict=True)):
        expected = documented_rule(np.exp(x) / np.exp(x).sum(), float(p))
        # Where a sum ends within rounding of the mass, one more or less is as right.
        assert (inside[row] != expected).sum() <= 1
        assert inside[row][tokens[:, row]].all()


def test_draws_among_tied_tokens_follow_the_smallest_set() -> None:
    probability = np.array([0.4, 0.3, 0.3])
    logits = np.full((2, V), -np.inf, np.float32)
    logits[0, :3] = logits[1, [5, 200, 900]] = np.log(probability)
    rows = make_rows({"top_p": 0.6, "seed": 1}, {"top_p": 0.6, "seed": 2})
    tokens = np.asarray(draw_many(jnp.asarray(logits), rows, jnp.arange(20_000), TRUNCATED))
    for row, ids in enumerate(([0, 1, 2], [5, 200, 900])):
        expected = np.zeros(V)
        expected[ids] = [4 / 7, 3 / 7, 0]
        check_frequencies(tokens[:, row], expected, str(row))


def test_top_k_keeps_equals_of_the_last_as_vllm_does() -> None:
    logits = np.full((1, V), -np.inf, np.float32)
    logits[0, :4] = [1.0, 0.0, 0.0, -1.0]
    inside = np.asarray(kept(jnp.asarray(logits), make_rows({"top_k": 2})))
    assert set(np.flatnonzero(inside[0])) == {0, 1, 2}
    inside = np.asarray(kept(jnp.asarray(logits), make_rows({"top_k": 2, "top_p": 0.6})))
    assert set(np.flatnonzero(inside[0])) == {0, 1}


# --- the largest ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 8, 200])
def test_top_k_is_the_sorted_start_and_the_lowest_id_wins_ties(count: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, V)).astype(np.float32)
    logits[10:] = np.round(logits[10:])
    values, ids = jax.jit(draws.top_k, static_argnums=1)(
        draws.to_blocks(jnp.asarray(logits)), count
    )
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


def test_kth_largest_on_every_path() -> None:
    logits = np.asarray(random_logits(4)).copy()
    logits[3] = np.round(logits[3])
    find = jax.jit(draws.kth_largest)
    blocks = draws.to_blocks(jnp.asarray(logits))
    for k in ([1, 2, 63, 64], [65, 1, 999, 30], [10_000] * 4, [10_000, 3, 10_000, 500]):
        expected = [np.sort(x)[-n] if n < V else -np.inf for x, n in zip(logits, k, strict=True)]
        np.testing.assert_array_equal(find(blocks, jnp.array(k)), expected)


def test_argmax_of_nan_is_in_range() -> None:
    x = jnp.array([[jnp.nan, 1.0], [2.0, 1.0], [1.0, 2.0], [-jnp.inf, -jnp.inf]])
    np.testing.assert_array_equal(draws.argmax(draws.to_blocks(x)), [0, 0, 1, 0])


def test_reference_of_defaults_is_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(reference_probability(logits, OFF), [0.5, 0.25, 0.25])


def test_the_support_is_that_of_transformers() -> None:
    """Their warpers one after the other, min-p before the others as here."""
    import torch
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    no_ids: Any = torch.zeros((1, 0), dtype=torch.long)
    logits = np.asarray(random_logits(len(SETTINGS), seed=3))
    inside = np.asarray(kept(jnp.asarray(logits), make_rows(*SETTINGS)))
    for row, setting in enumerate(SETTINGS):
        full = OFF | setting
        if full["temperature"] == 0:
            continue
        scores = torch.tensor(logits[row : row + 1])
        scores = TemperatureLogitsWarper(full["temperature"])(no_ids, scores)
        if full["min_p"] > 0:
            scores = MinPLogitsWarper(full["min_p"])(no_ids, scores)
        scores = TopKLogitsWarper(full["top_k"])(no_ids, scores)
        if full["top_p"] < 1:
            scores = TopPLogitsWarper(full["top_p"])(no_ids, scores)
        np.testing.assert_array_equal(inside[row], torch.isfinite(scores)[0].numpy(), str(setting))
