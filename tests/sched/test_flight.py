"""Two plans under way: what is foreseen, built on, discarded and waited for."""

import pytest

from folojax.sched.request import RequestStatus
from folojax.sched.scheduler import Scheduler
from folojax.sched.step_plan import StepPlan
from tests.sched.helpers import add, assert_empty, commit, make_scheduler


def make_ahead(**changes) -> Scheduler:
    return make_scheduler(max_plans_in_flight=2, **changes)


def plan(scheduler: Scheduler) -> StepPlan:
    made = scheduler.schedule()
    scheduler.check()
    return made


def test_a_token_in_flight_counts_as_one():
    scheduler = make_ahead()
    request = add(scheduler, "a", 3)
    first, second = plan(scheduler), plan(scheduler)
    assert (request.num_tokens, request.num_expected_tokens) == (3, 5)
    assert (request.num_computed_tokens, request.num_planned_tokens) == (0, 4)
    assert second.num_scheduled_tokens == {"a": 1}
    assert second.new_requests == ()
    assert second.sampled_request_ids == ("a",)
    commit(scheduler, first, token=5)
    third = plan(scheduler)
    assert third.num_scheduled_tokens == {"a": 1}
    commit(scheduler, second, token=6)
    commit(scheduler, third, token=7)
    assert request.output_token_ids == [5, 6, 7]


def test_plans_are_taken_in_in_order():
    scheduler = make_ahead()
    add(scheduler, "a", 3)
    first, second = plan(scheduler), plan(scheduler)
    with pytest.raises(AssertionError, match="not the next"):
        scheduler.update_from_output(second, {"a": (1,)})
    commit(scheduler, first)
    commit(scheduler, second)


@pytest.mark.parametrize(("prompt", "max_tokens"), [(3, 1), (63, 8), (3, 0)])
def test_an_end_by_length_is_foreseen(prompt: int, max_tokens: int):
    """One token asked for, room for one, or none at all: nothing is left to plan."""
    scheduler = make_ahead()
    request = add(scheduler, "a", prompt, max_tokens)
    first, second = plan(scheduler), plan(scheduler)
    assert second.is_empty
    commit(scheduler, first)
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert not second.awaited
    commit(scheduler, second)
    assert scheduler.in_flight.num_discarded_tokens == 0
    assert_empty(scheduler)


def test_the_token_behind_an_end_is_discarded():
    scheduler = make_ahead(enable_prefix_caching=True)
    request = add(scheduler, "a", 4, stop={"eos_token_ids": frozenset({9})})
    first, second = plan(scheduler), plan(scheduler)
    assert set(second.awaited) == {"a"}
    commit(scheduler, first, token=9)
    assert request.is_finished
    assert not second.awaited
    assert commit(scheduler, second, token=8) == []
    assert request.output_token_ids == [9]
    assert scheduler.in_flight.num_discarded_tokens == 1
    assert scheduler.memory.cache.num_pages == 1  # the prompt; not the page of the end token
    assert_empty(scheduler)


def test_an_id_in_flight_may_be_used_again():
    scheduler = make_ahead()
    old = add(scheduler, "a", 3)
    first, second = plan(scheduler), plan(scheduler)
    scheduler.abort_requests("a")
    new = add(scheduler, "a", 5)
    assert commit(scheduler, first, token=1) == []
    third = plan(scheduler)
    assert third.finished_request_ids == ("a",)
    assert third.num_scheduled_tokens == {"a": 5}
    assert commit(scheduler, second, token=2) == []
    commit(scheduler, third, token=3)
    assert (old.output_token_ids, new.output_token_ids) == ([], [3])
    assert scheduler.in_flight.num_discarded_tokens == 2


def test_a_failed_row_is_not_awaited_any_more():
    scheduler = make_ahead(enable_prefix_caching=True)
    request = add(scheduler, "a", 9)
    neighbour = add(scheduler, "b", (1, 2))
    first, second = plan(scheduler), plan(scheduler)
    scheduler.update_from_output(first, {"b": (5,)}, failed={"a": "NaN"})
    assert request.status is RequestStatus.FINISHED_ERROR
    assert scheduler.memory.cache.num_pages == 0
    (update,) = commit(scheduler, second, token=6)
    assert (update.request, neighbour.output_token_ids) == (neighbour, [5, 6])


