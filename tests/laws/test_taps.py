"""Activation taps: the residual stream of a request's tokens, as transformers has it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, ActivationEdit, RequestOutput, SamplingParams
from folojax.requests.prompts import ParsedPrompt
from folojax.steps.executables import Executable
from folojax.steps.layers import NO_EXTRAS, StepExtras
from folojax.steps.state import CallInputs, CallResults
from tests import dense
from tests.conftest import check_is_empty
from tests.families import save_family
from tests.reference import TIGHT, TINY_LIMITS, load_model, streams

LAYERS = (1, 0)
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1, "activations": True},
    {"seed": 2, "top_p": 0.9, "n": 2, "activations": True},
    {"seed": 3, "frequency_penalty": 1.0, "logprobs": 2},
    {"seed": 4, "prompt_logprobs": 1, "activations": True},
    {"temperature": 0, "max_tokens": 1, "activations": True},
]
TOLERANCE = 3e-4
"""Absolute, in float32; the entries have standard deviations of 2 to 6."""


def prompts() -> list[list[int]]:
    """Half begin alike, over more than a page; longer than a step's budget, and a single token."""
    rng = np.random.default_rng(0)
    common = rng.integers(3, 98, 37).tolist()
    tails = [rng.integers(3, 98, length).tolist() for length in (9, 14, 3, 7, 1, 1)]
    return [common * (i < 4) + tail for i, tail in enumerate(tails)]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 21, "ignore_eos": True} | fields)


def make_llm(model: tuple, **options: Any) -> LLM:
    return LLM(
        model, **TINY_LIMITS | {"activation_taps": LAYERS, "check_integrity": True} | options
    )


def run(llm: LLM, kinds: list[dict[str, Any]] = KINDS) -> list[RequestOutput]:
    """All twice, so that the second time finds the prompts of the first in the cache."""
    asked = [params(**fields) for fields in kinds]
    llm.generate(prompts(), asked, use_tqdm=False)
    outputs = llm.generate(prompts(), asked, use_tqdm=False)
    check_is_empty(llm)
    return outputs


def facts(output: RequestOutput) -> list[tuple]:
    return [(o.token_ids, o.cumulative_logprob, o.logprobs) for o in output.outputs]


def check_streams(output: RequestOutput, theirs: Any, layers: tuple[int, ...] = LAYERS) -> None:
    """Every sample's arrays are the hidden states of transformers over the same tokens."""
    for one in output.outputs:
        # What follows the last token was never asked for.
        expected = streams(theirs, (output.prompt_token_ids + one.token_ids)[:-1])
        assert one.activations is not None
        assert set(one.activations) == set(layers)
        for layer, stream in one.activations.items():
            assert stream.dtype == np.float32
            np.testing.assert_allclose(stream, expected[layer], rtol=1e-4, atol=TOLERANCE)


@pytest.fixture(scope="module")
def theirs(tiny_directory: Path) -> Any:
    return load_model(tiny_directory)


@pytest.fixture(scope="module")
def llm(tiny_model: tuple) -> LLM:
    return make_llm(tiny_model)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "sync": {"async_scheduling": False},
    "tight": TIGHT | {"num_host_pages": 16, "min_swap_tokens": 0},
    "whole prompts": {"max_num_batched_tokens": 256, "prefill_row_len": 64},
    "several steps": {"max_decode_steps": 4},
    "deterministic": {"deterministic": True},
    "edits": {"activation_edits": [ActivationEdit("none", (1,), lambda hidden, layer: hidden)]},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("sync", "whole prompts") else name
        for name in OPTIONS
    ],
)
def test_streams_are_those_of_transformers(tiny_model: tuple, theirs: Any, name: str) -> None:
    """In a continuous batch, prompts in chunks; neighbours hit the prefix cache, these do not."""
    llm = make_llm(tiny_model, **OPTIONS[name])
    outputs = run(llm)
    for fields, output in zip(KINDS, outputs, strict=True):
        if "activations" in fields:
            assert output.num_cached_tokens == 0
            check_streams(output, theirs)
        else:
            assert all(one.activations is None for one in output.outputs)
    assert llm.metrics().num_prefix_hit_tokens > 0
    assert (llm.metrics().num_preemptions > 0) == (name == "tight")


