"""What one step is to compute: drafted, published, and under way until its results are taken in.

The batch of a step, in the order of `num_scheduled_tokens`::

    | requests that were in the batch before, in order | `new_requests`: admitted or resumed now |

Of the former a plan tells nothing but how many tokens to compute, and which pages they have got.

The device is behind the host::

    host     schedule 1 | schedule 2 | take in 1, schedule 3 | take in 2, schedule 4 | ...
    device              |   run 1    |        run 2          |        run 3          |

When plan 2 is made, the token that plan 1 samples is not known, only that there will be one; the
device has it in time. What the host learns late (an end token, an abort) can find the request in a
later plan already. That plan's token for it is then no longer awaited, and is discarded.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from folojax.sched.host_pages import PageLoad, PageSave
from folojax.sched.request import Request
from folojax.sched.states import KeptStates


class PageMoves(NamedTuple):
    """What happens to pages before a step, in this order."""

    saves: tuple[PageSave, ...] = ()  # their content is to be kept in host memory
    # (source, target), all at once: every source is read before a target is written, and no page
    # is a target twice.
    copies: tuple[tuple[int, int], ...] = ()
    loads: tuple[PageLoad, ...] = ()  # filled from host memory, which forgets what it held for them
    dropped: tuple[int, ...] = ()  # keys of saves that nobody needs any more


NO_MOVES = PageMoves()


@dataclass(frozen=True)
class StepPlan:
    """The plan of one step. All its pages are reserved: running it can't lack memory.

    A runner drops what `finished_request_ids` and `preempted_request_ids` name before it adds
    `new_requests`: the id of a finished request may be in use again.

    """

    # Those that join the batch, resumed ones among them: as they stand before anything else is
    # asked of the scheduler, with `page_ids` for this step included.
    new_requests: tuple[Request, ...]
    new_page_ids: dict[str, list[int]]  # to append to the tables of requests that were there before
    # Tokens to compute by request id, in batch order. A request of the batch can be missing:
    # nothing is computed for it in this step.
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int  # their sum; at most the budget in each decode step
    # Requests whose last token is computed in this step, so that it samples the next one; in batch
    # order. That last token may be one that the plan before samples. Never a prompt-only request.
    sampled_request_ids: tuple[str, ...]
    finished_request_ids: tuple[str, ...]  # since the plan before, for whatever reason
    # Lost their pages since the plan before, or while this one was made; those that lost them
    # before may be among `new_requests` again.
    preempted_request_ids: tuple[str, ...]
    page_moves: PageMoves = NO_MOVES  # what happens to pages first
    # (request id, place) of states that are kept (`folojax.sched.states`): those that requests
    # which join begin with, and those that requests have when the plan has run.
    state_loads: tuple[tuple[str, int], ...] = ()
    state_saves: tuple[tuple[str, int], ...] = ()
    # 1; or more, when every request computes one token after another: each step samples the token
    # that the next one computes, for as many steps as the request has scheduled tokens, and all of
    # these are results.
    num_decode_steps: int = 1
    # By id, the requests whose results are awaited: who ends before the plan is taken in is not
    # among them any more. Requests and not ids alone: an id may be used again meanwhile. Without
    # any, the plan can be taken in with nothing sampled.
    awaited: dict[str, Request] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute; the finished ids are to be dropped all the same."""
        return self.total_num_scheduled_tokens == 0

    def num_samples(self, request_id: str) -> int:
        """How many tokens a request of `sampled_request_ids` gets."""
        return self.num_scheduled_tokens[request_id] if self.num_decode_steps > 1 else 1


class RequestUpdate(NamedTuple):
    """What a step gave one request; how it ended, if it did, is in the request itself.

    The tokens are in its `output_token_ids` already, up to one that ended it; there is none for a
    row that failed at once, and for a prompt-only request, which is done.
    """

    request: Request
    new_token_ids: Sequence[int]


