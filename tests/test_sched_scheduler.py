"""The scheduler, example by example; its laws over random histories are in the properties file."""

from collections.abc import Callable

import pytest

from folojax.sched.plan import SchedulerOutput
from folojax.sched.request import Request, RequestStatus, StopRule
from folojax.sched.scheduler import Scheduler, SchedulerConfig

TOKEN = 7


def make_config(**changes) -> SchedulerConfig:
    fields = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 100,
        "max_model_len": 64,
        "num_pages": 64,
        "page_size": 4,
    }
    return SchedulerConfig(**(fields | changes))


def make_scheduler(**changes) -> Scheduler:
    return Scheduler(make_config(**changes))


def make_request(
    name: str, prompt_len: int, max_tokens: int = 8, *, priority: int = 0, params=None, **stop
) -> Request:
    rule = StopRule(max_tokens=max_tokens, **stop)
    return Request(name, tuple(range(100, 100 + prompt_len)), rule, params, priority)


def add(scheduler: Scheduler, name: str, prompt_len: int, max_tokens: int = 8, **rest) -> Request:
    request = make_request(name, prompt_len, max_tokens, **rest)
    scheduler.add_request(request)
    return request


def commit(scheduler: Scheduler, plan: SchedulerOutput, token: int = TOKEN):
    updates = scheduler.update_from_output(plan, dict.fromkeys(plan.sampled_request_ids, token))
    scheduler.check()
    return updates


def step(scheduler: Scheduler, token: int = TOKEN) -> SchedulerOutput:
    plan = scheduler.schedule()
    scheduler.check()
    commit(scheduler, plan, token)
    return plan


def assert_empty(scheduler: Scheduler) -> None:
    scheduler.check()
    assert not scheduler.has_unfinished_requests()
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.allocator.num_free == scheduler.config.num_pages
    scheduler.schedule()
    assert not scheduler.has_finished_requests()


# --- Scheduling -----------------------------------------------------------------------------


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
    params = object()
    request = add(scheduler, "a", 5, params=params)
    plan = scheduler.schedule()
    assert plan.num_scheduled_tokens == {"a": 5}
    assert plan.total_num_scheduled_tokens == 5
    assert plan.sampled_request_ids == ("a",)
    assert not plan.is_empty
    (new,) = plan.new_requests
    assert (new.request_id, new.prompt_token_ids) == ("a", request.prompt_token_ids)
    assert new.params is params
    assert (new.num_computed_tokens, new.output_token_ids, new.page_ids) == (0, (), (0, 1))
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
    cached = plans[1].cached_requests
    assert cached.new_token_ids == ((),)
    assert cached.num_computed_tokens == (8,)
    assert cached.new_page_ids == ((2, 3),)
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
    cached = scheduled.cached_requests
    assert cached.request_ids == ("a", "b")
    assert cached.new_token_ids == ((TOKEN,), (TOKEN,))
    assert cached.num_computed_tokens == (3, 4)
    assert cached.new_page_ids == ((), (2,)), "only b's fifth token opens a page"
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
    assert plan.cached_requests.request_ids == ("a",)
    assert [new.request_id for new in plan.new_requests] == ["late"]


def test_priority_decides_who_is_admitted():
    scheduler = make_scheduler(max_num_seqs=1, policy="priority")
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


# --- Pages and preemption -------------------------------------------------------------------


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
    assert resumed.output_token_ids == (TOKEN, TOKEN)
    assert resumed.num_computed_tokens == 0
    assert plan.num_scheduled_tokens == {"b": 9, "c": 1}
    assert plan.sampled_request_ids == ("b", "c")
    assert b.output_token_ids == [TOKEN] * 3
    plan = scheduler.schedule()
    assert plan.cached_requests.new_token_ids == ((TOKEN,),)
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
    scheduler = make_scheduler(num_pages=6, policy="priority", max_num_batched_tokens=16)
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
    assert plan.cached_requests.request_ids == ("high", "middle")
    assert plan.total_num_scheduled_tokens == 2
    commit(scheduler, plan)
    assert [r.num_preemptions for r in (low, middle, high) if r] == [1, 0, 0]


