"""Plans that were made and whose results have not been taken in: the device is behind the host.

::

    host     schedule 1 | schedule 2 | take in 1, schedule 3 | take in 2, schedule 4 | ...
    device              |   run 1    |        run 2          |        run 3          |

When plan 2 is made, the token that plan 1 samples is not known, only that there will be one; the
device has it in time. What the host learns late (an end token, an abort) can find the request in a
later plan already. That plan's token for it is then no longer awaited, and is discarded.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from folojax.sched.plan import SchedulerOutput
from folojax.sched.request import Request


@dataclass(eq=False)
class Flight:
    """A plan under way.

    Attributes:
        plan: what the device was told.
        requests: by id, those of the plan whose result is awaited. Requests and not ids alone: a
            request that has finished since could not be told from one that took over its id.
    """

    plan: SchedulerOutput
    requests: dict[str, Request]

    def take_back(self) -> None:
        """Undoes what publishing the plan, the latest, noted in its requests."""
        sampled = set(self.plan.sampled_request_ids)
        for request_id, request in self.requests.items():
            request.num_tokens_in_flight -= self.plan.num_scheduled_tokens[request_id]
            if request_id in sampled:
                request.num_samples_in_flight -= self.plan.num_samples(request_id)

    def forget(self, request: Request) -> None:
        """Awaits nothing more for a request."""
        if self.requests.get(request.request_id) is request:
            del self.requests[request.request_id]


class Flights:
    """The plans under way, in order.

    Attributes:
        num_discarded_tokens: tokens that were sampled for requests that did not await them any
            more: they had finished, or were to be computed again.
    """

    def __init__(self) -> None:
        self.num_discarded_tokens = 0
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def add(self, plan: SchedulerOutput, requests: dict[str, Request]) -> None:
        """Takes in a plan that is published, and its requests by id."""
        self._flights.append(Flight(plan, requests))

    def take_back(self) -> None:
        """Drops the latest plan, which was never run."""
        self._flights.pop().take_back()

    def awaited(self, plan: SchedulerOutput) -> Mapping[str, Request]:
        """Returns the requests that await their results of a plan, by id; for reading.

        Without any, the plan can be taken in with nothing sampled.
        """
        return next(flight.requests for flight in self._flights if flight.plan is plan)

    def land(
        self, plan: SchedulerOutput, sampled: Mapping[str, Sequence[int]], failed: Collection[str]
    ) -> dict[str, Request]:
        """Takes out the earliest plan, and returns the requests that await its results.

        Args:
            plan: the one that was run.
            sampled: tokens by request id.
            failed: ids of requests that lack tokens, or all of them.

        Raises:
            AssertionError: another plan, or samples that don't belong to it; nothing has changed.
        """
        is_next = bool(self._flights) and plan is self._flights[0].plan
        assert is_next, "the plan is not the next to be taken in, or was taken in already"
        requests = self._flights[0].requests
        may_sample = set(plan.sampled_request_ids)
        is_ended = may_sample.difference(requests)
        missing = may_sample.difference(sampled, failed, is_ended)
        surplus = sampled.keys() - may_sample
        unknown = set(failed) - plan.num_scheduled_tokens.keys()
        assert not missing, f"no token for {sorted(missing)}"
        assert not surplus, f"a token that was not asked for: {sorted(surplus)}"
        assert not unknown, f"failed, but not in the plan: {sorted(unknown)}"
        for request_id in failed:
            has_all = len(sampled.get(request_id, ())) == plan.num_samples(request_id)
            assert not has_all, f"failed, with all tokens: {request_id!r}"
        self._flights.popleft()
        self.num_discarded_tokens += sum(
            plan.num_samples(request_id) for request_id in is_ended.difference(failed)
        )
        return requests

    def forget(self, request: Request) -> None:
        """Awaits nothing more for a request, which has finished."""
        request.num_samples_in_flight = 0
        for flight in self._flights:
            flight.forget(request)

    def forget_chunks(self, request: Request) -> None:
        """Awaits nothing but tokens for a request that has lost its pages.

        A token is worth as much as before; what else was computed has gone with the pages.
        """
        for flight in self._flights:
            if request.request_id not in flight.plan.sampled_request_ids:
                flight.forget(request)

    def forget_all(self) -> None:
        """Awaits nothing more; every request is to sample again what the plans sample."""
        for flight in self._flights:
            for request in flight.requests.values():
                request.num_samples_in_flight = 0
            flight.requests = {}

    def clear(self) -> None:
        """Drops all plans; what they give is not to be taken in."""
        self.forget_all()
        self._flights.clear()
