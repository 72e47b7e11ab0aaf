"""Rows that follow grammars: who makes their masks, and what goes on meanwhile."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams, StructuredOutputsParams
from folojax.backend.devices import DEFAULT_DEVICE, Devices
from folojax.runner import grammar_masks
from folojax.runner import runner as runner_module
from folojax.runner.grammar_masks import GrammarMasks
from folojax.sampling.rows import SampleInputs, StepOutput, greedy_rows
from folojax.steps.executables import StepKind
from folojax.steps.mail import receive, send
from tests.laws.test_structured_outputs import SCHEMA, asked
from tests.structured_cases import is_json_of


@pytest.fixture(autouse=True)
def skip_if_untold(letters_llm: LLM) -> None:
    """Without a C++ compiler programs wait for nobody."""
    if not letters_llm.engine.runner.grammars.is_told:
        pytest.skip("programs cannot be told masks here")


def settle(llm: LLM) -> None:
    """Waits for masks that a test before has asked for and not needed any more."""
    service = llm.engine.runner.grammars._service
    for job in () if service is None else tuple(service._jobs):
        job.result()


def give_masks(llm: LLM, patch: pytest.MonkeyPatch) -> list[bool]:
    """Has calls wait for their masks; returns whether each call that samples by them has mail."""
    runner, mails = llm.engine.runner, list[bool]()
    call = runner.call

    def noted(one: Any, inputs: Any) -> Any:
        if one.spec is not None and one.spec.has_mask:
            mails.append(inputs.mail is not None)
        return call(one, inputs)

    patch.setattr(runner, "call", noted)
    # Of the instance, which has looked already; its programs take mail.
    patch.setattr(runner.grammars, "is_told", False)
    patch.setattr(runner, "steps", runner.backend.make_steps(runner.model))
    return mails


def check_goes_on(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    """An interruption by what is patched; what comes after it is not held up."""
    with pytest.raises(KeyboardInterrupt):
        llm.generate("a", asked(seed=1), use_tqdm=False)
    patch.undo()
    (output,) = llm.generate("a", asked(seed=1), use_tqdm=False)
    assert is_json_of(SCHEMA, output.outputs[0].text)


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
    mails = give_masks(letters_llm, monkeypatch)
    untold = letters_llm.generate(prompts, params, use_tqdm=False)
    assert mails
    assert not any(mails)
    for one, other in zip(told, untold, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


@pytest.mark.parametrize("is_told", [True, False])
def test_masks_are_never_made_where_interruptions_arrive(
    letters_llm: LLM, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """A grammar that calls Python there would take one for an error of its own."""
    made, threads = grammar_masks.fill_masks, set[Any]()

    def noted(matchers: Any, masks: Any) -> None:
        threads.add(threading.current_thread())
        made(matchers, masks)

    settle(letters_llm)
    if not is_told:
        give_masks(letters_llm, monkeypatch)
    monkeypatch.setattr(grammar_masks, "fill_masks", noted)
    letters_llm.generate("a", asked(seed=1, max_tokens=3), use_tqdm=False)
    settle(letters_llm)
    assert len(threads) == 1
    assert threading.main_thread() not in threads


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


def test_nobody_waits_for_tokens_of_a_call_that_failed(
    letters_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call is never made."""
    runner, call = letters_llm.engine.runner, letters_llm.engine.runner.call

    def fail(one: Any, inputs: Any) -> Any:
        if inputs.mail is not None:
            raise KeyboardInterrupt
        return call(one, inputs)

    monkeypatch.setattr(runner, "call", fail)
    check_goes_on(letters_llm, monkeypatch)


def test_a_job_that_is_handed_over_and_not_noted_down_holds_nobody_up(
    letters_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ThreadPoolExecutor.submit

    def interrupted(*args: Any) -> Any:
        submit(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    check_goes_on(letters_llm, monkeypatch)


def test_grammars_are_followed_after_one_interruption_in_another(
    letters_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, call = letters_llm.engine.runner, letters_llm.engine.runner.call

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    def called(one: Any, inputs: Any) -> Any:
        return call(one, inputs) if inputs.mail is None else interrupted()

    monkeypatch.setattr(runner, "call", called)
    for name in ("result", "exception"):  # whoever waits for a job
        monkeypatch.setattr(Future, name, interrupted)
    check_goes_on(letters_llm, monkeypatch)


def test_the_thread_waits_for_no_call_that_is_not_made() -> None:
    """Not even where nobody can say so any more: else the process would never end."""
    grammars = GrammarMasks(64, 3, DEFAULT_DEVICE)
    grammars.ask([None])
    assert grammars._service is not None
    assert grammars._service._pool.submit(int).result(30) == 0
    grammars.clear()


def test_what_goes_wrong_is_told_in_the_step_of_its_tokens(
    letters_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a later one, to somebody else."""
    runner = letters_llm.engine.runner

    def fail(matchers: Any, masks: Any) -> None:
        raise RuntimeError("out of masks")

    monkeypatch.setattr(grammar_masks, "fill_masks", fail)
    runner.grammars.ask([None])
    assert runner.grammars._service is not None
    wait(runner.grammars._service._jobs)
    with pytest.raises(RuntimeError, match="out of masks"):
        runner.collect([])
    runner.grammars.clear()


def test_boxes_are_used_again_when_nobody_reads_them() -> None:
    made = GrammarMasks(64, 3, DEFAULT_DEVICE)

    def ask() -> tuple[tuple[int, ...], Any]:
        mail = made.ask([None] * 3).mail
        assert made._service is not None
        return tuple(box._address for box in made._service._boxes), mail

    first, mail = ask()
    made.clear()
    second, _ = ask()
    # The program of that mail may begin at any time; it is told masks, and has told no tokens.
    assert first[1] not in second
    compute(mail, np.zeros(3, np.int32), np.ones(3, bool))
    made.clear()
    third, _ = ask()
    assert first[1] in third
    made.clear()


@jax.jit
def compute(mail: Any, tokens: Any, is_valid: Any) -> Any:
    rows = jnp.arange(3)
    nothing = jnp.zeros((3, 0))
    out = StepOutput(tokens, nothing, rows, is_valid, nothing.astype(jnp.int32), nothing)
    given = receive(SampleInputs(rows, rows, greedy_rows(3)), mail, tokens, 64)
    return given.mask, send(out, mail).tokens


def test_devices_that_sample_apart_are_given_masks(letters_llm: LLM) -> None:
    """One may be so far ahead that another would read the masks of a later sampler."""
    setup = letters_llm.engine.runner.setup
    two = Devices((setup.backend.devices.first,) * 2)
    told = []
    kinds: list[tuple[StepKind, Devices]] = [
        ("rows", two),
        ("rows", DEFAULT_DEVICE),
        ("layers", two),
    ]
    for steps, devices in kinds:
        backend = dataclasses.replace(setup.backend, steps=steps, devices=devices)
        told.append(dataclasses.replace(setup, backend=backend).grammar_masks().is_told)
    assert told == [False, True, True]


def test_padding_waits_for_nobody(letters_llm: LLM) -> None:
    grammars = letters_llm.engine.runner.grammars
    masks = grammars.on_padding(4)
    assert masks.mask is None
    assert not np.any(jax.device_get(masks.mail))