def test_latest_arrival_is_the_victim_among_equal_priorities():
    scheduler = make_scheduler(num_pages=4, policy="priority")
    requests = [add(scheduler, name, 8, max_tokens=8, priority=1) for name in "ab"]
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted_request_ids == ("b",)
    assert plan.num_scheduled_tokens == {"a": 1}
    assert [request.num_preemptions for request in requests] == [0, 1]


def test_budget_of_a_victim_is_given_back():
    scheduler = make_scheduler(
        num_pages=8, policy="priority", max_num_batched_tokens=16, long_prefill_token_threshold=8
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


# --- Ends -----------------------------------------------------------------------------------


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
    request = add(scheduler, "a", 3, **rule)
    for token in tokens:
        assert not request.is_finished
        plan = step(scheduler, token)
    assert request.status is status
    assert request.stop_reason == stop_reason
    assert request.output_token_ids == tokens
    assert plan.sampled_request_ids == ("a",)
    assert scheduler.get_request("a") is None
    assert scheduler.has_finished_requests()
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
    updates = scheduler.update_from_output(plan, {"b": 1}, failed={"a": "logits are NaN"})
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
        ({"a": 1, "b": 1}, {}, "not asked for: \\['b'\\]"),
        ({"a": 1, "x": 1}, {}, "not asked for: \\['x'\\]"),
        ({"a": 1}, {"a": "bad"}, "not asked for: \\['a'\\]"),
        ({"a": 1}, {"x": "bad"}, "not in the plan: \\['x'\\]"),
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
        scheduler.update_from_output(plan, {"a": 1})
    scheduler.schedule()
    with pytest.raises(AssertionError, match="not the latest"):
        scheduler.update_from_output(plan, {"a": 1})


def test_dropped_plan_is_planned_again():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, "a", 20)
    dropped = scheduler.schedule()
    plan = scheduler.schedule()
    assert plan.num_scheduled_tokens == dropped.num_scheduled_tokens == {"a": 8}
    commit(scheduler, plan)


# --- Aborts ---------------------------------------------------------------------------------


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
    scheduler.finish_requests("old", RequestStatus.FINISHED_ABORTED)


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
    ended = scheduler.finish_requests(["x", "x", "nobody"], RequestStatus.FINISHED_ABORTED)
    if request is None:
        assert ended == []
    else:
        assert ended == [request]
        assert request.status.finish_reason == "abort"
        assert len(request.output_token_ids) == num_outputs
        assert scheduler.has_finished_requests()
        assert "x" in scheduler.schedule().finished_request_ids
    assert_empty(scheduler)


@pytest.mark.parametrize("with_token", [True, False])
def test_abort_while_the_step_runs(with_token: bool):
    scheduler = make_scheduler()
    a, b = (add(scheduler, name, 3) for name in "ab")
    plan = scheduler.schedule()
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    sampled = {"a": 1, "b": 1} if with_token else {"b": 1}
    (update,) = scheduler.update_from_output(plan, sampled)
    assert update.request is b
    assert a.output_token_ids == []
    assert step(scheduler).finished_request_ids == ("a",)


def test_id_reused_while_the_step_runs_keeps_the_tokens_apart():
    scheduler = make_scheduler()
    old = add(scheduler, "a", 3)
    plan = scheduler.schedule()
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    new = add(scheduler, "a", 5)
    assert scheduler.update_from_output(plan, {"a": 1}) == []
    assert old.output_token_ids == new.output_token_ids == []
    plan = scheduler.schedule()
    assert plan.finished_request_ids == ("a",)
    assert plan.num_scheduled_tokens == {"a": 5}


def test_caller_may_stop_a_request_on_text():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3)
    step(scheduler)
    scheduler.finish_requests("a", RequestStatus.FINISHED_STOPPED, stop_reason="\n\n")
    assert (request.status.finish_reason, request.stop_reason) == ("stop", "\n\n")
    assert_empty(scheduler)


def test_finishing_needs_a_finished_status():
    with pytest.raises(AssertionError, match="does not finish"):
        make_scheduler().finish_requests("a", RequestStatus.PREEMPTED)


