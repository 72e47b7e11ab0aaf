"""What one step is to compute: the scheduler's answer, and the draft that it grows from.

The batch of a step, in the order of `num_scheduled_tokens`::

    | requests that were in the batch before, in order | `new_requests`: admitted or resumed now |

Of the former a plan tells nothing but how many tokens to compute, and which pages they have got.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from folojax.sched.host_pages import PageLoad, PageSave
from folojax.sched.request import Request


@dataclass(frozen=True)
class NewRequest:
    """A request that joins the batch: all that a runner without memory of it needs.

    Attributes:
        request_id: its id.
        prompt_token_ids: the whole prompt, also when only a chunk of it is scheduled.
        output_token_ids: empty, or the output that it has already: kept over a preemption, or
            taken over from the request that it was forked from.
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


class PageMoves(NamedTuple):
    """What happens to pages before a step, in this order.

    Attributes:
        saves: pages whose content is to be kept in host memory.
        copies: (source, target) pages to copy, all at once: every source is read before a target
            is written, and no page is a target twice.
        loads: pages to be filled from host memory, which forgets what it held for them.
        dropped: keys of saves that nobody needs any more.
    """

    saves: tuple[PageSave, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    loads: tuple[PageLoad, ...] = ()
    dropped: tuple[int, ...] = ()


NO_MOVES = PageMoves()


@dataclass(frozen=True)
class SchedulerOutput:
    """The plan of one step. All its pages are reserved: running it can't lack memory.

    A runner drops what `finished_request_ids` and `preempted_request_ids` name before it adds
    `new_requests`: the id of a finished request may be in use again.

    Attributes:
        new_requests: requests that join the batch, resumed ones among them.
        new_page_ids: pages to append to the tables of requests that were in the batch before.
        num_scheduled_tokens: tokens to compute by request id; its order is the batch order. A
            request of the batch can be missing: nothing is computed for it in this step.
        total_num_scheduled_tokens: their sum; at most the budget in each decode step.
        sampled_request_ids: requests whose last token is computed in this step, so that it samples
            the next one; in batch order. That last token may be one that the plan before samples.
            Never a prompt-only request.
        finished_request_ids: finished since the plan before, for whatever reason.
        preempted_request_ids: lost their pages since the plan before, or while this one was made;
            those that lost them before may be among `new_requests` again.
        page_moves: what happens to pages first.
        num_decode_steps: 1; or more, when every request computes one token after another: each
            step samples the token that the next one computes, for as many steps as the request
            has scheduled tokens, and all of these are results.
    """

    new_requests: tuple[NewRequest, ...]
    new_page_ids: dict[str, list[int]]
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    sampled_request_ids: tuple[str, ...]
    finished_request_ids: tuple[str, ...]
    preempted_request_ids: tuple[str, ...]
    page_moves: PageMoves = NO_MOVES
    num_decode_steps: int = 1

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute; the finished ids are to be dropped all the same."""
        return self.total_num_scheduled_tokens == 0

    def num_samples(self, request_id: str) -> int:
        """How many tokens a request of `sampled_request_ids` gets."""
        return self.num_scheduled_tokens[request_id] if self.num_decode_steps > 1 else 1


class RequestUpdate(NamedTuple):
    """What a step gave one request; how it ended, if it did, is in the request itself.

    Attributes:
        request: the request, its new tokens already in `output_token_ids`.
        new_token_ids: what this step sampled, up to the token that ended it; without a token for a
            row that failed at once, and for a prompt-only request, which is done.
    """

    request: Request
    new_token_ids: tuple[int, ...]


@dataclass(eq=False)
class PlanDraft:
    """A plan while it is made: requests come in, and a victim of preemption goes out again.

    Attributes:
        budget_left: tokens that may still be scheduled.
        num_decode_steps: as in the plan.
        requests: the batch so far, by id, in order.
        num_scheduled_tokens: tokens to compute by request id, in the same order.
        new_page_ids: pages reserved for this step by request id, where there are any.
        new_request_ids: the part of the batch that joins in this step.
        is_short_of_pages: whether someone was preempted for it, or waits for pages to come free.
    """

    budget_left: int
    num_decode_steps: int = 1
    requests: dict[str, Request] = field(default_factory=dict)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    new_page_ids: dict[str, list[int]] = field(default_factory=dict)
    new_request_ids: set[str] = field(default_factory=set)
    is_short_of_pages: bool = False

    def put(self, request: Request, num_tokens: int, page_ids: list[int]) -> None:
        """Schedules `num_tokens` of a request, for which `page_ids` were reserved."""
        request_id = request.request_id
        # Of several decode steps each has the whole budget, and takes one token of a request.
        self.budget_left -= num_tokens if self.num_decode_steps == 1 else 1
        self.requests[request_id] = request
        self.num_scheduled_tokens[request_id] = num_tokens
        if page_ids:
            self.new_page_ids[request_id] = page_ids

    def put_new(self, request: Request, num_tokens: int) -> None:
        """Schedules a request that joins the batch."""
        self.put(request, num_tokens, [])
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
        page_moves: PageMoves,
    ) -> SchedulerOutput:
        """Returns the finished plan, and notes in its requests what is in flight."""
        assert self.budget_left >= 0, f"{-self.budget_left} tokens beyond the budget"
        new_requests = tuple(_new_request(self.requests[id_]) for id_ in self.new_request_ids)
        if len(new_requests) > 1:  # the set has no order
            order = {id_: place for place, id_ in enumerate(self.requests)}
            new_requests = tuple(sorted(new_requests, key=lambda new: order[new.request_id]))
        num_scheduled_tokens = self.num_scheduled_tokens
        is_multiple = self.num_decode_steps > 1
        total = 0
        sampled_request_ids = []
        for request_id, request in self.requests.items():  # one pass: it goes through every row
            num_tokens = num_scheduled_tokens[request_id]
            total += num_tokens
            num_samples_in_flight = request.num_samples_in_flight
            num_expected = (
                len(request.prompt_token_ids)
                + len(request.output_token_ids)
                + num_samples_in_flight
            )
            request.num_tokens_in_flight = num_planned = request.num_tokens_in_flight + num_tokens
            num_planned += request.num_computed_tokens
            if num_planned >= num_expected and request.stop.max_tokens:
                request.num_samples_in_flight = num_samples_in_flight + (
                    num_tokens if is_multiple else 1
                )
                sampled_request_ids.append(request_id)
        return SchedulerOutput(
            new_requests=new_requests,
            new_page_ids=self.new_page_ids,
            num_scheduled_tokens=num_scheduled_tokens,
            total_num_scheduled_tokens=total,
            sampled_request_ids=tuple(sampled_request_ids),
            finished_request_ids=tuple(finished_request_ids),
            preempted_request_ids=tuple(preempted_request_ids),
            page_moves=page_moves,
            num_decode_steps=self.num_decode_steps,
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
