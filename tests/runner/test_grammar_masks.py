"""Rows that follow grammars: who makes their masks, and what goes on meanwhile."""

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from folojax import LLM, SamplingParams, StructuredOutputsParams
from folojax.backend.devices import DEFAULT_DEVICE
from folojax.runner import grammar_masks
from folojax.runner import runner as runner_module
from folojax.runner.grammar_masks import GrammarMasks
from tests.laws.test_structured_outputs import asked


@pytest.fixture(autouse=True)
def skip_if_untold(letters_llm: LLM) -> None:
    """Without a C++ compiler programs wait for nobody."""
    if not letters_llm.engine.runner.grammars.is_told:
        pytest.skip("programs cannot be told masks here")


def settle(llm: LLM) -> None:
    """Waits for masks that a test before has asked for and not needed any more."""
    for job in llm.engine.runner.grammars._jobs:
        job.result()


def test_rows_without_a_grammar_pay_nothing(
    letters_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    made = grammar_masks.fill_masks
    settle(letters_llm)

    def counted(matchers: Any, masks: Any) -> None:
        calls.append(sum(one is not None for one in matchers))
        made(matchers, masks)

    monkeypatch.setattr(grammar_masks, "fill_masks", counted)
    letters_llm.generate(["The sea", "is"], SamplingParams(seed=1), use_tqdm=False)
    assert calls == []
    choice = StructuredOutputsParams(choice=["ab"])
    params = [asked(structured_outputs=choice, seed=1), SamplingParams(seed=1)]
    letters_llm.generate(["The sea", "is"], params, use_tqdm=False)
    settle(letters_llm)
    # A mask for each token, and one for the step that was planned before the end was known.
    assert calls in ([1] * 3, [1] * 4)


def test_the_next_step_is_called_before_the_tokens_are_known(
    letters_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, events, others = letters_llm.engine.runner, list[str](), list[str]()
    call, fill_masks, read = runner.call, grammar_masks.fill_masks, runner_module.read

    def noted(name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            is_own = threading.current_thread() is threading.main_thread()
            (events if is_own else others).append(name(*args))
            return function(*args)

        return run

    settle(letters_llm)
    monkeypatch.setattr(runner, "call", noted(lambda one, inputs: one.kind, call))
    monkeypatch.setattr(grammar_masks, "fill_masks", noted(lambda *args: "masks", fill_masks))
    monkeypatch.setattr(runner_module, "read", noted(lambda *args: "read", read))
    letters_llm.generate("a", asked(seed=1, max_tokens=12), use_tqdm=False)
    settle(letters_llm)
    between = ["decode", "sample", "read"] * 11
    assert events == ["decode", "sample", *between, "read"]
    assert others == ["masks"] * 12


def test_the_same_tokens_when_calls_wait_for_each_other(
    letters_llm: LLM, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [asked(seed=seed, temperature=1) for seed in range(4)] + [SamplingParams(seed=9)]
    prompts = ["The", "sea", "is", "a", "b"]
    told = letters_llm.generate(prompts, params, use_tqdm=False)
    monkeypatch.setattr(GrammarMasks, "is_told", False)
    runner = letters_llm.engine.runner
    monkeypatch.setattr(runner, "steps", runner.backend.make_steps(runner.model))
    untold = letters_llm.generate(prompts, params, use_tqdm=False)
    for one, other in zip(told, untold, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_rows_fail_whose_masks_cannot_be_made(
    letters_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(matchers: Any, masks: Any) -> None:
        raise RuntimeError("out of masks")

    with monkeypatch.context() as patch:
        patch.setattr(grammar_masks, "fill_masks", fail)
        with pytest.raises(RuntimeError, match="out of masks"):
            letters_llm.generate("a", asked(seed=1), use_tqdm=False)
    (output,) = letters_llm.generate("a", asked(seed=1), use_tqdm=False)
    assert output.outputs[0].token_ids


def test_nobody_waits_for_tokens_of_a_call_that_failed(letters_llm: LLM) -> None:
    """The call is never made; what comes after it is not held up."""
    runner, call = letters_llm.engine.runner, letters_llm.engine.runner.call

    def fail(one: Any, inputs: Any) -> Any:
        if inputs.mail is not None:
            raise KeyboardInterrupt
        return call(one, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "call", fail)
        with pytest.raises(KeyboardInterrupt):
            letters_llm.generate("a", asked(seed=1), use_tqdm=False)
    assert not runner.grammars._jobs
    (output,) = letters_llm.generate("a", asked(seed=1), use_tqdm=False)
    assert output.outputs[0].token_ids


def test_boxes_are_used_again() -> None:
    grammars = GrammarMasks(64, 3, DEFAULT_DEVICE)
    first = {id(box) for box in grammars._boxes}
    assert len(first) == 2
    del grammars
    assert {id(box) for box in GrammarMasks(64, 3, DEFAULT_DEVICE)._boxes} == first


def test_padding_waits_for_nobody(letters_llm: LLM) -> None:
    grammars = letters_llm.engine.runner.grammars
    masks = grammars.on_padding(4)
    assert masks.mask is None
    assert not np.any(jax.device_get(masks.mail))
