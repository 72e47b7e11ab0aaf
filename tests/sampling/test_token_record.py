"""The log-probability record of sampled tokens, against a float64 reference that sorts."""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams, outputs_to_arrays
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.steps.executables import Executable
from folojax.steps.state import CallInputs, CallResults
from tests.sampling_rows import OFF, draw, make_rows, random_logits, reference_kept

ROWS: list[dict[str, Any]] = [
    {"temperature": 0.0, "top_p": 0.5, "top_k": 3},
    {"seed": 1},
    {"seed": 2, "temperature": 0.7, "top_k": 5},
    {"seed": 3, "temperature": 1.5, "top_p": 0.9},
    {"seed": 4, "min_p": 0.1},
    {"seed": 5, "top_k": 500, "top_p": 0.97, "min_p": 0.001},
    {"seed": 6, "temperature": 3.0},
    {"seed": 7, "temperature": 0.2, "top_p": 0.3},
]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def reference_record(logits: np.ndarray, row: dict[str, Any], token: int) -> dict[str, float]:
    """Of one token, in float64; a greedy row has temperature 1 and cuts nothing."""
    full = OFF | row
    if full["temperature"] == 0:
        full = OFF
    raw = log_softmax(logits.astype(np.float64))
    scaled = logits.astype(np.float64) / full["temperature"]
    tempered = log_softmax(scaled)
    kept = reference_kept(scaled, full["top_k"], full["top_p"], full["min_p"])
    assert kept[token]
    log_kept = np.log(np.exp(tempered[kept]).sum())
    return {
        "raw": raw[token],
        "tempered": tempered[token],
        "processed": log_softmax(scaled[kept])[np.flatnonzero(kept) == token][0],
        "log_kept": log_kept,
        "entropy": -(np.exp(raw) * raw).sum(),
        "rank": 1 + (logits > logits[token]).sum(),
    }


@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("needed", [SamplingClass.TRUNCATED, SamplingClass.EDITED])
def test_records_agree_with_float64(needed: SamplingClass, scale: float) -> None:
    logits = random_logits(8, seed=int(scale * 10), scale=scale)
    rows, spec = make_rows(*ROWS), SamplingSpec(needed, has_record=True)
    cut = 0
    for position in range(5):
        out = draw(logits, rows, jnp.full(8, position), spec)
        assert out.record is not None
        for i, row in enumerate(ROWS):
            token = int(out.tokens[i])
            expected = reference_record(np.asarray(logits[i]), row, token)
            found = {name: float(values[i]) for name, values in out.record._asdict().items()}
            assert found == pytest.approx(expected, abs=1e-5), f"row {i}, {row}"
            cut += expected["log_kept"] < -0.01
    assert cut >= 5  # some rows have lost mass


@pytest.mark.parametrize("needed", [SamplingClass.GREEDY, SamplingClass.RANDOM])
def test_classes_that_cut_nothing_keep_all(needed: SamplingClass) -> None:
    logits = random_logits(8)
    rows = [{"temperature": 0.0}] * 8
    if needed is SamplingClass.RANDOM:
        rows = [{"seed": i, "temperature": 0.5 + i} for i in range(8)]
    out = draw(logits, make_rows(*rows), jnp.arange(8), SamplingSpec(needed, has_record=True))
    assert out.record is not None
    np.testing.assert_array_equal(out.record.log_kept, np.zeros(8))
    np.testing.assert_array_equal(out.record.processed, out.record.tempered)
    for i, row in enumerate(rows):
        expected = reference_record(np.asarray(logits[i]), row, int(out.tokens[i]))
        assert float(out.record.tempered[i]) == pytest.approx(expected["tempered"], abs=1e-5)


def test_probabilities_of_a_small_vocabulary_sum_to_one() -> None:
    """Drawn until every token that is kept has come: exact sums, no estimate."""
    logits = jnp.array([[1.0, 0.5, 0.0, -0.5, -1.0, 2.0, -3.0, 0.2]])
    rows = make_rows({"temperature": 1.3, "top_p": 0.9, "seed": 3})
    spec = SamplingSpec(SamplingClass.TRUNCATED, has_record=True)
    positions = jnp.arange(400)

    @jax.jit
    def draw_all() -> Any:
        out = jax.lax.map(lambda position: draw(logits, rows, position[None], spec), positions)
        return out.tokens[:, 0], out.record

    tokens, record = draw_all()
    seen = {int(token): i for i, token in enumerate(tokens)}
    index = np.array(list(seen.values()))
    kept = reference_kept(np.asarray(logits[0]) / 1.3, 8, 0.9, 0.0)
    assert sorted(seen) == np.flatnonzero(kept).tolist()
    assert kept.sum() < 8  # something is cut
    assert np.exp(record.processed[index, 0]).sum() == pytest.approx(1, abs=1e-6)
    log_kept = np.log(np.exp(record.tempered[index, 0]).sum())
    assert float(record.log_kept[0, 0]) == pytest.approx(log_kept, abs=1e-6)


