"""The next step is dispatched before the last one is read: same tokens, nothing left over."""

from collections.abc import Callable
from typing import Any

import pytest

from folojax import LLM, RequestOutput, SamplingParams
from tests.conftest import check_is_empty
from tests.mixed_requests import GREEDY, check_same, make_llm, make_prompts, run
from tests.reference import TIGHT


@pytest.mark.parametrize("has_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("limits", [{}, TIGHT], ids=["ample", "tight"])
def test_tokens_are_the_same_and_at_most_one_is_discarded(
    tiny_model: tuple, mixed_outputs: list[RequestOutput], limits: dict[str, Any], has_cache: bool
) -> None:
    llm = make_llm(tiny_model, **limits, enable_prefix_caching=has_cache)
    outputs = run(llm)
    check_same(outputs, mixed_outputs)
    ends = [completion.finish_reason for output in outputs for completion in output.outputs]
    assert ends.count("stop") >= 6
    assert 1 <= llm.metrics().num_discarded_tokens <= ends.count("stop")
    assert (llm.metrics().num_preemptions > 0) == (limits == TIGHT)


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
    "update_params": lambda llm: llm.update_params(llm.params),
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
