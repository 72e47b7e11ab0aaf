"""The user's edits of activations: their effect, and that nobody else feels them."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, ActivationEdit, RequestOutput
from folojax.steps.layers import StepExtras
from tests import dense
from tests.reference import TINY_LIMITS, save_tiny, streams
from tests.user_functions import (
    EDITS,
    KINDS,
    PROMPTS,
    facts,
    generate,
    make_llm,
    params,
    steer,
)


@pytest.fixture(scope="module")
def llm(tiny_model: tuple) -> LLM:
    return make_llm(tiny_model)


def check_same(found: RequestOutput, expected: RequestOutput, is_to_the_bit: bool) -> None:
    """Steps with edits of activations have programs of their own, which may round otherwise."""
    if is_to_the_bit:
        assert facts(found) == facts(expected)
    one, other = found.outputs[0], expected.outputs[0]
    assert one.token_ids == other.token_ids
    assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)
    assert (one.logprobs is None) == (other.logprobs is None)
    for entry, wanted in zip(one.logprobs or [], other.logprobs or [], strict=True):
        assert [*entry] == [*wanted]
        for token, mine in entry.items():
            assert mine.logprob == pytest.approx(wanted[token].logprob, abs=1e-5)


@functools.partial(jax.jit, static_argnames=("module", "edit"))
def next_token(module: Any, weights: Any, tokens: Any, last: Any, edit: ActivationEdit) -> Any:
    size = len(tokens)
    extras, is_on = StepExtras((edit,)), jnp.ones((size, 1), bool)
    hidden, *_ = dense.layers(weights, tokens, extras, is_on, model=module)
    return jnp.argmax(module.apply({"params": weights}, hidden, method="logits")[last])


def reference_greedy(model: tuple, prompt: list[int], count: int, edit: ActivationEdit) -> Any:
    """Greedy tokens of the edited model by dense attention, one sequence at a time."""
    tokens = np.zeros(64, int)
    tokens[: len(prompt)] = prompt
    size = len(prompt) + count
    for last in range(len(prompt) - 1, size - 1):
        tokens[last + 1] = next_token(*model, tokens, last, edit)
    return tokens[len(prompt) : size].tolist()


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_an_edit_changes_prompt_and_output(
    tiny_model: tuple, llm: LLM, edit: ActivationEdit, is_deterministic: bool
) -> None:
    if is_deterministic:
        llm = make_llm(tiny_model, deterministic=True)
    asked = params(temperature=0, activation_edits=[edit.name])
    before = facts(generate(llm, [params(temperature=0)] * 4)[0])
    outputs = generate(llm, [asked] * 4)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.outputs[0].token_ids == reference_greedy(tiny_model, prompt, 14, edit)
        assert output.num_cached_tokens == 0
    assert outputs[0].outputs[0].token_ids != before[0]
    # And what it has computed is not found by others.
    after = facts(generate(llm, [params(temperature=0)] * 4)[0])
    assert after[0] == before[0]
    assert after[1] == pytest.approx(before[1], abs=1e-4)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_neighbours_of_an_edited_request_stay_what_they_are(
    tiny_model: tuple, is_deterministic: bool
) -> None:
    options = {"deterministic": is_deterministic, "enable_prefix_caching": False}
    plain = LLM(tiny_model, **TINY_LIMITS | options)
    expected = generate(plain, [params(**fields) for fields in KINDS])
    names = [[], ["steer"], [], ["twice", "steer"]]
    mixed = [params(**f, activation_edits=n) for f, n in zip(KINDS, names, strict=True)]
    llm = make_llm(tiny_model, **options)
    found = generate(llm, mixed)
    # The same programs with other edits beside them: to the bit, whatever the mode.
    names[1], names[3] = names[3], names[1]
    others = [params(**f, activation_edits=n) for f, n in zip(KINDS, names, strict=True)]
    swapped = generate(llm, others)
    for i in (0, 2):
        assert facts(found[i]) == facts(swapped[i])
        check_same(found[i], expected[i], is_deterministic)
    for i in (1, 3):
        assert found[i].outputs[0].token_ids != expected[i].outputs[0].token_ids


def test_samples_of_an_edited_prompt(llm: LLM) -> None:
    asked = params(n=3, seed=4, activation_edits=["steer"])
    (output,) = llm.generate([PROMPTS[0]], asked, use_tqdm=False)
    for one in output.outputs:
        alone = params(seed=4 + one.index, activation_edits=["steer"])
        (single,) = llm.generate([PROMPTS[0]], alone, use_tqdm=False)
        assert single.outputs[0].token_ids == one.token_ids


def test_a_snapshot_of_an_edited_request_has_no_keys_and_values(tiny_model: tuple) -> None:
    """Whoever resumes it without the edit gets the model's own."""
    llm = make_llm(tiny_model, min_swap_tokens=0)
    llm.add_request("a", PROMPTS[0], params(temperature=0, activation_edits=["steer"]))
    for _ in range(5):
        llm.step()
    snapshot = llm.snapshot("a")
    llm.abort_request("a")
    assert snapshot.kv is None
    llm.resume(snapshot, "b", params(temperature=0))
    outputs: list[RequestOutput] = []
    while llm.has_unfinished_requests():
        outputs += [output for output in llm.step() if output.finished]
    begin = list(snapshot.output_token_ids)
    rest = params(temperature=0, max_tokens=14 - len(begin))
    (alone,) = llm.generate([PROMPTS[0] + begin], rest, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == begin + alone.outputs[0].token_ids


def test_residuals_are_those_of_transformers(tmp_path: Path) -> None:
    expected = streams(save_tiny("qwen2", tmp_path), PROMPTS[0])
    module, weights = dense.load(tmp_path)
    found = dense.residuals(weights, jnp.array(PROMPTS[0]), (1, 0), model=module)
    for index, layer in enumerate([1, 0]):
        np.testing.assert_allclose(found[index], expected[layer], rtol=1e-4, atol=2e-4)


@pytest.mark.slow
def test_several_decode_steps_in_one_call(tiny_model: tuple, llm: LLM) -> None:
    """Processors, edits and records are those of one step after the other."""
    multiple = make_llm(tiny_model, max_decode_steps=4)
    names: list[dict[str, Any]] = [
        {"logits_processors": ["count"]},
        {"activation_edits": ["steer"]},
        {"logits_processors": ["odd"], "activation_edits": ["twice"]},
        {},
    ]
    asked = [params(**f, **n, record=True) for f, n in zip(KINDS, names, strict=True)]
    for found, expected in zip(generate(multiple, asked), generate(llm, asked), strict=True):
        ours, theirs = found.outputs[0], expected.outputs[0]
        assert ours.token_ids == theirs.token_ids
        assert ours.record is not None
        assert theirs.record is not None
        assert len(ours.record) == len(ours.token_ids) == len(ours.weights_versions)
        pairs = zip(ours.record, theirs.record, strict=True)
        assert all(a.raw == pytest.approx(b.raw, abs=1e-4) for a, b in pairs)


def test_layers_may_be_a_list(tiny_model: tuple) -> None:
    edits = [ActivationEdit("steer", [1], steer)]
    listed = make_llm(tiny_model, activation_edits=edits)
    asked = params(temperature=0, activation_edits=["steer"])
    (found,) = listed.generate([PROMPTS[1]], asked, use_tqdm=False)
    expected = reference_greedy(tiny_model, PROMPTS[1], 14, EDITS[0])
    assert found.outputs[0].token_ids == expected
