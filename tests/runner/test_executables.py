"""The compile plan: what is listed is compiled, and nothing else is, whatever comes."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from folojax import (
    LLM,
    ActivationEdit,
    EngineConfig,
    LogitsProcessor,
    SamplingClass,
    SamplingParams,
    StructuredOutputsParams,
)
from folojax.backend.backend import CPU, GPU
from folojax.engine import build
from folojax.engine.build import make_setup
from folojax.runner.warm_up import warm_up
from folojax.steps.executables import COPIES, EDITS, Executable
from tests.conftest import CompileCounter
from tests.letters import make_letters_tokenizer

OPTIONS: dict[str, Any] = {
    "page_size": 8,
    "num_pages": 14,
    "max_model_len": 96,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "prefill_row_len": 8,
    "max_logprobs": 3,
}


def make(tiny_model: tuple, **options: Any) -> LLM:
    return LLM(tiny_model, **(OPTIONS | options))


def prompt(length: int, seed: int = 0) -> dict[str, list[int]]:
    ids = np.random.default_rng(seed).integers(3, 128, length)
    return {"prompt_token_ids": ids.tolist()}


EVERYTHING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.0, "top_p": 0.9, "seed": 1, "n": 3},  # shares pages and copies them
    {"temperature": 1.0, "top_k": 5, "seed": 2, "logprobs": 3},
    {"temperature": 0.5, "seed": 4, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}},
    {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 2},
]
CUT = [EVERYTHING[k] for k in (0, 2, 3, 5)]
"""Those of two classes, greedy and truncated."""
EDITED = [EVERYTHING[0], EVERYTHING[4] | {"n": 2}, EVERYTHING[5] | {"prompt_logprobs": 1}]
"""Those of greedy and edited."""
GREEDY: list[dict[str, Any]] = [{"temperature": 0.0}] * 6
"""The smallest plan, where every shape of a step is a program of the whole model."""


def run_everything(llm: LLM, kinds: list[dict[str, Any]]) -> None:
    """Mixed lengths, sampling classes, log-probabilities, shared pages, copies, preemptions."""
    rng = np.random.default_rng(0)
    common = prompt(20, seed=9)["prompt_token_ids"]
    for round_ in range(8):
        count = 1 + round_ % 6
        picked = rng.permutation(len(kinds))[:count]
        params = [
            SamplingParams(max_tokens=int(rng.integers(1, 40)), ignore_eos=True, **kinds[k])
            for k in picked
        ]
        prompts = []
        for k in picked:
            ids = prompt(int(rng.integers(1, 50)), int(k))["prompt_token_ids"]
            prompts.append({"prompt_token_ids": common + ids[:30] if k % 2 else ids})
        llm.generate(prompts, params, use_tqdm=False)
    if any("prompt_logprobs" in kind for kind in kinds):
        llm.score(prompt(11), [prompt(7, 1), prompt(20, 2)], use_tqdm=False)


def check_that_nothing_compiles(
    llm: LLM, counter: CompileCounter, needed: Sequence[SamplingClass], kinds: list[dict[str, Any]]
) -> None:
    """After a warm-up for these classes, with work of these kinds."""
    assert llm.warm_up(needed) == len(llm.plan(needed)) > 8
    before = counter.count
    assert before > 0
    run_everything(llm, kinds)
    assert llm.metrics().num_preemptions > 0
    assert llm.metrics().num_prefix_hit_tokens > 0
    assert counter.count == before


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_no_workload_compiles_after_a_warm_up(
    tiny_model: tuple, counter: CompileCounter, is_deterministic: bool
) -> None:
    llm = make(tiny_model, strict=True, deterministic=is_deterministic)
    needed = [SamplingClass.GREEDY, SamplingClass.TRUNCATED]
    check_that_nothing_compiles(llm, counter, needed, CUT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layers", "whole"])
def test_no_workload_of_any_class_compiles_after_a_warm_up(
    tiny_model: tuple, counter: CompileCounter, request: pytest.FixtureRequest, kind: str
) -> None:
    if kind == "whole":
        request.getfixturevalue("whole_steps")
    llm = make(tiny_model, strict=True)
    check_that_nothing_compiles(llm, counter, tuple(SamplingClass), EVERYTHING)


WHOLE = dataclasses.replace(
    GPU,
    memory_fraction=None,
    default_dtype="float32",
    kernels=("reference",),
    warms_up=False,
)
"""A backend whose steps are programs of the whole model and the sampler, as on a GPU."""


@pytest.fixture
def whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are made have whole steps."""
    monkeypatch.setattr(build, "choose_backend", lambda device: WHOLE)