def test_a_sibling_builds_on_a_prompt_that_is_under_way():
    scheduler = make_ahead(enable_prefix_caching=True)
    prompt = tuple(range(10))
    a = add(scheduler, "a", prompt, group="g")
    b = add(scheduler, "b", prompt, group="g")
    first = plan(scheduler)
    assert first.num_scheduled_tokens == {"a": 10}
    second = plan(scheduler)
    assert second.num_scheduled_tokens == {"a": 1, "b": 1}
    assert b.page_ids[:2] == a.page_ids[:2]
    assert second.page_moves.copies == ((a.page_ids[2], b.page_ids[2]),)
    assert scheduler.memory.cache.num_pages == 0
    commit(scheduler, first)
    assert scheduler.memory.cache.num_pages == 2
    commit(scheduler, second)
    assert scheduler.memory.cache.num_pages == 2


def plan_pages_in_cache(scheduler: Scheduler) -> int:
    return scheduler.memory.cache.num_pages


def test_pages_that_are_about_to_come_free_are_waited_for():
    """Nobody is preempted for room that the next token to arrive gives back."""
    scheduler = make_ahead(num_pages=2, max_model_len=8)
    short, long = add(scheduler, "short", 3, 1), add(scheduler, "long", 4, 3)
    first, second = plan(scheduler), plan(scheduler)
    assert second.is_empty
    commit(scheduler, first)
    assert short.is_finished
    third = plan(scheduler)
    commit(scheduler, second)
    assert third.num_scheduled_tokens == {"long": 1}
    commit(scheduler, third)
    assert (long.num_preemptions, long.num_output_tokens) == (0, 2)


def preempted_with_a_token_in_flight(scheduler: Scheduler):
    a, b = add(scheduler, "a", 4), add(scheduler, "b", 4)
    first, second = plan(scheduler), plan(scheduler)
    assert second.preempted_request_ids == ("b",)
    assert b.status is RequestStatus.PREEMPTED
    return a, b, first, second


def test_a_preempted_request_keeps_the_token_in_flight():
    scheduler = make_ahead(num_pages=3, max_model_len=12)
    a, b, first, second = preempted_with_a_token_in_flight(scheduler)
    updates = commit(scheduler, first, token=5)
    assert [update.request for update in updates] == [a, b]
    assert b.output_token_ids == [5]
    assert b.num_computed_tokens == 0
    commit(scheduler, second, token=6)
    assert (a.output_token_ids, b.output_token_ids) == ([5, 6], [5])
    assert scheduler.in_flight.num_discarded_tokens == 0


def test_a_preempted_request_ends_by_the_token_in_flight():
    scheduler = make_ahead(num_pages=3, max_model_len=12)
    _, b, first, _ = preempted_with_a_token_in_flight(scheduler)
    b.stop = type(b.stop)(max_tokens=8, eos_token_ids=frozenset({5}))
    commit(scheduler, first, token=5)
    assert b.status is RequestStatus.FINISHED_STOPPED
    assert scheduler.num_waiting == 0


def test_a_preempted_request_does_not_fail_but_tries_again():
    """The pages that may be to blame are not its own any more."""
    scheduler = make_ahead(num_pages=3, max_model_len=12)
    _, b, first, _ = preempted_with_a_token_in_flight(scheduler)
    scheduler.update_from_output(first, {"a": (5,)}, failed={"b": "NaN"})
    scheduler.check()
    assert (b.status, b.num_samples_in_flight) == (RequestStatus.PREEMPTED, 0)


def test_preempt_all_awaits_nothing():
    scheduler = make_ahead()
    request = add(scheduler, "a", 3)
    first, second = plan(scheduler), plan(scheduler)
    scheduler.preempt_all()
    scheduler.check()
    assert commit(scheduler, first) == commit(scheduler, second) == []
    assert (request.output_token_ids, scheduler.in_flight.num_discarded_tokens) == ([], 2)
    assert plan(scheduler).num_scheduled_tokens == {"a": 3}


def test_the_latest_plan_may_be_dropped():
    scheduler = make_ahead()
    request = add(scheduler, "a", 3)
    first = plan(scheduler)
    dropped, second = plan(scheduler), plan(scheduler)
    assert second.num_scheduled_tokens == dropped.num_scheduled_tokens == {"a": 1}
    commit(scheduler, first, token=1)
    commit(scheduler, second, token=2)
    assert request.output_token_ids == [1, 2]


def test_shutdown_forgets_plans_under_way():
    scheduler = make_ahead()
    add(scheduler, "a", 3)
    plan(scheduler)
    plan(scheduler)
    scheduler.shutdown()
    assert_empty(scheduler)
