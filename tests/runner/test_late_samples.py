"""Rows that follow grammars: who makes their masks, and what goes on meanwhile."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from folojax import LLM, SamplingParams, StructuredOutputsParams
from folojax.runner import late_samples
from folojax.runner import runner as runner_module
from tests.laws.test_structured_outputs import asked


def wait_for_masks(llm: LLM) -> None:
    """Waits for those that a test before has asked for and not needed any more."""
    ahead = llm.engine.runner.late._ahead
    if ahead is not None:
        ahead.result()


def test_rows_without_a_grammar_pay_nothing(
    letters_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    made = late_samples.fill_masks
    wait_for_masks(letters_llm)

    def counted(matchers: Any, num_tokens: int) -> Any:
        calls.append(sum(one is not None for one in matchers))
        return made(matchers, num_tokens)

    monkeypatch.setattr(late_samples, "fill_masks", counted)
    letters_llm.generate(["The sea", "is"], SamplingParams(seed=1), use_tqdm=False)
    assert calls == []
    choice = StructuredOutputsParams(choice=["ab"])
    params = [asked(structured_outputs=choice, seed=1), SamplingParams(seed=1)]
    letters_llm.generate(["The sea", "is"], params, use_tqdm=False)
    # A mask for each token, one for the step that was planned before the end was known, and perhaps
    # by now one behind that.
    assert calls[:4] == [1, 1, 1, 1]
    assert len(calls) <= 5


def test_the_host_works_while_the_device_does(
    letters_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, events, others = letters_llm.engine.runner, list[str](), list[str]()
    call, fill_masks, read = runner.call, late_samples.fill_masks, runner_module.read

    def noted(name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            is_own = threading.current_thread() is threading.main_thread()
            (events if is_own else others).append(name(*args))
            return function(*args)

        return run

    wait_for_masks(letters_llm)
    monkeypatch.setattr(runner, "call", noted(lambda one, inputs: one.kind, call))
    monkeypatch.setattr(late_samples, "fill_masks", noted(lambda *args: "masks", fill_masks))
    monkeypatch.setattr(runner_module, "read", noted(lambda *args: "read", read))
    letters_llm.generate("a", asked(seed=1, max_tokens=12), use_tqdm=False)
    # Between the sampler and the model of the next step the device waits for nothing.
    num_steps = events.count("decode")
    assert num_steps == 12
    between = ["read", "sample", "decode"] * (num_steps - 2)
    assert events[:4] == ["decode", "masks", "sample", "decode"]
    assert events[4:] == [*between, "read", "sample", "read"]
    assert others in (["masks"] * 11, ["masks"] * 12)  # the last is nobody's
