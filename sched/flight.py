"""Plans that were made and whose results have not been taken in: the device is behind the host.

::

    host     schedule 1 | schedule 2 | take in 1, schedule 3 | take in 2, schedule 4 | ...
    device              |   run 1    |        run 2          |        run 3          |

When plan 2 is made, the token that plan 1 samples is not known, only that there will be one; the
device has it in time. What the host learns late (an end token, an abort) can find the request in a
later plan already. That plan's token for it is then no longer awaited, and is discarded.
"""

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
            request.num_samples_in_flight -= request_id in sampled

    def forget(self, request: Request) -> None:
        """Awaits nothing more for a request, which has finished."""
        if self.requests.get(request.request_id) is request:
            del self.requests[request.request_id]

    def forget_chunk(self, request: Request) -> None:
        """Awaits nothing more for a request that lost its pages, unless a token was sampled.

        A token is worth as much as before; what else was computed has gone with the pages.
        """
        if request.request_id not in self.plan.sampled_request_ids:
            self.forget(request)

    def forget_all(self) -> None:
        """Awaits nothing more; every request is to sample again what the plan samples."""
        for request in self.requests.values():
            request.num_samples_in_flight = 0
        self.requests = {}
