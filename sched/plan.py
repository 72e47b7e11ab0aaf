"""What one step is to compute: the scheduler's answer, and the draft that it grows from.

The batch of a step, in the order of `num_scheduled_tokens`::

    |<--- cached_requests --->|<------------- new_requests ------------->|
    | running before the step | admitted in this step, or resumed in it  |
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from folojax.sched.request import Request


@dataclass(frozen=True)
class NewRequest:
    """A request that joins the batch: all that a runner without memory of it needs.

    Attributes:
        request_id: its id.
        prompt_token_ids: the whole prompt, also when only a chunk of it is scheduled.
        output_token_ids: empty, or the output kept over a preemption.
        params: as they came with the request.
        num_computed_tokens: tokens whose K/V are in the cache before this step.
        page_ids: its pages, in token order, those reserved for this step included.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    params: object
    num_computed_tokens: int
    page_ids: tuple[int, ...]


@dataclass(frozen=True)
class CachedRequests:
    """What changed for the requests that stay in the batch; entry i of each tuple belongs together.

    Attributes:
        request_ids: in batch order.
        new_token_ids: per request, tokens that have become known since the last plan that had it.
            What an earlier plan samples may have to be computed in this step and come only later.
        num_computed_tokens: per request, tokens whose K/V are in the cache before this step.
        new_page_ids: per request, pages to append to its table.
    """

    request_ids: tuple[str, ...]
    new_token_ids: tuple[tuple[int, ...], ...]
    num_computed_tokens: tuple[int, ...]
    new_page_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SchedulerOutput:
    """The plan of one step. All its pages are reserved: running it can't lack memory.

    A runner drops what `finished_request_ids` and `preempted_request_ids` name before it adds
    `new_requests`: the id of a finished request may be in use again.

    Attributes:
        new_requests: requests that join the batch, resumed ones among them.
        cached_requests: requests that were in the batch before.
        num_scheduled_tokens: tokens to compute by request id; its order is the batch order. A
            request of the batch can be missing: nothing is computed for it in this step.
        total_num_scheduled_tokens: their sum, at most the budget.
        sampled_request_ids: requests whose last token is computed in this step, so that it samples
            the next one; in batch order. That last token may be one that the plan before samples.
            Never a prompt-only request.
        finished_request_ids: finished since the plan before, for whatever reason.
        preempted_request_ids: lost their pages since the plan before, or while this one was made;
            those that lost them before may be among `new_requests` again.
        page_copies: (source, target) pages to copy before the step, all at once: every source is
            read before a target is written, and no page is a target twice.
    """

    new_requests: tuple[NewRequest, ...]
    cached_requests: CachedRequests
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    sampled_request_ids: tuple[str, ...]
    finished_request_ids: tuple[str, ...]
    preempted_request_ids: tuple[str, ...]
    page_copies: tuple[tuple[int, int], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute; the finished ids are to be dropped all the same."""
        return self.total_num_scheduled_tokens == 0


class RequestUpdate(NamedTuple):
    """What a step gave one request; how it ended, if it did, is in the request itself.

    Attributes:
        request: the request, its new tokens already in `output_token_ids`.
        new_token_ids: what this step sampled; empty for a row that failed, and for a prompt-only
            request, which is done.
    """

    request: Request
    new_token_ids: tuple[int, ...]


@dataclass(eq=False)
class PlanDraft:
    """A plan while it is made: requests come in, and a victim of preemption goes out again.

    Attributes:
        budget_left: tokens that may still be scheduled.
        requests: the batch so far, by id, in order.
        num_scheduled_tokens: tokens to compute by request id, in the same order.
        new_page_ids: pages reserved for this step by request id, where there are any.
        new_request_ids: the part of the batch that joins in this step.
        is_short_of_pages: whether someone was preempted for it, or waits for pages to come free.
    """

    budget_left: int
    requests: dict[str, Request] = field(default_factory=dict)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    new_page_ids: dict[str, list[int]] = field(default_factory=dict)
    new_request_ids: set[str] = field(default_factory=set)
    is_short_of_pages: bool = False

    def put(self, request: Request, num_tokens: int, page_ids: list[int]) -> None:
        """Schedules `num_tokens` of a request, for which `page_ids` were reserved."""
        assert 0 < num_tokens <= self.budget_left, f"{num_tokens} tokens of {self.budget_left}"
        self.budget_left -= num_tokens
        self.requests[request.request_id] = request
        self.num_scheduled_tokens[request.request_id] = num_tokens
        if page_ids:
            self.new_page_ids[request.request_id] = page_ids

    def put_new(self, request: Request, num_tokens: int, page_ids: list[int]) -> None:
        """Schedules a request that joins the batch."""
        self.put(request, num_tokens, page_ids)
        self.new_request_ids.add(request.request_id)

    def put_victim(self, request: Request) -> None:
        """Takes the tokens of a preempted request back out if they were scheduled."""
        self.is_short_of_pages = True
        if self.requests.pop(request.request_id, None) is not None:
            self.budget_left += self.num_scheduled_tokens.pop(request.request_id)
            self.new_page_ids.pop(request.request_id, None)

    def publish(
        self,
        finished_request_ids: Iterable[str],
        preempted_request_ids: Iterable[str],
        page_copies: tuple[tuple[int, int], ...],
    ) -> SchedulerOutput:
        """Returns the finished plan, and notes in its requests what is reported and in flight."""
        joining = []
        cached = []
        sampled_request_ids = []
        new_page_ids, new_request_ids = self.new_page_ids, self.new_request_ids
        num_scheduled_tokens = self.num_scheduled_tokens
        for request_id, request in self.requests.items():  # one pass: it goes through every row
            num_in_flight = request.num_tokens_in_flight
            num_computed_tokens = request.num_computed_tokens + num_in_flight
            output_token_ids = request.output_token_ids
            num_outputs = len(output_token_ids)
            if request_id in new_request_ids:
                joining.append(_new_request(request))
            else:
                token_ids = tuple(output_token_ids[request.num_reported_tokens :])
                page_ids = tuple(new_page_ids[request_id]) if request_id in new_page_ids else ()
                cached.append((request_id, token_ids, num_computed_tokens, page_ids))
            request.num_reported_tokens = num_outputs
            num_tokens = num_scheduled_tokens[request_id]
            request.num_tokens_in_flight = num_in_flight + num_tokens
            num_expected = (
                len(request.prompt_token_ids) + num_outputs + request.num_samples_in_flight
            )
            is_last = num_computed_tokens + num_tokens == num_expected
            if is_last and request.stop.max_tokens:
                request.num_samples_in_flight += 1
                sampled_request_ids.append(request_id)
        return SchedulerOutput(
            new_requests=tuple(joining),
            cached_requests=CachedRequests(*zip(*cached, strict=True))
            if cached
            else CachedRequests((), (), (), ()),
            num_scheduled_tokens=self.num_scheduled_tokens,
            total_num_scheduled_tokens=sum(self.num_scheduled_tokens.values()),
            sampled_request_ids=tuple(sampled_request_ids),
            finished_request_ids=tuple(finished_request_ids),
            preempted_request_ids=tuple(preempted_request_ids),
            page_copies=page_copies,
        )


def _new_request(request: Request) -> NewRequest:
    return NewRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=tuple(request.output_token_ids),
        params=request.params,
        num_computed_tokens=request.num_computed_tokens,
        page_ids=tuple(request.page_ids),
    )