def test_shutdown_aborts_all_and_leaves_a_usable_scheduler():
    scheduler = make_scheduler(max_num_seqs=1)
    requests = [add(scheduler, name, 3) for name in "ab"]
    step(scheduler)
    plan = scheduler.schedule()
    assert scheduler.shutdown() == requests
    assert scheduler.update_from_output(plan, {"a": 1}) == []
    assert_empty(scheduler)
    add(scheduler, "a", 3, max_tokens=1)
    step(scheduler)
    assert_empty(scheduler)


# --- Refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "text"),
    [
        (0, 1, "prompt is empty"),
        (64, 1, "prompt has 64 tokens; max_model_len is 64 .* at most 63 tokens or raise"),
        (5000, 1, "prompt has 5,000 tokens"),
        (30, 12, "prompt of 30 tokens, max_tokens 12.* 11 pages of 4 tokens; the pool has 10"),
        (63, 100, "may need 16 pages"),
    ],
)
def test_requests_that_can_never_run_are_refused(prompt_len, max_tokens, text):
    scheduler = make_scheduler(num_pages=10)
    with pytest.raises(ValueError, match=text):
        add(scheduler, "a", prompt_len, max_tokens)
    assert_empty(scheduler)


def test_largest_request_that_fits_the_pool_runs_to_its_end():
    scheduler = make_scheduler(num_pages=10)
    request = add(scheduler, "a", 30, max_tokens=11)  # the last of 41 tokens needs no K/V
    while scheduler.has_unfinished_requests():
        step(scheduler)
    assert len(request.output_token_ids) == 11


def test_duplicate_id_is_refused_while_its_owner_lives():
    scheduler = make_scheduler()
    add(scheduler, "a", 3, max_tokens=1)
    with pytest.raises(ValueError, match="'a' belongs to an unfinished request"):
        add(scheduler, "a", 3)
    with pytest.raises(ValueError, match=r"empty.*; .*'a' belongs"):
        scheduler.validate(make_request("a", 0))
    step(scheduler)
    add(scheduler, "a", 3)


def test_prompt_over_budget_is_chunked_and_not_stuck():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, "a", 60, max_tokens=1)
    for _ in range(8):
        step(scheduler)
    assert_empty(scheduler)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"enable_chunked_prefill": False, "max_model_len": 128}, "100; without chunked prefill"),
        ({"max_num_seqs": 101}, "max_num_batched_tokens is 100; max_num_seqs is 101"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be an int of at least 1"),
        ({"max_model_len": 1}, "max_model_len is 1; .* at least 2"),
        ({"num_pages": 2.0}, "num_pages is 2.0; it must be an int"),
        ({"page_size": True}, "page_size is True; it must be an int"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold is -1"),
        (
            {"enable_chunked_prefill": False, "long_prefill_token_threshold": 9},
            "which enable_chunked_prefill=False forbids",
        ),
        ({"policy": "lifo"}, "policy is 'lifo'; it must be one of fcfs, priority"),
        ({"page_size": 0, "num_pages": 0}, "num_pages is 0.*; page_size is 0"),
    ],
)
def test_config_errors(changes, text):
    with pytest.raises(ValueError, match=text):
        make_config(**changes)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 1, "min_tokens": -1}, "min_tokens is -1"),
    ],
)
def test_stop_rule_errors(fields, text):
    with pytest.raises(ValueError, match=text):
        StopRule(**fields)


def test_finish_reasons():
    assert {status.name: status.finish_reason for status in RequestStatus} == {
        "WAITING": None,
        "RUNNING": None,
        "PREEMPTED": None,
        "FINISHED_STOPPED": "stop",
        "FINISHED_LENGTH": "length",
        "FINISHED_ABORTED": "abort",
        "FINISHED_ERROR": "error",
    }


def test_check_finds_a_leaked_page():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 8)
    step(scheduler)
    request.page_ids.pop()
    with pytest.raises(AssertionError, match="requests own 1 pages, 2 are in use"):
        scheduler.check()
