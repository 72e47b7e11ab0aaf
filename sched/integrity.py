"""The scheduler's books, audited: what must be true between any two of its calls."""

from collections import Counter
from collections.abc import Collection

from folojax.sched.config import SchedulerConfig
from folojax.sched.memory import KVMemory
from folojax.sched.pages import PageAllocator, pages_for
from folojax.sched.queue import WaitingQueue
from folojax.sched.request import Request, RequestStatus


def check_integrity(
    config: SchedulerConfig,
    memory: KVMemory,
    requests: Collection[Request],
    running: Collection[Request],
    waiting: WaitingQueue,
) -> None:
    """Raises AssertionError unless requests, batch, queue and pages agree; O(everything)."""
    memory.allocator.check()
    _check_owners(memory.allocator, requests)
    _check_contents(memory, running)
    _check_places(config, requests, running, waiting)
    if memory.states is not None:
        memory.states.check(running)
    memory.host.check([request.saved for request in requests if request.saved is not None])
    for request in running:
        assert request.status is RequestStatus.RUNNING, f"in the batch, but {request}"
        assert request.num_computed_tokens < request.num_tokens, f"nothing to do for {request}"
        assert request.saved is None, f"in the batch, and saved: {request}"
        num_left = request.num_expected_tokens - request.num_planned_tokens
        assert num_left >= 0, f"more is planned than there will be: {request}"
        if num_left > 1:
            is_even = request.num_planned_tokens < request.plans_evenly_until
            assert not is_even, f"more than a token is left of {request}"
        held = len(request.page_ids)
        least = pages_for(request.num_planned_tokens, config.page_size)
        most = pages_for(request.num_expected_tokens, config.page_size)
        assert least <= held <= most, f"{held} pages, not {least} to {most}: {request}"
    for request in waiting:
        is_waiting = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        assert is_waiting, f"in the queue, but {request}"
        assert not request.page_ids, f"in the queue with pages: {request}"
        assert request.num_planned_tokens == 0, f"in the queue with K/V: {request}"


def _check_owners(allocator: PageAllocator, requests: Collection[Request]) -> None:
    """Every page in use belongs to unfinished requests, and to as many as its count says."""
    owners = Counter(page for request in requests for page in request.page_ids)
    assert len(owners) == allocator.num_used, (
        f"requests own {len(owners)} pages, {allocator.num_used} are in use"
    )
    for page, count in owners.items():
        assert count == allocator.ref_count(page), (
            f"page {page} has {count} owners and a count of {allocator.ref_count(page)}"
        )


def _check_contents(memory: KVMemory, running: Collection[Request]) -> None:
    """Cached pages hold what they are cached for; a page to be written has one owner."""
    prefixes = dict(memory.cache.prefixes())
    for request in running:
        for index, page in enumerate(request.page_ids):
            end = (index + 1) * memory.page_size
            if end > request.num_planned_tokens:
                is_own = memory.allocator.ref_count(page) == 1 and page not in prefixes
                assert is_own, f"page {page} is to be written, and is not its own: {request}"
            elif page in prefixes:
                is_same = prefixes[page] == request.tokens_between(0, end)
                assert is_same, f"page {page} is cached for other tokens than those of {request}"


def _check_places(
    config: SchedulerConfig,
    requests: Collection[Request],
    running: Collection[Request],
    waiting: WaitingQueue,
) -> None:
    """Every unfinished request is in the batch or in the queue, in the order of its policy."""
    placed = [*running, *waiting]
    assert len(placed) == len(requests), "a request is lost, or in two places"
    assert set(placed) == set(requests), "batch and queue hold other requests than are remembered"
    assert len(running) <= config.max_num_seqs, f"{len(running)} requests run"
    if config.scheduling_policy == "fcfs":
        # (One of a group may be passed by others while it waits for the prompt to be computed, and
        # one with an adapter while it waits for room for that.)
        plain = [one for one in placed if one.group is None and one.adapter is None]
        arrivals = [request.arrival_index for request in plain]
        assert arrivals == sorted(arrivals), f"out of the order of arrival: {arrivals}"
    else:
        urgencies = [(request.priority, request.arrival_index) for request in waiting]
        assert urgencies == sorted(urgencies), f"out of the order of priority: {urgencies}"