@dataclass(eq=False)
class PlanDraft:
    """A plan while it is made: requests come in, and a victim of preemption goes out again."""

    budget_left: int  # tokens that may still be scheduled
    num_decode_steps: int = 1
    requests: dict[str, Request] = field(default_factory=dict)  # the batch so far, in order
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)  # in the same order
    new_page_ids: dict[str, list[int]] = field(
        default_factory=dict
    )  # reserved, where there are any
    new_requests: list[Request] = field(default_factory=list)  # the part that joins, in order
    # The part of the batch of which `publish` is to note what is in flight: not those that go on
    # evenly, one token each, who are noted when they come in.
    unnoted: dict[str, Request] = field(default_factory=dict)
    is_short_of_pages: bool = False  # someone was preempted, or waits for pages to come free

    def put(self, request: Request, num_tokens: int, page_ids: list[int]) -> None:
        """Schedules `num_tokens` of a request, for which `page_ids` were reserved."""
        request_id = request.request_id
        # Of several decode steps each has the whole budget, and takes one token of a request.
        self.budget_left -= num_tokens if self.num_decode_steps == 1 else 1
        self.unnoted[request_id] = request
        self.requests[request_id] = request
        self.num_scheduled_tokens[request_id] = num_tokens
        if page_ids:
            self.new_page_ids[request_id] = page_ids

    def put_even(self, running: Iterable[Request]) -> Iterator[Request]:
        """Schedules a token of each request that goes on evenly.

        In most steps these are most rows, and there is nothing else to look at.

        Yields:
            The others, in order; the caller puts them.
        """
        is_single = self.num_decode_steps == 1
        requests, num_scheduled_tokens = self.requests, self.num_scheduled_tokens
        for request in running:
            num_planned = request.num_planned_tokens
            if num_planned < request.plans_evenly_until and is_single and self.budget_left:
                request.num_planned_tokens = num_planned + 1
                request.num_samples_in_flight += 1
                self.budget_left -= 1
                requests[request.request_id] = request
                num_scheduled_tokens[request.request_id] = 1
            else:
                yield request

    def put_new(self, request: Request, num_tokens: int) -> None:
        """Schedules a request that joins the batch."""
        self.put(request, num_tokens, [])
        self.new_requests.append(request)

    def put_victim(self, request: Request) -> None:
        """Takes the tokens of a preempted request back out if they were scheduled."""
        self.is_short_of_pages = True
        if self.requests.pop(request.request_id, None) is not None:
            self.budget_left += self.num_scheduled_tokens.pop(request.request_id)
            self.new_page_ids.pop(request.request_id, None)
            if self.unnoted.pop(request.request_id, None) is None:
                request.num_planned_tokens -= 1
                request.num_samples_in_flight -= 1

    def publish(
        self,
        finished_request_ids: Iterable[str],
        preempted_request_ids: Iterable[str],
        page_moves: PageMoves,
        states: KeptStates | None = None,
    ) -> StepPlan:
        """Returns the finished plan, and notes in its requests what is in flight."""
        assert self.budget_left >= 0, f"{-self.budget_left} tokens beyond the budget"
        num_scheduled_tokens = self.num_scheduled_tokens
        is_multiple = self.num_decode_steps > 1
        not_sampled = set()
        for request_id, request in self.unnoted.items():
            num_tokens = num_scheduled_tokens[request_id]
            num_expected = request.num_expected_tokens
            request.num_planned_tokens += num_tokens
            if request.num_planned_tokens >= num_expected and request.stop.max_tokens:
                request.num_samples_in_flight += num_tokens if is_multiple else 1
            else:
                not_sampled.add(request_id)
        sampled_request_ids: Iterable[str] = self.requests
        if not_sampled:
            sampled_request_ids = [id_ for id_ in self.requests if id_ not in not_sampled]
        return StepPlan(
            new_requests=tuple(self.new_requests),
            new_page_ids=self.new_page_ids,
            num_scheduled_tokens=num_scheduled_tokens,
            total_num_scheduled_tokens=sum(num_scheduled_tokens.values()),
            sampled_request_ids=tuple(sampled_request_ids),
            finished_request_ids=tuple(finished_request_ids),
            preempted_request_ids=tuple(preempted_request_ids),
            page_moves=page_moves,
            state_loads=() if states is None else tuple(states.loads),
            state_saves=() if states is None else states.saves,
            num_decode_steps=self.num_decode_steps,
            awaited=self.requests,
        )


