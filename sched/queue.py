"""Who waits, and in what order: first come first served, or priority and then arrival."""

import bisect
from collections.abc import Iterable, Iterator, Sequence

from folojax.sched.request import Request

POLICIES = ("fcfs", "priority")


class WaitingQueue:
    """Waiting requests, each at most once, in the order in which they are to be admitted.

    That is the order of arrival; under "priority" the smallest priority goes first, then the
    earliest arrival. A preempted request is put back by the same rule: it arrived before those that
    have never run.
    """

    def __init__(self, policy: str) -> None:
        self._is_by_priority = policy == "priority"
        # The next one last, so that taking it is O(1); to put one elsewhere moves pointers only.
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        """Puts a request at its place."""
        self._requests.insert(self._place(request), request)

    def remove(self, requests: Iterable[Request]) -> None:
        """Takes requests out, wherever they are; AssertionError at the first that is not here."""
        for request in requests:
            place = self._place(request)
            is_here = self._requests[place : place + 1] == [request]
            assert is_here, f"{request.request_id!r} is not in the queue"
            del self._requests[place]

    def least_urgent(self, running: Sequence[Request]) -> Request:
        """Whom of the batch to preempt: its last request, or the least urgent one."""
        if not self._is_by_priority:
            return running[-1]
        return max(running, key=lambda request: (request.priority, request.arrival_index))

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Goes through the requests, the next to be admitted first."""
        return reversed(self._requests)

    def _place(self, request: Request) -> int:
        return bisect.bisect_left(self._requests, self._key(request), key=self._key)

    def _key(self, request: Request) -> tuple[int, int]:
        return -request.priority if self._is_by_priority else 0, -request.arrival_index
