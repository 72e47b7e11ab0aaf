"""Requests with adapters: few different ones in a step, prefixes by adapter, nobody starves."""

from folojax.sched.request import RequestStatus
from tests.sched.helpers import add, make_scheduler, step


def test_a_step_has_no_more_adapters_than_there_is_room_for() -> None:
    scheduler = make_scheduler(max_loras=2)
    kinds = ["a", None, "b", "c", "a", None]
    requests = [
        add(scheduler, str(i), 5, max_tokens=4 + 4 * (i == 0), adapter=kind)
        for i, kind in enumerate(kinds)
    ]
    plan = step(scheduler)
    assert list(plan.num_scheduled_tokens) == ["0", "1", "2", "4", "5"], "c waits, others pass"
    while requests[3].status is RequestStatus.WAITING:
        running = {one.adapter for one in requests if one.status is RequestStatus.RUNNING}
        assert len(running - {None}) <= 2
        step(scheduler)
    assert requests[2].is_finished, "b has left its place"
    while scheduler.has_unfinished_requests():
        step(scheduler)


def test_only_so_many_pass_one_that_waits_for_room() -> None:
    scheduler = make_scheduler(max_loras=1, max_num_seqs=2)
    add(scheduler, "first", 5, max_tokens=40, adapter="a")
    waits = add(scheduler, "waits", 5, max_tokens=1, adapter="b")
    others = [add(scheduler, str(i), 5, max_tokens=1, adapter="a") for i in range(20)]
    while not waits.is_finished:
        step(scheduler)
    assert sum(one.is_finished for one in others) == 4 * 2
    while scheduler.has_unfinished_requests():
        step(scheduler)


def test_prefixes_are_found_by_requests_of_the_same_adapter_until_it_is_dropped() -> None:
    scheduler = make_scheduler(max_loras=4, enable_prefix_caching=True)

    def cached(name: str, adapter: str | None) -> int:
        request = add(scheduler, name, 12, max_tokens=2, adapter=adapter)
        while not request.is_finished:
            step(scheduler)
        return request.num_cached_tokens

    assert [cached(f"{kind}1", kind) for kind in (None, "a", "b")] == [0, 0, 0]
    assert [cached(f"{kind}2", kind) for kind in (None, "a", "b")] == [8, 8, 8]
    num_idle = scheduler.memory.allocator.num_idle
    scheduler.drop_adapter("a", keeps_running=False)
    scheduler.check()
    assert scheduler.memory.allocator.num_idle < num_idle
    assert [cached(f"{kind}3", kind) for kind in (None, "a", "b")] == [8, 0, 8]


def test_requests_that_run_go_back_to_the_queue_or_keep_what_they_have() -> None:
    for keeps_running in (False, True):
        scheduler = make_scheduler(max_loras=2, enable_prefix_caching=True)
        mine = add(scheduler, "mine", 12, adapter="a")
        other = add(scheduler, "other", 12, adapter="b")
        for _ in range(3):
            step(scheduler)
        num_computed = mine.num_computed_tokens
        scheduler.drop_adapter("a", keeps_running=keeps_running)
        scheduler.check()
        assert mine.num_computed_tokens == (num_computed if keeps_running else 0)
        assert other.status is RequestStatus.RUNNING
        late = add(scheduler, "late", 12, adapter="a")
        while scheduler.has_unfinished_requests():
            step(scheduler)
        assert late.num_cached_tokens == 0 or not keeps_running