def test_a_record_changes_no_token_and_no_other_report() -> None:
    logits, rows = random_logits(8), make_rows(*ROWS)
    for needed in (SamplingClass.TRUNCATED, SamplingClass.EDITED):
        without = draw(logits, rows, jnp.arange(8), SamplingSpec(needed, 3))
        with_it = draw(logits, rows, jnp.arange(8), SamplingSpec(needed, 3, has_record=True))
        assert without.record is None
        assert with_it.record is not None
        np.testing.assert_array_equal(without.tokens, with_it.tokens)
        np.testing.assert_array_equal(with_it.logprobs, with_it.record.raw)
        np.testing.assert_array_equal(with_it.ranks, with_it.record.rank)


# --- in the engine ------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]


def test_requests_get_what_they_ask_for(letters_llm: LLM) -> None:
    params = [
        SamplingParams(n=2, seed=1, top_p=0.8, temperature=0.7, max_tokens=6, record=True),
        SamplingParams(seed=2, max_tokens=4),
    ]
    asked, not_asked = letters_llm.generate(PROMPTS, params, use_tqdm=False)
    assert not_asked.outputs[0].record is None
    for one in asked.outputs:
        assert one.record is not None
        assert len(one.record) == len(one.token_ids)
        assert one.cumulative_logprob == pytest.approx(sum(entry.raw for entry in one.record))
        for entry in one.record:
            assert entry.processed == pytest.approx(entry.tempered - entry.log_kept, abs=1e-6)
            assert entry.log_kept <= 0
            assert 0 <= entry.entropy <= np.log(128) + 1e-5
            assert entry.rank >= 1


def test_raw_records_are_the_scores_of_the_tokens(letters_llm: LLM) -> None:
    params = SamplingParams(seed=3, temperature=0.8, max_tokens=8, record=True)
    (output,) = letters_llm.generate(PROMPTS[:1], params, use_tqdm=False)
    one = output.outputs[0]
    (score,) = letters_llm.score(PROMPTS[:1], [one.token_ids], use_tqdm=False)
    assert one.record is not None
    np.testing.assert_allclose([entry.raw for entry in one.record], score.logprobs, atol=2e-5)
    assert [entry.rank for entry in one.record] == score.ranks


def test_without_records_no_executable_has_them(letters_llm: LLM) -> None:
    """What is not asked for is not compiled, and so costs nothing."""
    specs = []
    call = letters_llm.engine.runner.call

    def spy(one: Executable, inputs: CallInputs) -> CallResults:
        if one.spec is not None:
            specs.append(one.spec)
        return call(one, inputs)

    with mock.patch.object(letters_llm.engine.runner, "call", spy):
        letters_llm.generate(PROMPTS, SamplingParams(seed=1, max_tokens=3), use_tqdm=False)
    assert specs
    assert not any(spec.has_record for spec in specs)


# --- as arrays ----------------------------------------------------------------------------------


def test_arrays_hold_tokens_mask_and_record(letters_llm: LLM) -> None:
    params = [
        SamplingParams(n=2, seed=1, max_tokens=6, record=True),
        SamplingParams(seed=2, top_k=4, max_tokens=3, record=True),
    ]
    outputs = letters_llm.generate(PROMPTS, params, use_tqdm=False)
    arrays = outputs_to_arrays(outputs, pad_token_id=99, length=20)
    assert arrays.tokens.shape == arrays.mask.shape == (3, 20)
    np.testing.assert_array_equal(arrays.prompt, [0, 0, 1])
    samples = [(output, one) for output in outputs for one in output.outputs]
    assert arrays.record is not None
    for row, (output, one) in enumerate(samples):
        start, end = len(output.prompt_token_ids), arrays.length[row]
        assert arrays.tokens[row].tolist() == [
            *output.prompt_token_ids,
            *one.token_ids,
            *[99] * (20 - end),
        ]
        assert np.flatnonzero(arrays.mask[row]).tolist() == list(range(start, end))
        assert arrays.weights_version[row, start:end].tolist() == one.weights_versions
        assert (np.delete(arrays.weights_version[row], np.arange(start, end)) == -1).all()
        assert one.record is not None
        for name, array in arrays.record._asdict().items():
            expected = np.zeros(20, array.dtype)
            expected[start:end] = [getattr(entry, name) for entry in one.record]
            np.testing.assert_array_equal(array[row], expected, err_msg=name)


def test_arrays_without_records(letters_llm: LLM) -> None:
    params = [SamplingParams(max_tokens=3, seed=1, record=True), SamplingParams(max_tokens=5)]
    outputs = letters_llm.generate(PROMPTS, params, use_tqdm=False)
    arrays = outputs_to_arrays(outputs)
    assert arrays.record is None
    assert arrays.tokens.shape == (2, max(arrays.length))


def test_arrays_refuse_what_does_not_fit(letters_llm: LLM) -> None:
    outputs = letters_llm.generate(PROMPTS, SamplingParams(max_tokens=3), use_tqdm=False)
    with pytest.raises(ValueError, match=r"length is 4, but a sample has 9 tokens"):
        outputs_to_arrays([dataclasses.replace(outputs[1])], length=4)
    with pytest.raises(ValueError, match="outputs is empty"):
        outputs_to_arrays([])