def test_an_engine_of_whole_steps_lists_few_executables(
    tiny_model: tuple, whole_steps: None
) -> None:
    """Each of them takes a GPU's compiler 10 s."""
    llm = LLM(tiny_model, max_model_len=96)
    config = llm.config
    limits = config.max_num_seqs, config.max_num_batched_tokens, config.prefill_row_len
    assert limits == (256, 4096, 128)
    assert len(llm.plan([SamplingClass.GREEDY], logprobs=False)) <= 25
    assert len(llm.plan()) <= 80


def test_the_engine_of_the_readme_lists_as_many_as_ever(tiny_model: tuple) -> None:
    """On CPU, where model and sampler are separate programs: of 32 requests of up to 768 tokens."""
    config = EngineConfig(max_num_seqs=32, max_model_len=768).resolve(8192, CPU)
    setup = make_setup(tiny_model[0], config, CPU)
    assert len(setup.list_executables([SamplingClass.GREEDY], False)) <= 29
    assert len(setup.list_executables(tuple(SamplingClass), True)) <= 163


@pytest.mark.parametrize("kind", [pytest.param("layers", marks=pytest.mark.slow), "whole"])
def test_structured_outputs_compile_nothing_after_a_warm_up(
    tiny_model: tuple, counter: CompileCounter, request: pytest.FixtureRequest, kind: str
) -> None:
    """Where steps are whole, model and sampler are two programs while a grammar is followed."""
    if kind == "whole":
        request.getfixturevalue("whole_steps")
    limits: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 64, "max_num_batched_tokens": 128}
    llm = LLM(tiny_model, make_letters_tokenizer(), strict=True, **limits)
    assert llm.engine.runner.steps.kind == kind
    wanted: dict[str, Any] = {"logprobs": False, "structured_outputs": True}
    assert llm.warm_up([SamplingClass.GREEDY], **wanted) == len(
        llm.plan([SamplingClass.GREEDY], **wanted)
    )
    before = counter.count
    told = StructuredOutputsParams(regex="[ab]{3,9}c")
    both = [
        SamplingParams(temperature=0, max_tokens=12, structured_outputs=told),
        SamplingParams(temperature=0, max_tokens=12),
    ]
    for count in (1, 3):
        outputs = llm.generate(["ab", "cd"] * count, both * count, use_tqdm=False)
        for output in outputs[::2]:
            assert re.fullmatch("[ab]{3,9}c", output.outputs[0].text)
    assert counter.count == before


def test_no_workload_of_whole_steps_compiles_after_a_warm_up(
    tiny_model: tuple, counter: CompileCounter, whole_steps: None
) -> None:
    """Of two classes; the next test has a third, and those before it the fourth."""
    llm = make(tiny_model, strict=True, max_logprobs=1)
    needed = [SamplingClass.GREEDY, SamplingClass.EDITED]
    check_that_nothing_compiles(llm, counter, needed, EDITED)


def test_an_engine_may_warm_up_when_it_is_made(
    tiny_model: tuple, counter: CompileCounter, whole_steps: None
) -> None:
    """For greedy and random requests without log-probabilities."""
    # Pages of a size that no other test has, so that none of its programs is there already.
    llm = make(tiny_model, strict=True, warm_up=True, page_size=4, num_pages=30)
    before = counter.count
    assert before > 0
    kinds = [*GREEDY[:2], {"temperature": 0.7, "seed": 3}, {"temperature": 1.0, "n": 2}] * 2
    run_everything(llm, kinds)
    assert counter.count == before


