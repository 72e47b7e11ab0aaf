"""Laws of the scheduler over random histories, on a device that notices any wrong page."""

import pytest
from hypothesis import given, settings

from folojax.sched.config import SchedulerConfig
from folojax.sched.request import RequestStatus, StopRule
from tests.sched.cases import (
    MAX_MODEL_LEN,
    Branch,
    Event,
    Job,
    all_at_once,
    branches,
    configs,
    events,
    job_lists,
)
from tests.sched.history import History


def check_laws(
    config: SchedulerConfig, jobs: list[Job], events: list[Event], branches: list[Branch]
) -> None:
    history = History(config, jobs, events, branches)
    history.run()

    for request in history.requests.values():
        expected = history.expected(request)
        assert request.is_finished
        if request.status is RequestStatus.FINISHED_ABORTED:
            assert request.output_token_ids == (expected or [])[: request.num_output_tokens]
            assert expected is None or len(expected) in (0, *range(request.num_output_tokens, 99))
        elif expected is None:
            assert request.status is RequestStatus.FINISHED_ERROR
            assert request.num_output_tokens == history.num_given.get(request.request_id, 0)
        else:
            assert request.output_token_ids == expected
            stop = request.stop
            has_stopped = request.status is RequestStatus.FINISHED_STOPPED
            assert has_stopped == (
                len(expected) >= max(stop.min_tokens, 1)
                and expected[-1] in stop.eos_token_ids | stop.stop_token_ids
            )
        assert (request.page_ids, request.num_computed_tokens) == ([], 0)
        num_given = history.num_given.get(request.request_id, 0)
        assert request.num_cached_tokens < request.num_prompt_tokens + num_given
        assert request.saved is None
        assert request.forked_from is None

    # Nothing stays behind but what the cache keeps, and every end was reported once.
    scheduler = history.scheduler
    memory = scheduler.memory
    assert scheduler.memory.allocator.num_used == 0
    assert scheduler.memory.allocator.num_free == config.num_pages - memory.cache.num_pages
    if not config.enable_prefix_caching:
        assert memory.cache.num_pages == memory.num_query_tokens == memory.num_hit_tokens == 0
    assert memory.num_hit_tokens <= memory.num_query_tokens
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert all(scheduler.get_request(name) is None for name in history.requests)
    assert sorted(history.reported_finished) == sorted(history.requests)
    assert history.runner.rows == history.runner.host == {}
    assert memory.host.num_used == 0
    assert history.num_preemptions == sum(r.num_preemptions for r in history.requests.values())
    assert scheduler.in_flight.num_discarded_tokens == history.num_discarded.total()
    if not any(event.kind in ("preempt_all", "reset") for event in events):
        # An end by length is foreseen; one by a token is seen when it is read.
        num_steps = config.max_decode_steps
        most = {
            RequestStatus.FINISHED_LENGTH: 0,
            RequestStatus.FINISHED_ABORTED: config.max_plans_in_flight * num_steps,
        }
        for name, count in history.num_discarded.items():
            status = history.requests[name].status
            assert count <= most.get(status, config.max_plans_in_flight * num_steps - 1)
    assert all(request.num_samples_in_flight == 0 for request in history.requests.values())
    assert scheduler.reset_prefix_cache()
    scheduler.check()
    assert scheduler.memory.allocator.num_free == config.num_pages
    assert memory.cache.root.children == {}

    if config.scheduling_policy == "fcfs":
        arrivals = [
            history.requests[name].arrival_index
            for name in history.admission_order
            if history.requests[name].group is None
        ]
        assert arrivals == sorted(arrivals)


@settings(max_examples=400, deadline=None)
@given(config=configs(), jobs=job_lists(), events=events, branches=branches)
def test_laws_over_random_histories(config, jobs, events, branches):
    check_laws(config, jobs, events, branches)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(config=configs(), jobs=job_lists(max_size=12), events=events, branches=branches)
def test_laws_over_many_random_histories(config, jobs, events, branches):
    check_laws(config, jobs, events, branches)


@settings(max_examples=100, deadline=None)
@given(config=configs(), jobs=job_lists())
def test_most_urgent_is_never_a_victim(config: SchedulerConfig, jobs: list[Job]):
    history = History(config, all_at_once(jobs))
    history.run()
    requests = history.requests.values()
    if config.scheduling_policy == "priority":
        assert min(requests, key=lambda one: (one.priority, one.arrival_index)).num_preemptions == 0
    else:
        assert min(requests, key=lambda request: request.arrival_index).num_preemptions == 0


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_histories_do_preempt(policy, enable_prefix_caching):
    """The laws above would be hollow if pages never ran out; here they do, under both policies."""
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=MAX_MODEL_LEN,
        num_pages=8,
        page_size=3,
        scheduling_policy=policy,
        enable_prefix_caching=enable_prefix_caching,
    )
    stop = StopRule(max_tokens=MAX_MODEL_LEN)
    history = History(config, [Job(0, (n, 1), stop, -n) for n in range(4)])
    history.run()
    assert history.num_preemptions > 0
    for request in history.requests.values():
        assert request.output_token_ids == history.expected(request)