class PlansInFlight:
    """The plans under way, in order.

    Attributes:
        num_discarded_tokens: tokens that were sampled for requests that did not await them any
            more: they had finished, or were to be computed again.
    """

    def __init__(self) -> None:
        self.num_discarded_tokens = 0
        self._plans: deque[StepPlan] = deque()

    def __len__(self) -> int:
        return len(self._plans)

    def add(self, plan: StepPlan) -> None:
        """Takes in a plan that is published."""
        self._plans.append(plan)

    def take_back(self) -> None:
        """Drops the latest plan, which was never run, and what it noted in its requests."""
        plan = self._plans.pop()
        sampled = set(plan.sampled_request_ids)
        for request_id, request in plan.awaited.items():
            request.num_planned_tokens -= plan.num_scheduled_tokens[request_id]
            if request_id in sampled:
                request.num_samples_in_flight -= plan.num_samples(request_id)

    def land(
        self, plan: StepPlan, sampled: Mapping[str, Sequence[int]], failed: Collection[str]
    ) -> None:
        """Takes out the earliest plan.

        Args:
            plan: the one that was run.
            sampled: tokens by request id.
            failed: ids of requests that lack tokens, or all of them.

        Raises:
            AssertionError: another plan, or samples that don't belong to it; nothing has changed.
        """
        is_next = bool(self._plans) and plan is self._plans[0]
        assert is_next, "the plan is not the next to be taken in, or was taken in already"
        num_sampled = len(plan.sampled_request_ids)
        is_whole = num_sampled == len(plan.num_scheduled_tokens) == len(plan.awaited)
        if is_whole and not failed and sampled.keys() == plan.awaited.keys():  # in most steps
            self._plans.popleft()
            return
        may_sample = set(plan.sampled_request_ids)
        is_ended = may_sample.difference(plan.awaited)
        missing = may_sample.difference(sampled, failed, is_ended)
        surplus = sampled.keys() - may_sample
        unknown = set(failed) - plan.num_scheduled_tokens.keys()
        assert not missing, f"no token for {sorted(missing)}"
        assert not surplus, f"a token that was not asked for: {sorted(surplus)}"
        assert not unknown, f"failed, but not in the plan: {sorted(unknown)}"
        for request_id in failed:
            has_all = len(sampled.get(request_id, ())) == plan.num_samples(request_id)
            assert not has_all, f"failed, with all tokens: {request_id!r}"
        self._plans.popleft()
        self.num_discarded_tokens += sum(
            plan.num_samples(request_id) for request_id in is_ended.difference(failed)
        )

    def forget(self, request: Request, *, but_tokens: bool = False) -> None:
        """Awaits nothing more for a request; or nothing but tokens, if it has lost its pages.

        A token is worth as much as before; what else was computed has gone with the pages.
        """
        if not but_tokens:
            request.num_samples_in_flight = 0
        for plan in self._plans:
            is_kept = but_tokens and request.request_id in plan.sampled_request_ids
            if not is_kept and plan.awaited.get(request.request_id) is request:
                del plan.awaited[request.request_id]

    def forget_all(self) -> None:
        """Awaits nothing more; every request is to sample again what the plans sample."""
        for plan in self._plans:
            for request in plan.awaited.values():
                request.num_samples_in_flight = 0
            plan.awaited.clear()

    def clear(self) -> None:
        """Drops all plans; what they give is not to be taken in."""
        self.forget_all()
        self._plans.clear()
