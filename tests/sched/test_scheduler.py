"""Plans, example by example; the laws over random histories are in the properties file."""

from folojax.sched.request import RequestStatus
from tests.sched.helpers import TOKEN, add, make_scheduler, step


def test_add_gives_one_waiting():
    scheduler = make_scheduler()
    assert not scheduler.has_unfinished_requests()
    request = add(scheduler, "a", 5)
    assert (scheduler.num_waiting, scheduler.num_running) == (1, 0)
    assert scheduler.has_unfinished_requests()
    assert scheduler.get_request("a") is request
    assert request.status is RequestStatus.WAITING
    assert request.arrival_index == 0


def test_short_prompt_is_scheduled_whole_and_runs():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 5)
    plan = scheduler.schedule()
    assert plan.num_scheduled_tokens == {"a": 5}
    assert plan.total_num_scheduled_tokens == 5
    assert plan.sampled_request_ids == ("a",)
    assert not plan.is_empty
    assert plan.new_requests == (request,)
    assert (request.num_computed_tokens, request.page_ids) == (0, [0, 1])
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)
    assert request.status is RequestStatus.RUNNING
    assert request.num_computed_tokens == 0, "counts what is in the cache, not what is planned"


def test_three_prompts_in_one_step():
    scheduler = make_scheduler()
    for name in "abc":
        add(scheduler, name, 10)
    plan = scheduler.schedule()
    assert plan.total_num_scheduled_tokens == 30
    assert [new.request_id for new in plan.new_requests] == ["a", "b", "c"]


def test_without_chunking_whole_prompts_only():
    scheduler = make_scheduler(
        max_num_batched_tokens=25, max_model_len=25, enable_chunked_prefill=False
    )
    for name in "abcde":
        add(scheduler, name, 20)
    assert scheduler.schedule().num_scheduled_tokens == {"a": 20}
    assert scheduler.num_waiting == 4


def test_without_chunking_nobody_jumps_the_head_of_the_queue():
    scheduler = make_scheduler(
        max_num_batched_tokens=25, max_model_len=25, enable_chunked_prefill=False
    )
    for name, prompt_len in [("a", 20), ("large", 20), ("small", 2)]:
        add(scheduler, name, prompt_len)
    assert step(scheduler).num_scheduled_tokens == {"a": 20}
    assert step(scheduler).num_scheduled_tokens == {"a": 1, "large": 20, "small": 2}


def test_prompts_are_cut_into_chunks_of_the_budget():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    request = add(scheduler, "a", 20)
    plans = [step(scheduler) for _ in range(4)]
    assert [plan.num_scheduled_tokens["a"] for plan in plans] == [8, 8, 4, 1]
    assert [plan.sampled_request_ids for plan in plans] == [(), (), ("a",), ("a",)]
    assert plans[1].new_page_ids == {"a": [2, 3]}
    assert request.output_token_ids == [TOKEN, TOKEN]


def test_long_prompts_share_the_budget_under_a_cap():
    scheduler = make_scheduler(
        max_num_batched_tokens=1024,
        long_prefill_token_threshold=400,
        max_model_len=1024,
        num_pages=1024,
    )
    for name in "abc":
        add(scheduler, name, 800)
    plans = [step(scheduler) for _ in range(3)]
    assert [list(plan.num_scheduled_tokens.values()) for plan in plans] == [
        [400, 400, 224],
        [400, 400, 224],
        [1, 1, 352],
    ]
    assert [plan.sampled_request_ids for plan in plans] == [(), ("a", "b"), ("a", "b", "c")]


def test_decoding_reports_differences_only():
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    add(scheduler, "b", 4)
    plan = step(scheduler)
    scheduled = scheduler.schedule()
    assert scheduled.new_requests == ()
    assert scheduled.new_page_ids == {"b": [2]}, "only b's fifth token opens a page"
    assert scheduled.num_scheduled_tokens == {"a": 1, "b": 1}
    assert plan.finished_request_ids == plan.preempted_request_ids == ()


def test_max_num_seqs_limits_the_batch():
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        add(scheduler, name, 3, max_tokens=2)
    assert list(step(scheduler).num_scheduled_tokens) == ["a", "b"]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    assert list(step(scheduler).num_scheduled_tokens) == ["a", "b"]
    assert list(step(scheduler).num_scheduled_tokens) == ["c"]


def test_late_arrival_joins_behind_the_running():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, "a", 4)
    step(scheduler)
    add(scheduler, "late", 12)
    plan = step(scheduler)
    assert list(plan.num_scheduled_tokens.items()) == [("a", 1), ("late", 9)]
    assert [new.request_id for new in plan.new_requests] == ["late"]


def test_priority_decides_who_is_admitted():
    scheduler = make_scheduler(max_num_seqs=1, scheduling_policy="priority")
    for name, priority in [("low", 3), ("first", 1), ("second", 1)]:
        add(scheduler, name, 3, max_tokens=1, priority=priority)
    assert [list(step(scheduler).num_scheduled_tokens) for _ in range(3)] == [
        ["first"],
        ["second"],
        ["low"],
    ]


def test_nothing_to_do_is_an_empty_plan():
    scheduler = make_scheduler()
    plan = scheduler.schedule()
    assert plan.is_empty
    assert plan.num_scheduled_tokens == {}
    assert scheduler.update_from_output(plan, {}) == []