def test_several_decode_steps_compile_nothing_after_a_warm_up(
    tiny_model: tuple, counter: CompileCounter
) -> None:
    llm = make(tiny_model, strict=True, max_decode_steps=3)
    llm.warm_up([SamplingClass.GREEDY], logprobs=False)
    before = counter.count
    assert before > 0
    run_everything(llm, GREEDY)
    metrics = llm.metrics()
    assert metrics.num_decode_calls < 0.6 * metrics.num_scheduled_tokens
    assert metrics.num_preemptions > 0
    assert counter.count == before


FUNCTIONS: dict[str, dict[str, Any]] = {
    "processors": {
        "logits_processors": [LogitsProcessor("same", lambda logits, state: (logits, state.value))]
    },
    "edits": {"activation_edits": [ActivationEdit("same", (1,), lambda hidden, layer: hidden)]},
    "taps": {"activation_taps": [1]},
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_an_engine_with_functions_is_warmed_up_for_requests_without(
    tiny_model: tuple, counter: CompileCounter, kind: str
) -> None:
    """And what the others compile, they compile once."""
    # Pages of a size that no other test has, so that none of its programs is there already.
    size = 5 + list(FUNCTIONS).index(kind)
    # No prefix cache, or the second time is other work than the first.
    llm = make(
        tiny_model,
        enable_prefix_caching=False,
        num_pages=20,
        page_size=size,
        **FUNCTIONS[kind],
    )
    llm.warm_up([SamplingClass.GREEDY], logprobs=False)
    before = counter.count
    assert before > 0
    run_everything(llm, GREEDY)
    assert counter.count == before
    named: dict[str, Any] = {
        "processors": {"logits_processors": ["same"]},
        "edits": {"activation_edits": ["same"]},
        "taps": {"activations": True},
    }
    asked = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0, **named[kind])
    for _ in range(2):
        before = counter.count
        llm.generate([prompt(20, 5), prompt(5, 6)], asked, use_tqdm=False)
    assert counter.count == before


def test_penalties_of_many_tokens_compile_nothing_after_a_warm_up(
    tiny_model: tuple, counter: CompileCounter
) -> None:
    """What they count is written in one of few sizes."""
    llm = make(tiny_model, strict=True)
    llm.warm_up([SamplingClass.EDITED], logprobs=False)
    before = counter.count
    penalty = SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=2)
    llm.generate({"prompt_token_ids": list(range(10, 90))}, penalty, use_tqdm=False)
    assert counter.count == before


@pytest.mark.parametrize("most_steps", [1, 4])
def test_strict_refuses_more_bans_than_are_planned(
    tiny_model: tuple, counter: CompileCounter, most_steps: int
) -> None:
    """Up to 64 in a step are; a sampler with room for more would have to be compiled."""
    llm = make(tiny_model, strict=True, max_decode_steps=most_steps, async_scheduling=False)
    llm.warm_up([SamplingClass.EDITED], logprobs=False)
    before = counter.count
    few, many = (
        SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=range(count), max_tokens=2)
        for count in (60, 70)
    )
    llm.generate(prompt(5), few, use_tqdm=False)
    with pytest.raises(RuntimeError, match="bans=256 is not in the compile plan"):
        llm.generate(prompt(5), many, use_tqdm=False)
    assert counter.count == before


def test_a_warm_up_disturbs_nobody(tiny_model: tuple) -> None:
    """What a running request's penalties and biases count stays."""
    params = SamplingParams(
        temperature=0.0, presence_penalty=2.0, logit_bias={7: 3.0}, max_tokens=20, ignore_eos=True
    )
    llm = make(tiny_model)
    (expected,) = llm.generate(prompt(9), params, use_tqdm=False)
    llm.add_request("a", prompt(9), params)
    for _ in range(4):
        llm.step()
    llm.warm_up([SamplingClass.EDITED], logprobs=False)
    while llm.has_unfinished_requests():
        (found,) = llm.step()
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids


def test_an_engine_that_sleeps_cannot_warm_up(tiny_model: tuple) -> None:
    llm = make(tiny_model)
    llm.sleep()
    with pytest.raises(RuntimeError, match="call wake_up"):
        llm.warm_up()


def test_a_plan_lists_before_it_pays(tiny_model: tuple, counter: CompileCounter) -> None:
    llm = make(tiny_model)
    before = counter.count
    plan = llm.plan([SamplingClass.GREEDY], logprobs=False)
    assert counter.count == before
    assert all(entry.compile_s is None for entry in plan.entries)
    executables = [entry.executable for entry in plan.entries]
    assert len(executables) == len(set(executables))
    assert {one.kind for one in executables} == {"prefill", "decode", "sample", "copy"}
    assert EDITS not in executables
    everything = {entry.executable for entry in llm.plan().entries}
    assert everything > set(executables)
    assert {EDITS, COPIES} < everything

    warm = warm_up(llm.engine.runner, [SamplingClass.GREEDY], False, num_threads=1)
    assert [entry.executable for entry in warm.entries] == executables
    assert all(entry.compile_s is not None for entry in warm.entries)
    assert all(
        entry.temporaries_bytes is not None
        for entry in warm.entries
        if entry.executable not in (COPIES, EDITS)
    )
    text = str(warm)
    assert "decode rows=2" in text
    assert f"{len(warm)} executables: " in text


def test_strict_refuses_what_was_not_warmed_up(tiny_model: tuple, counter: CompileCounter) -> None:
    llm = make(tiny_model, strict=True)
    llm.warm_up([SamplingClass.GREEDY], logprobs=False)
    before = counter.count
    sampled = SamplingParams(temperature=1.0, seed=1, max_tokens=3)
    with pytest.raises(RuntimeError, match=r"sample rows=1 sampling=random is not in the compile"):
        llm.generate(prompt(5), sampled, use_tqdm=False)
    assert counter.count == before
    # The engine is empty and usable.
    (output,) = llm.generate(prompt(5), SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3


def test_strict_without_a_warm_up_compiles_what_is_planned(tiny_model: tuple) -> None:
    llm = make(tiny_model, strict=True)
    sampled = SamplingParams(temperature=1.0, seed=1, max_tokens=3, logprobs=1)
    llm.generate(prompt(5), sampled, use_tqdm=False)
    with pytest.raises(RuntimeError, match="decode rows=99 is not in the compile plan"):
        llm.engine.runner.gate.check(Executable("decode", 99))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_strict_refuses_what_no_plan_lists(tiny_model: tuple, kind: str) -> None:
    """At the door: functions and taps when the engine is built, records when they are asked for."""
    with pytest.raises(ValueError, match=r"strict is True and there are .*which no compile plan"):
        make(tiny_model, strict=True, **FUNCTIONS[kind])
    llm = make(tiny_model, strict=True)
    with pytest.raises(ValueError, match="record is True, which no compile plan lists"):
        llm.generate(prompt(5), SamplingParams(record=True), use_tqdm=False)
    assert not llm.has_unfinished_requests()


def test_otherwise_it_is_told_once(tiny_model: tuple, caplog: pytest.LogCaptureFixture) -> None:
    llm = make(tiny_model)
    sampled = SamplingParams(temperature=1.0, seed=1, max_tokens=2)
    with caplog.at_level(logging.WARNING, "folojax"):
        llm.generate(prompt(5), sampled, use_tqdm=False)
        llm.warm_up([SamplingClass.GREEDY], logprobs=False)
        assert not caplog.records
        llm.generate([prompt(5), prompt(6)], sampled, use_tqdm=False)
        llm.generate(prompt(5), SamplingParams(temperature=1.0, top_k=3), use_tqdm=False)
    (record,) = caplog.records
    assert "not in the compile plan" in record.message
