"""How requests end by themselves: stop rules, lengths, failed rows."""

import pytest

from folojax.sched.request import RequestStatus
from tests.sched.helpers import add, assert_empty, commit, make_scheduler, step


@pytest.mark.parametrize(
    ("stop", "tokens", "status", "stop_reason"),
    [
        ({"max_tokens": 2}, [5, 5], RequestStatus.FINISHED_LENGTH, None),
        ({"eos_token_ids": {9}}, [5, 9], RequestStatus.FINISHED_STOPPED, None),
        ({"stop_token_ids": {8}}, [5, 8], RequestStatus.FINISHED_STOPPED, 8),
        ({"eos_token_ids": {9}, "stop_token_ids": {9}}, [9], RequestStatus.FINISHED_STOPPED, None),
        ({"eos_token_ids": {9, 10}}, [10], RequestStatus.FINISHED_STOPPED, None),
        # Not before min_tokens outputs, the newest among them.
        (
            {"eos_token_ids": {9}, "stop_token_ids": {8}, "min_tokens": 3},
            [9, 8, 9],
            RequestStatus.FINISHED_STOPPED,
            None,
        ),
        # The length ends it all the same; EOS wins when both come at once.
        (
            {"max_tokens": 2, "eos_token_ids": {9}, "min_tokens": 3},
            [9, 9],
            RequestStatus.FINISHED_LENGTH,
            None,
        ),
        (
            {"max_tokens": 2, "eos_token_ids": {9}},
            [5, 9],
            RequestStatus.FINISHED_STOPPED,
            None,
        ),
        ({"max_tokens": 2, "stop_token_ids": {8}}, [5, 8], RequestStatus.FINISHED_STOPPED, 8),
        # EOS is ignored by leaving it out.
        ({"max_tokens": 3}, [9, 9, 9], RequestStatus.FINISHED_LENGTH, None),
    ],
)
def test_stop_rules(stop, tokens, status, stop_reason):
    rule: dict = {name: frozenset(x) if isinstance(x, set) else x for name, x in stop.items()}
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3, rule.pop("max_tokens", 8), stop=rule)
    for token in tokens:
        assert not request.is_finished
        plan = step(scheduler, token)
    assert request.status is status
    assert request.stop_reason == stop_reason
    assert request.output_token_ids == tokens
    assert plan.sampled_request_ids == ("a",)
    assert scheduler.get_request("a") is None
    assert scheduler.schedule().finished_request_ids == ("a",)
    assert_empty(scheduler)


def test_max_model_len_ends_a_request():
    scheduler = make_scheduler(max_model_len=8, page_size=1, num_pages=7)
    request = add(scheduler, "a", 6, max_tokens=100)
    step(scheduler)
    assert not request.is_finished
    step(scheduler)
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert request.num_tokens == 8
    assert_empty(scheduler)


def test_updates_carry_the_new_tokens():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    a = add(scheduler, "a", 4, max_tokens=1)
    b = add(scheduler, "b", 10)
    (update,) = commit(scheduler, scheduler.schedule(), 11)
    assert (update.request, update.new_token_ids) == (a, (11,))
    assert a.status.finish_reason == "length"
    assert b.output_token_ids == []
    assert b.num_computed_tokens == 6


def test_failed_row_ends_alone():
    scheduler = make_scheduler()
    a, b = (add(scheduler, name, 3) for name in "ab")
    plan = scheduler.schedule()
    updates = scheduler.update_from_output(plan, {"b": (1,)}, failed={"a": "logits are NaN"})
    assert [(u.request, u.new_token_ids) for u in updates] == [(a, ()), (b, (1,))]
    assert a.status is RequestStatus.FINISHED_ERROR
    assert (a.status.finish_reason, a.stop_reason) == ("error", "logits are NaN")
    assert a.output_token_ids == []
    assert step(scheduler).num_scheduled_tokens == {"b": 1}


def test_row_may_fail_in_the_middle_of_its_prompt():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    request = add(scheduler, "a", 20)
    scheduler.update_from_output(scheduler.schedule(), {}, failed={"a": "bad"})
    assert request.status is RequestStatus.FINISHED_ERROR
    assert_empty(scheduler)


@pytest.mark.parametrize(
    ("sampled", "failed", "text"),
    [
        ({}, {}, "no token for \\['a'\\]"),
        ({"a": (1,), "b": (1,)}, {}, "not asked for: \\['b'\\]"),
        ({"a": (1,), "x": (1,)}, {}, "not asked for: \\['x'\\]"),
        ({"a": (1,)}, {"a": "bad"}, "failed, with all tokens: 'a'"),
        ({"a": (1,)}, {"x": "bad"}, "not in the plan: \\['x'\\]"),
    ],
)
def test_samples_must_fit_the_plan(sampled, failed, text):
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, "a", 4)
    add(scheduler, "b", 10)
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match=text):
        scheduler.update_from_output(plan, sampled, failed)
    commit(scheduler, plan)  # nothing has changed


def test_plan_is_taken_in_once():
    scheduler = make_scheduler()
    add(scheduler, "a", 4)
    plan = step(scheduler)
    with pytest.raises(AssertionError, match="taken in already"):
        scheduler.update_from_output(plan, {"a": (1,)})
    scheduler.schedule()
    with pytest.raises(AssertionError, match="not the next"):
        scheduler.update_from_output(plan, {"a": (1,)})


def test_dropped_plan_is_planned_again():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, "a", 20)
    dropped = scheduler.schedule()
    plan = scheduler.schedule()
    assert plan.num_scheduled_tokens == dropped.num_scheduled_tokens == {"a": 8}
    commit(scheduler, plan)


def test_prompt_only_request_ends_when_its_prompt_is_computed():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    request = add(scheduler, "a", 20, max_tokens=0)
    other = add(scheduler, "b", 3, max_tokens=2)
    for num_tokens in (8, 8):
        plan = scheduler.schedule()
        assert plan.num_scheduled_tokens == {"a": num_tokens}
        assert commit(scheduler, plan) == []
    plan = scheduler.schedule()
    assert plan.num_scheduled_tokens == {"a": 4, "b": 3}
    assert plan.sampled_request_ids == ("b",), "its last chunk samples nothing"
    updates = commit(scheduler, plan)
    assert [(u.request, u.new_token_ids) for u in updates] == [(request, ()), (other, (7,))]
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert (request.output_token_ids, request.page_ids) == ([], [])
    assert step(scheduler).finished_request_ids == ("a",)
    assert_empty(scheduler)


def test_prompt_only_request_may_fill_the_pool():
    scheduler = make_scheduler(num_pages=10, max_num_batched_tokens=16)
    add(scheduler, "a", 40, max_tokens=0)
    for _ in range(3):
        step(scheduler)
    assert_empty(scheduler)


def test_prompt_only_request_may_fail():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 5, max_tokens=0)
    (update,) = scheduler.update_from_output(scheduler.schedule(), {}, failed={"a": "NaN"})
    assert update.request is request
    assert (request.status, request.stop_reason) == (RequestStatus.FINISHED_ERROR, "NaN")
    assert_empty(scheduler)
