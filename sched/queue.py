"""Who waits, and in what order: first come first served, or priority and then arrival."""

import bisect
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from folojax.sched.request import Request


class RequestQueue(ABC):
    """Waiting requests, each at most once, in the order in which they are to be admitted."""

    @abstractmethod
    def add(self, request: Request) -> None:
        """Puts a new request where its policy wants it."""

    @abstractmethod
    def prepend(self, request: Request) -> None:
        """Puts a preempted request back, ahead of the others as far as the policy allows."""

    def prepend_many(self, requests: Iterable[Request]) -> None:
        """Puts several requests back; among themselves they keep the order given."""
        for request in reversed(list(requests)):
            self.prepend(request)

    @abstractmethod
    def peek(self) -> Request:
        """Returns the next request and leaves it there; IndexError when there is none."""

    def pop(self) -> Request:
        """Takes the next request out; IndexError when there is none."""
        request = self.peek()
        self.remove(request)
        return request

    @abstractmethod
    def remove(self, request: Request) -> None:
        """Takes one request out, wherever it is; ValueError when it is not here."""

    def remove_many(self, requests: Iterable[Request]) -> None:
        """Takes several requests out; ValueError at the first that is not here."""
        for request in requests:
            self.remove(request)

    @abstractmethod
    def __len__(self) -> int: ...

    def __bool__(self) -> bool:
        return len(self) > 0

    @abstractmethod
    def __iter__(self) -> Iterator[Request]:
        """Goes through the requests in the order in which `pop` would return them."""


class FCFSQueue(RequestQueue):
    """First come, first served; a prepended request comes before all others. All is O(1)."""

    def __init__(self) -> None:
        # An ordered dict rather than a deque: an abort takes a request out of the middle.
        self._requests: OrderedDict[Request, None] = OrderedDict()

    def add(self, request: Request) -> None:
        """Puts a request at the end."""
        assert request not in self._requests, f"{request.request_id!r} is in the queue already"
        self._requests[request] = None

    def prepend(self, request: Request) -> None:
        """Puts a request at the front."""
        self.add(request)
        self._requests.move_to_end(request, last=False)

    def peek(self) -> Request:
        """Returns the request at the front; IndexError when there is none."""
        if not self._requests:
            raise IndexError("the queue is empty")
        return next(iter(self._requests))

    def remove(self, request: Request) -> None:
        """Takes one request out, wherever it is; ValueError when it is not here."""
        if request not in self._requests:
            raise ValueError(f"request {request.request_id!r} is not in the queue")
        del self._requests[request]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)


class PriorityQueue(RequestQueue):
    """Smallest `priority` first, then earliest arrival; `prepend` is `add`.

    A preempted request arrived before the later ones of its priority, so it comes back ahead of
    them by the order itself.
    """

    def __init__(self) -> None:
        # The most urgent last, so that taking it is O(1); insertion moves pointers only.
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        """Puts a request at its place; among equals the one that was here first stays ahead."""
        index = bisect.bisect_left(
            self._requests, _reversed_urgency(request), key=_reversed_urgency
        )
        self._requests.insert(index, request)

    def prepend(self, request: Request) -> None:
        """Puts a request at its place."""
        self.add(request)

    def peek(self) -> Request:
        """Returns the most urgent request; IndexError when there is none."""
        if not self._requests:
            raise IndexError("the queue is empty")
        return self._requests[-1]

    def remove(self, request: Request) -> None:
        """Takes one request out, wherever it is; ValueError when it is not here."""
        wanted = _reversed_urgency(request)
        index = bisect.bisect_left(self._requests, wanted, key=_reversed_urgency)
        try:
            del self._requests[self._requests.index(request, index)]
        except ValueError:
            raise ValueError(f"request {request.request_id!r} is not in the queue") from None

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return reversed(self._requests)


def _reversed_urgency(request: Request) -> tuple[int, int]:
    priority, arrival_index = request.urgency
    return -priority, -arrival_index


def choose_victim(running: Sequence[Request], policy: str) -> Request:
    """Whom to preempt: the last of the batch, or the least urgent."""
    if policy == "priority":
        return max(running, key=lambda request: request.urgency)
    return running[-1]


_QUEUES: dict[str, type[RequestQueue]] = {"fcfs": FCFSQueue, "priority": PriorityQueue}

POLICIES = tuple(_QUEUES)
"""The names that `make_queue` knows."""


def make_queue(policy: str) -> RequestQueue:
    """Returns an empty queue of the policy "fcfs" or "priority"; ValueError for another name."""
    if policy not in _QUEUES:
        raise ValueError(f"policy is {policy!r}; it must be one of {', '.join(POLICIES)}")
    return _QUEUES[policy]()
