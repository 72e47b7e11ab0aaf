"""Who waits for pages, who loses them, and how he comes back."""

import pytest

from folojax.sched.request import RequestStatus
from tests.sched.helpers import TOKEN, add, assert_empty, commit, make_scheduler, step


def test_waits_for_pages_without_preempting():
    scheduler = make_scheduler(num_pages=4)
    add(scheduler, "a", 12, max_tokens=4)
    add(scheduler, "b", 8, max_tokens=4)
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 12}
    assert plan.preempted_request_ids == ()
    assert scheduler.num_waiting == 1


def test_last_running_is_preempted_and_resumed_with_its_output():
    scheduler = make_scheduler(num_pages=4)
    a = add(scheduler, "a", 7, max_tokens=9)
    b = add(scheduler, "b", 7, max_tokens=9)
    c = add(scheduler, "c", 1, max_tokens=1)
    step(scheduler)
    step(scheduler)  # a and b: 8 of 8 tokens computed, the pool is full

    plan = step(scheduler)
    assert plan.preempted_request_ids == ("b",)
    assert plan.num_scheduled_tokens == {"a": 1}, "no admission in a step that preempted"
    assert b.status is RequestStatus.PREEMPTED
    assert (b.num_computed_tokens, b.page_ids, b.num_preemptions) == (0, [], 1)
    assert b.output_token_ids == [TOKEN, TOKEN]
    assert scheduler.num_waiting == 2

    while scheduler.num_running and a.status is RequestStatus.RUNNING:
        plan = step(scheduler)
        assert plan.new_requests == (), "b needs three pages, and c must not jump it"
    plan = step(scheduler)
    resumed, new = plan.new_requests
    assert (resumed.request_id, new.request_id) == ("b", "c")
    assert resumed.output_token_ids == [TOKEN, TOKEN]
    assert resumed.num_computed_tokens == 0
    assert plan.num_scheduled_tokens == {"b": 9, "c": 1}
    assert plan.sampled_request_ids == ("b", "c")
    assert b.output_token_ids == [TOKEN] * 3
    plan = scheduler.schedule()
    assert list(plan.num_scheduled_tokens) == ["b"]
    assert plan.finished_request_ids == ("c",)
    assert c.is_finished


def test_request_may_be_its_own_victim():
    scheduler = make_scheduler(num_pages=4)
    add(scheduler, "a", 4, max_tokens=8)
    b = add(scheduler, "b", 11, max_tokens=5)
    step(scheduler)
    step(scheduler)  # a: 5 tokens in two pages; b has lost its three
    assert b.num_preemptions == 1

    scheduler = make_scheduler(num_pages=4)
    a = add(scheduler, "a", 5, max_tokens=8)
    b = add(scheduler, "b", 8, max_tokens=8)
    step(scheduler)
    plan = step(scheduler)  # a has room in its second page; b needs a third
    assert plan.num_scheduled_tokens == {"a": 1}
    assert plan.preempted_request_ids == ("b",)
    assert (a.num_preemptions, b.num_preemptions) == (0, 1)


def test_victim_has_the_lowest_priority_and_its_tokens_leave_the_plan():
    scheduler = make_scheduler(num_pages=6, scheduling_policy="priority", max_num_batched_tokens=16)
    add(scheduler, "low", 7, max_tokens=8, priority=2)
    step(scheduler)
    low, middle, high = (
        scheduler.get_request("low"),
        add(scheduler, "middle", 7, max_tokens=8, priority=1),
        add(scheduler, "high", 8, max_tokens=8, priority=0),
    )
    plan = step(scheduler)
    assert list(plan.num_scheduled_tokens.items()) == [("low", 1), ("high", 8), ("middle", 7)]
    plan = scheduler.schedule()  # low takes no page, as it is preempted for high
    assert plan.preempted_request_ids == ("low",)
    assert list(plan.num_scheduled_tokens.items()) == [("high", 1), ("middle", 1)]
    assert plan.new_requests == ()
    assert plan.total_num_scheduled_tokens == 2
    commit(scheduler, plan)
    assert [r.num_preemptions for r in (low, middle, high) if r] == [1, 0, 0]


def test_latest_arrival_is_the_victim_among_equal_priorities():
    scheduler = make_scheduler(num_pages=4, scheduling_policy="priority")
    requests = [add(scheduler, name, 8, max_tokens=8, priority=1) for name in "ab"]
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted_request_ids == ("b",)
    assert plan.num_scheduled_tokens == {"a": 1}
    assert [request.num_preemptions for request in requests] == [0, 1]


def test_budget_of_a_victim_is_given_back():
    scheduler = make_scheduler(
        num_pages=8,
        scheduling_policy="priority",
        max_num_batched_tokens=16,
        long_prefill_token_threshold=8,
    )
    add(scheduler, "low", 7, max_tokens=8, priority=2)
    step(scheduler)
    add(scheduler, "high", 24, max_tokens=4, priority=0)
    add(scheduler, "middle", 24, max_tokens=4, priority=1)
    assert step(scheduler).num_scheduled_tokens == {"low": 1, "high": 8, "middle": 7}
    plan = step(scheduler)  # low takes the seventh page; high needs two more
    assert plan.preempted_request_ids == ("low",)
    assert plan.num_scheduled_tokens == {"high": 8, "middle": 8}


def test_several_victims_of_one_step_keep_their_order():
    scheduler = make_scheduler(num_pages=6, long_prefill_token_threshold=12)
    add(scheduler, "a", 20, max_tokens=4)
    for name in "bcd":
        add(scheduler, name, 2, max_tokens=10)
    assert step(scheduler).num_scheduled_tokens == {"a": 12, "b": 2, "c": 2, "d": 2}
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 8, "b": 1}
    assert plan.preempted_request_ids == ("d", "c")
    resumed: list[str] = []
    while scheduler.has_unfinished_requests():
        resumed.extend(new.request_id for new in step(scheduler).new_requests)
    assert list(dict.fromkeys(resumed)) == ["b", "c", "d"]
    assert_empty(scheduler)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_preempt_all_empties_the_pool_and_keeps_output_and_order(policy):
    scheduler = make_scheduler(scheduling_policy=policy, max_num_seqs=3, max_num_batched_tokens=20)
    requests = [add(scheduler, name, 6, max_tokens=4) for name in "abcd"]
    step(scheduler)
    scheduler.preempt_all()
    scheduler.check()
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 4)
    assert scheduler.memory.allocator.num_used == 0
    assert [request.num_preemptions for request in requests] == [1, 1, 1, 0]
    plan = step(scheduler)
    assert sorted(plan.preempted_request_ids) == ["a", "b", "c"]
    assert plan.num_scheduled_tokens == {"a": 7, "b": 7, "c": 6}, "admitted again at once"
    assert [new.output_token_ids for new in plan.new_requests] == [[TOKEN]] * 3
    while scheduler.has_unfinished_requests():
        assert step(scheduler).preempted_request_ids == ()
    assert [request.output_token_ids for request in requests] == [[TOKEN] * 4] * 4
    assert_empty(scheduler)


def test_preempt_all_while_a_step_runs_drops_its_samples():
    scheduler = make_scheduler()
    a, b = (add(scheduler, name, 3, max_tokens=2) for name in "ab")
    plan = scheduler.schedule()
    scheduler.preempt_all()
    scheduler.abort_requests("b")
    assert scheduler.update_from_output(plan, {"a": (1,), "b": (1,)}) == []
    scheduler.check()
    assert a.output_token_ids == b.output_token_ids == []
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 3}
    assert plan.finished_request_ids == ("b",)
