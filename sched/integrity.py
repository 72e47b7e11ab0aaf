"""The scheduler's books, audited: what must be true between any two of its calls."""

from collections import Counter
from collections.abc import Collection

from folojax.sched.config import SchedulerConfig
from folojax.sched.pages import PageAllocator, pages_for
from folojax.sched.queue import RequestQueue
from folojax.sched.request import Request, RequestStatus


def check_integrity(
    config: SchedulerConfig,
    allocator: PageAllocator,
    requests: Collection[Request],
    running: Collection[Request],
    waiting: RequestQueue,
) -> None:
    """Raises AssertionError unless requests, batch, queue and pages agree; O(everything)."""
    allocator.check()
    _check_owners(allocator, requests)
    _check_places(config, requests, running, waiting)
    for request in running:
        assert request.status is RequestStatus.RUNNING, f"in the batch, but {request}"
        assert request.num_computed_tokens < request.num_tokens, f"nothing to do for {request}"
        held = len(request.page_ids)
        least = pages_for(request.num_computed_tokens, config.page_size)
        most = pages_for(request.num_tokens, config.page_size)
        assert least <= held <= most, f"{held} pages, not {least} to {most}: {request}"
    for request in waiting:
        is_waiting = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        assert is_waiting, f"in the queue, but {request}"
        assert not request.page_ids, f"in the queue with pages: {request}"
        assert request.num_computed_tokens == 0, f"in the queue with K/V: {request}"


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


def _check_places(
    config: SchedulerConfig,
    requests: Collection[Request],
    running: Collection[Request],
    waiting: RequestQueue,
) -> None:
    """Every unfinished request is in the batch or in the queue, in the order of its policy."""
    placed = [*running, *waiting]
    assert len(placed) == len(requests), "a request is lost, or in two places"
    assert set(placed) == set(requests), "batch and queue hold other requests than are remembered"
    assert len(running) <= config.max_num_seqs, f"{len(running)} requests run"
    if config.policy == "fcfs":
        arrivals = [request.arrival_index for request in placed]
        assert arrivals == sorted(arrivals), f"out of the order of arrival: {arrivals}"
    else:
        urgencies = [request.urgency for request in waiting]
        assert urgencies == sorted(urgencies), f"out of the order of priority: {urgencies}"