@pytest.mark.parametrize("family", ["gemma2", "qwen3-moe", "gpt2"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Windows and caps, mixtures of experts, learned positions; the layer before the last norm."""
    theirs = save_family(family, tmp_path)
    llm = make_llm(dense.load(tmp_path), activation_taps=(0,))
    (output,) = llm.generate([prompts()[0]], params(**KINDS[1]), use_tqdm=False)
    check_streams(output, theirs, (0,))


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"max_decode_steps": 4}])
def test_nobody_else_notices(tiny_model: tuple, options: dict[str, Any]) -> None:
    """Untapped requests have the bits that an engine without taps gives them, in any company.

    And so have tapped ones: nothing is found in a cache, and nobody has siblings to share with.
    """
    options = options | {"enable_prefix_caching": False}
    tapped = [fields | {"n": 1} for fields in KINDS]
    untapped = [fields | {"activations": False} for fields in tapped]
    expected = run(make_llm(tiny_model, activation_taps=(), **options), untapped)
    llm = make_llm(tiny_model, **options)
    for kinds in (untapped, tapped):
        found = run(llm, kinds)
        if "max_decode_steps" in options and kinds is tapped:
            # The taps are outputs of one large program, which is another one with them.
            assert [a.outputs[0].token_ids for a in found] == [
                b.outputs[0].token_ids for b in expected
            ]
        else:
            assert list(map(facts, found)) == list(map(facts, expected))


def test_steps_without_taps_run_the_programs_of_an_engine_without(
    tiny_model: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was asked before; and a step with them says so."""
    llm = make_llm(tiny_model)
    seen: list[StepExtras] = []
    call = llm.engine.runner.call

    def recorded(one: Executable, inputs: CallInputs) -> CallResults:
        seen.append(one.extras)
        return call(one, inputs)

    monkeypatch.setattr(llm.engine.runner, "call", recorded)
    llm.generate([prompts()[0]], params(activations=True, temperature=0), use_tqdm=False)
    assert StepExtras(residual_layers=LAYERS) in seen
    seen.clear()
    llm.generate([prompts()[0]], params(temperature=0), use_tqdm=False)
    assert set(seen) == {NO_EXTRAS}


def test_what_is_read_is_the_edited_stream(tiny_model: tuple) -> None:
    module, weights = tiny_model
    edit = ActivationEdit("louder", (0,), lambda hidden, layer: hidden * 3.0)
    llm = make_llm(tiny_model, activation_edits=[edit])
    asked = params(temperature=0, activations=True, activation_edits=["louder"])
    plain = params(temperature=0, activations=True)
    edited, untouched = llm.generate([prompts()[0]] * 2, [asked, plain], use_tqdm=False)
    for output, scale in ((edited, 3.0), (untouched, 1.0)):
        (one,) = output.outputs
        assert one.activations is not None
        tokens = jnp.array((output.prompt_token_ids + one.token_ids)[:-1])
        (first,) = dense.residuals(weights, tokens, (0,), model=module)
        np.testing.assert_allclose(one.activations[0], scale * first, rtol=1e-4, atol=1e-3)
    extras, is_on = StepExtras((edit,), (1,)), jnp.ones((5, 1), bool)
    *_, found = dense.layers(weights, jnp.arange(5) + 7, extras, is_on, model=module)
    assert set(found) == {1}


@pytest.mark.parametrize("options", [{}, {"max_decode_steps": 4}])
def test_a_request_that_stops_early_has_the_tokens_that_it_keeps(
    tiny_model: tuple, theirs: Any, options: dict[str, Any]
) -> None:
    """A stop id within a burst of several steps, with a plan under way behind it."""
    free = make_llm(tiny_model).generate([prompts()[1]], params(seed=1), use_tqdm=False)[0]
    tokens = free.outputs[0].token_ids
    place = next(i for i in range(5, 20) if tokens[i] not in tokens[:i])
    asked = params(seed=1, activations=True, stop_token_ids=[tokens[place]])
    (output,) = make_llm(tiny_model, **options).generate([prompts()[1]], asked, use_tqdm=False)
    assert output.outputs[0].token_ids == tokens[: place + 1]
    check_streams(output, theirs)


def test_they_come_at_the_end(llm: LLM, theirs: Any) -> None:
    """Streamed outputs have none before; an abort brings what was computed."""
    llm.add_request("a", prompts()[0], params(seed=1, activations=True))
    llm.add_request("b", prompts()[1], params(seed=2, activations=True))
    llm.add_request("c", prompts()[1], params(seed=2, activations=True))
    (nothing,) = llm.abort_request("c")
    assert nothing.outputs[0].activations is None
    outputs: dict[str, RequestOutput] = {}
    while not outputs.get("b") or len(outputs["b"].outputs[0].token_ids) < 5:
        outputs |= {output.request_id: output for output in llm.step()}
        assert all(o.outputs[0].activations is None for o in outputs.values() if not o.finished)
    (aborted,) = llm.abort_request("b")
    check_streams(aborted, theirs)
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.step()}
    check_streams(outputs["a"], theirs)
    check_is_empty(llm)


@pytest.mark.parametrize("running", ["recompute", "restart", "keep"])
def test_new_weights(tiny_model: tuple, running: str) -> None:
    """All rows are of the new weights, unless the old K/V are kept."""
    module, weights = tiny_model
    llm = make_llm(tiny_model)
    llm.add_request("a", prompts()[0], params(seed=1, activations=True))
    for _ in range(12):
        outputs = llm.step()
    num_before = len(outputs[0].outputs[0].token_ids)
    assert num_before > 2
    changed = weights | {"embed": weights["embed"] * 1.25}
    llm.update_params(changed, running=running)
    while llm.has_unfinished_requests():
        outputs = llm.step() or outputs
    (one,) = outputs[0].outputs
    assert one.activations is not None
    tokens = jnp.array((outputs[0].prompt_token_ids + one.token_ids)[:-1])
    kept = len(prompts()[0]) + num_before - 1 if running == "keep" else 0
    (new,) = dense.residuals(changed, tokens, (0,), model=module)
    (old,) = dense.residuals(weights, tokens, (0,), model=module)
    np.testing.assert_allclose(one.activations[0][:kept], old[:kept], rtol=1e-4, atol=1e-3)
    if not kept:
        np.testing.assert_allclose(one.activations[0], new, rtol=1e-4, atol=1e-3)


def test_a_fork_of_an_untapped_request_computes_all(llm: LLM, theirs: Any) -> None:
    llm.add_request("parent", prompts()[0], params(seed=1))
    outputs: dict[str, RequestOutput] = {}
    while "parent" not in outputs or len(outputs["parent"].outputs[0].token_ids) < 4:
        outputs |= {output.request_id: output for output in llm.step()}
    llm.fork("parent", "child", params(seed=1, activations=True))
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.step()}
    check_streams(outputs["child"], theirs)
    assert outputs["child"].outputs[0].token_ids == outputs["parent"].outputs[0].token_ids


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: {"activation_taps": [0, 3]}, r"activation_taps names layers \[3\]; the model has"),
        (lambda: {"activation_taps": [-1]}, r"activation_taps names layers \[-1\]"),
        (lambda: {"activation_taps": [1, 1]}, r"activation_taps is \[1, 1\]; layers must differ"),
        (lambda: {"activation_taps": [1.0]}, r"activation_taps holds 1.0; it must hold numbers"),
        (lambda: {"activation_taps": [True]}, r"activation_taps holds True"),
        (lambda: {"activation_taps": [0], "strict": True}, r"activation_taps \(\[0\]\), which no"),
    ],
)
def test_taps_that_do_not_fit_are_refused(
    tiny_model: tuple, build: Callable[[], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm(tiny_model, **build())


def test_an_engine_without_taps_refuses(tiny_model: tuple) -> None:
    llm = make_llm(tiny_model, activation_taps=())
    with pytest.raises(ValueError, match="without taps: pass activation_taps= to LLM"):
        llm.generate([prompts()[0]], params(activations=True), use_tqdm=False)


def test_the_memory_bound_is_stated(llm: LLM) -> None:
    """64 entries of two layers in float32 are 512 bytes a token; 128 tokens a sample are 1 GiB."""
    validator = llm.engine.validator
    asked = params(activations=True, n=16384, max_tokens=100, seed=1)
    prompt = ParsedPrompt(None, list(range(3, 31)))
    assert validator.check("id", prompt, asked).sampling_params == asked
    more = dataclasses.replace(validator, residual_bytes=validator.residual_bytes + 1)
    message = r"2,097,152 tokens would take 1,075,838,976 bytes; at most 1,073,741,824 fit"
    with pytest.raises(ValueError, match=message):
        more.check("id", prompt, asked)
