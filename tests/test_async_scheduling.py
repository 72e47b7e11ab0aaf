"""The next step is dispatched before the last one is read: same tokens, nothing left over."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from folojax import LLM, RequestOutput, SamplingParams
from tests.conftest import check_is_empty
from tests.text import make_letters_tokenizer

STOPS = list(range(3, 98, 4))
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "ignore_eos": True},
    {"seed": 1, "top_k": 40, "stop_token_ids": STOPS},
    {"seed": 2, "stop": ["a", "b", "e", "o"]},
    {"seed": 3, "stop": ["c", "d", "r", "s"], "include_stop_str_in_output": True, "min_tokens": 4},
    {"seed": 4, "stop_token_ids": STOPS, "min_tokens": 9},
    {"temperature": 0, "repetition_penalty": 1.4, "presence_penalty": 0.5, "ignore_eos": True},
    {"seed": 6, "bad_words": ["a", "bc", "th"], "frequency_penalty": 0.3},
    {"seed": 7, "n": 3, "stop_token_ids": STOPS},
    {"seed": 8, "logprobs": 3, "prompt_logprobs": 2, "stop_token_ids": STOPS},
    {"seed": 9, "max_tokens": 1},
    {"seed": 10, "max_tokens": 1, "prompt_logprobs": 0},
    {"temperature": 0, "max_tokens": None, "ignore_eos": True},
]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def make_llm(model: tuple, **options: Any) -> LLM:
    """Small steps and few rows: every shape of a step costs a compilation."""
    fields: dict[str, Any] = {"num_pages": 48, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    return LLM(
        model, make_letters_tokenizer(), page_size=16, max_model_len=128, **(fields | options)
    )


def make_prompts() -> list[list[int]]:
    """Every other one begins alike."""
    rng = np.random.default_rng(0)
    common = rng.integers(3, 98, 40).tolist()
    tails = [rng.integers(3, 98, length).tolist() for length in rng.integers(2, 50, len(PARAMS))]
    return [common * (i % 2) + tail for i, tail in enumerate(tails)]


def run(llm: LLM) -> list[RequestOutput]:
    """Runs all, three arriving before each step; nothing that was shown is taken back."""
    prompts, waiting = make_prompts(), list(range(len(PARAMS)))
    outputs: dict[str, RequestOutput] = {}
    while waiting or llm.has_unfinished_requests():
        for index in waiting[:3]:
            params = SamplingParams(**{"max_tokens": 30, **PARAMS[index]})
            llm.add_request(str(index), prompts[index], params)
        waiting = waiting[3:]
        for output in llm.step():
            before = outputs.get(output.request_id)
            assert before is None or not before.finished
            for old, new in zip(before.outputs if before else [], output.outputs, strict=False):
                assert new.token_ids[: len(old.token_ids)] == old.token_ids
                assert new.text.startswith(old.text)
            outputs[output.request_id] = output
        llm.engine.scheduler.check()
    check_is_empty(llm)
    return [outputs[str(index)] for index in range(len(PARAMS))]


def logprobs_of(entries: list[Any] | None) -> list[dict[int, float] | None] | None:
    if entries is None:
        return None
    return [entry and {token: one.logprob for token, one in entry.items()} for entry in entries]


def check_same(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert one.token_ids == other.token_ids, f"request {ours.request_id}"
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert one.stop_reason == other.stop_reason
            pairs = [(one.logprobs, other.logprobs), (ours.prompt_logprobs, theirs.prompt_logprobs)]
            for entries, others in pairs:
                a, b = logprobs_of(entries), logprobs_of(others)
                assert (a is None) == (b is None)
                for entry, known in zip(a or [], b or [], strict=True):
                    assert (entry or {}) == pytest.approx(known or {}, abs=1e-3)


@pytest.fixture(scope="module")
def expected(tiny_model: tuple) -> list[RequestOutput]:
    """Every step is read before the next one is planned."""
    llm = make_llm(tiny_model, async_scheduling=False)
    outputs = run(llm)
    assert llm.metrics().num_discarded_tokens == 0
    return outputs


@pytest.mark.parametrize("has_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("num_pages", [48, 10], ids=["ample", "tight"])
def test_tokens_are_the_same_and_at_most_one_is_discarded(
    tiny_model: tuple, expected: list[RequestOutput], num_pages: int, has_cache: bool
) -> None:
    llm = make_llm(tiny_model, num_pages=num_pages, enable_prefix_caching=has_cache)
    outputs = run(llm)
    check_same(outputs, expected)
    ends = [completion.finish_reason for output in outputs for completion in output.outputs]
    assert ends.count("stop") >= 6
    assert 1 <= llm.metrics().num_discarded_tokens <= ends.count("stop")
    assert (llm.metrics().num_preemptions > 0) == (num_pages == 10)


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_a_step_is_dispatched_before_the_one_before_it_is_read(
    tiny_model: tuple, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    llm = make_llm(tiny_model, async_scheduling=is_async)
    runner, calls = llm.engine.runner, ""
    dispatch, collect = runner.dispatch, runner.collect

    def spy_dispatch(plan: Any) -> Any:
        nonlocal calls
        calls += "" if plan.is_empty else "d"
        return dispatch(plan)

    def spy_collect(pending: Any) -> Any:
        nonlocal calls
        calls += "c"
        return collect(pending)

    monkeypatch.setattr(runner, "dispatch", spy_dispatch)
    monkeypatch.setattr(runner, "collect", spy_collect)
    llm.generate(make_prompts()[0][:9], GREEDY, use_tqdm=False)
    # The last token is foreseen: no step is computed for nothing.
    assert calls == ("d" + "dc" * 11 + "c" if is_async else "dc" * 12)
    assert llm.metrics().num_discarded_tokens == 0
    check_is_empty(llm)


def sleep_and_wake_up(llm: LLM) -> None:
    llm.sleep()
    llm.wake_up()


DISTURBANCES: dict[str, Callable[[LLM], Any]] = {
    "sleep": sleep_and_wake_up,
    "update_params": lambda llm: llm.update_params(llm.engine.runner.params),
    "reset_prefix_cache": lambda llm: llm.reset_prefix_cache(reset_running_requests=True),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_what_is_under_way_is_taken_in_first(tiny_model: tuple, name: str) -> None:
    """No token is lost, doubled or computed twice; an end is told by the next step."""
    llm = make_llm(tiny_model)
    prompts = [make_prompts()[i][:7] for i in (0, 2)]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    llm.add_request("long", prompts[0], GREEDY)
    llm.add_request("short", prompts[1], SamplingParams(temperature=0, max_tokens=4))
    for _ in range(3):
        llm.step()
    DISTURBANCES[name](llm)
    llm.engine.scheduler.check()
    assert llm.metrics().num_running == 0
    outputs = {output.request_id: output.outputs[0] for output in llm.step()}
    assert (outputs["short"].token_ids, outputs["short"].finish_reason) == (
        expected[1][:4],
        "length",
    )
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output.outputs[0] for output in llm.step()}
    assert outputs["long"].token_ids == expected[0]
    assert llm.metrics().num_discarded_tokens == 0
    assert not llm.reset_prefix_cache() or llm.metrics().num_cached_pages == 0
    check_is_empty(llm)


def test_an_aborted_id_may_be_used_again_at_once(tiny_model: tuple) -> None:
    """The token that is under way for the first request of that name is not the second's."""
    llm = make_llm(tiny_model)
    first, second = make_prompts()[0][:9], make_prompts()[2][:6]
    expected = llm.generate(second, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    llm.add_request("x", first, GREEDY)
    llm.step()
    (aborted,) = llm.abort_request("x")
    assert len(aborted.outputs[0].token_ids) == 1
    llm.add_request("x", second, GREEDY)
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert outputs[-1].outputs[0].token_ids == expected
    assert llm.metrics().num_discarded_tokens == 1
    check_is_empty(llm)
