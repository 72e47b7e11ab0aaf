"""Requests that are ended from outside, in whatever state they are."""

from collections.abc import Callable

import pytest

from folojax.sched.request import RequestStatus
from folojax.sched.scheduler import Scheduler
from tests.sched.helpers import TOKEN, add, assert_empty, make_scheduler, step


def waiting(scheduler: Scheduler) -> None:
    add(scheduler, "x", 6)


def running(scheduler: Scheduler) -> None:
    add(scheduler, "x", 6)
    step(scheduler)


def mid_chunk(scheduler: Scheduler) -> None:
    add(scheduler, "x", 12, max_tokens=5)
    step(scheduler)


def preempted(scheduler: Scheduler) -> None:
    add(scheduler, "old", 4)
    add(scheduler, "x", 4)
    step(scheduler)
    while not scheduler.num_waiting:
        step(scheduler)
    scheduler.abort_requests("old")


def finished(scheduler: Scheduler) -> None:
    add(scheduler, "x", 6, max_tokens=1)
    step(scheduler)


def unknown(scheduler: Scheduler) -> None:
    pass


@pytest.mark.parametrize(
    ("reach", "status", "num_outputs"),
    [
        (waiting, RequestStatus.WAITING, 0),
        (running, RequestStatus.RUNNING, 1),
        (mid_chunk, RequestStatus.RUNNING, 0),
        (preempted, RequestStatus.PREEMPTED, 5),
        (finished, None, None),
        (unknown, None, None),
    ],
)
def test_abort_in_every_state(
    reach: Callable[[Scheduler], None], status: RequestStatus | None, num_outputs: int | None
):
    scheduler = make_scheduler(num_pages=4, max_num_batched_tokens=8)
    reach(scheduler)
    request = scheduler.get_request("x")
    assert (request and request.status) == status
    ended = scheduler.abort_requests(["x", "x", "nobody"])
    if request is None:
        assert ended == []
    else:
        assert ended == [request]
        assert request.status.finish_reason == "abort"
        assert len(request.output_token_ids) == num_outputs
        assert "x" in scheduler.schedule().finished_request_ids
    assert_empty(scheduler)


@pytest.mark.parametrize("with_token", [True, False])
def test_abort_while_the_step_runs(with_token: bool):
    scheduler = make_scheduler()
    a, b = (add(scheduler, name, 3) for name in "ab")
    plan = scheduler.schedule()
    scheduler.abort_requests("a")
    sampled = {"a": (1,), "b": (1,)} if with_token else {"b": (1,)}
    (update,) = scheduler.update_from_output(plan, sampled)
    assert update.request is b
    assert a.output_token_ids == []
    assert step(scheduler).finished_request_ids == ("a",)


def test_id_reused_while_the_step_runs_keeps_the_tokens_apart():
    scheduler = make_scheduler()
    old = add(scheduler, "a", 3)
    plan = scheduler.schedule()
    scheduler.abort_requests("a")
    new = add(scheduler, "a", 5)
    assert scheduler.update_from_output(plan, {"a": (1,)}) == []
    assert old.output_token_ids == new.output_token_ids == []
    plan = scheduler.schedule()
    assert plan.finished_request_ids == ("a",)
    assert plan.num_scheduled_tokens == {"a": 5}


def test_caller_may_stop_a_request_on_text():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3)
    step(scheduler)
    step(scheduler)
    scheduler.stop_at(request, 1, "\n\n")
    assert (request.status.finish_reason, request.stop_reason) == ("stop", "\n\n")
    assert request.output_token_ids == [TOKEN]
    assert_empty(scheduler)


def test_text_ends_a_request_also_where_its_last_token_just_did():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3, max_tokens=1)
    step(scheduler)
    assert request.status is RequestStatus.FINISHED_LENGTH
    scheduler.stop_at(request, 1, ".")
    assert (request.status, request.stop_reason) == (RequestStatus.FINISHED_STOPPED, ".")
    assert_empty(scheduler)


def test_shutdown_aborts_all_and_leaves_a_usable_scheduler():
    scheduler = make_scheduler(max_num_seqs=1)
    requests = [add(scheduler, name, 3) for name in "ab"]
    step(scheduler)
    plan = scheduler.schedule()
    assert scheduler.shutdown() == requests
    with pytest.raises(AssertionError, match="not the next"):
        scheduler.update_from_output(plan, {"a": (1,)})
    assert_empty(scheduler)
    add(scheduler, "a", 3, max_tokens=1)
    step(scheduler)
    assert_empty(scheduler)
