"""Which tokens of which requests the next step computes.

There are no phases: prompt chunks, decoding and recomputation are all a request catching its
`num_computed_tokens` up to its `num_tokens`. One step::

    schedule()
      running, in order  ---> chunk = min(tokens behind, budget left, cap) ---> pages reserved --.
                                                  out of pages: preempt a victim, try again      |
                                                  (its pages are freed, its tokens taken back)   |
      waiting, in order  ---> the same behind what is found computed (prefix cache, group),      |
                              until the budget, max_num_seqs or the pages end; not in a step     |
                              that preempted, and past nobody but those that wait for the        |
                              prompt of their group, or for room for their adapter               v
    (the device runs it) <-------------------------------------------------------- StepPlan
         |
         v  sampled tokens
    update_from_output()
      tokens are appended, stop rules checked, num_computed_tokens advances, full pages enter the
      prefix cache, pages of finished requests are freed, and the requests forgotten

Laws that follow, and that its parts lean on:

- Every running request gets a token in every step, with two exceptions: its last token is in
  flight already, or it needs pages and such a request is about to leave some. Requests keep their
  order, and only the last of a step can have a chunk cut short by the budget; so the next step's
  chunks before it are no larger, and leave it something.
- While a request is unfinished, a plan is never empty, unless another is under way. The first
  running request (FCFS) or the most urgent one (priority) is never a victim while others run, and
  alone it has the whole pool, which whoever adds it has made sure is enough.
- Under FCFS, running and then waiting requests are in order of arrival, except that one of a
  group is passed while its prompt is computed for a sibling, and one whose adapter has no room
  beside those that run. Nobody starves for it: a running sibling moves on in every step, or goes
  back to the queue and ends the wait; and the passed keep their place at the head, where nobody
  passes them for lack of a slot or of pages, and only so many for lack of room for an adapter.
"""

from collections.abc import Iterable, Mapping, Sequence

from folojax.sched.config import SchedulerConfig
from folojax.sched.integrity import check_integrity
from folojax.sched.memory import KVMemory
from folojax.sched.progress import (
    append_tokens,
    num_decode_steps,
    num_samples_left,
    num_tokens_left,
    uneven,
)
from folojax.sched.queue import WaitingQueue
from folojax.sched.request import Request, RequestStatus
from folojax.sched.step_plan import PlanDraft, PlansInFlight, RequestUpdate, StepPlan

_MOST_PASSING = 4
"""Requests that may pass one whose adapter has no room, for each of `max_num_seqs`."""


class Scheduler:
    """Keeps every unfinished request, and plans one step at a time.

    `schedule` makes a plan, `update_from_output` takes in what it gave. Plans are run and taken in
    in order; up to `max_plans_in_flight` may be under way (`folojax.sched.step_plan`). Requests may
    be added and finished at any time. The latest plan may be dropped before it is run: `schedule`,
    when no more plans may be under way, plans its tokens and its page moves again (but reports
    new, finished and preempted requests only once). After a step that was broken off half way
    `shutdown` is the way out: nobody can say what the pages hold.

    Pages that are freed while a plan under way writes to them go to later plans, which run after
    it. What a plan under way computes can be built on by later plans, for the same reason; but it
    enters the prefix cache only when the plan is taken in.

    Attributes:
        config: the limits.
        memory: the pages and what they hold; for reading.
        in_flight: the plans under way; for reading.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.memory = KVMemory(config)
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue(config.scheduling_policy)
        self._running: list[Request] = []
        self._num_arrived = 0
        # Ids in order of finishing; a dict, as an id can be used and finished twice between plans.
        self._unreported_finished_ids: dict[str, None] = {}
        self._unreported_preempted_ids: list[str] = []
        self.in_flight = PlansInFlight()

    @property
    def num_running(self) -> int:
        """Requests that hold a place in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, new or preempted."""
        return len(self._waiting)

    def has_unfinished_requests(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._requests)

    def get_request(self, request_id: str) -> Request | None:
        """Returns an unfinished request, or None: finished ones are not remembered."""
        return self._requests.get(request_id)

    def add_request(self, request: Request) -> None:
        """Queues a new request; it may have outputs already, and K/V in host memory.

        Whoever adds it has asked before whether its id is in use (`get_request`), and whether one
        of its size can run: alone it must fit in the pool.
        """
        assert request.request_id not in self._requests, f"{request.request_id!r} is in use"
        assert request.status is RequestStatus.WAITING, f"a used request: {request.status}"
        request.arrival_index = self._num_arrived
        self._num_arrived += 1
        self._requests[request.request_id] = request
        self._waiting.add(request)

    def schedule(self) -> StepPlan:
        """Plans the next step and reserves its pages."""
        if len(self.in_flight) == self.config.max_plans_in_flight:
            self.in_flight.take_back()
            self.memory.plan_again()
        else:
            self.memory.plan_next()
        is_alone = not self._waiting
        num_steps = num_decode_steps(self.config, self._running, self.memory) if is_alone else 1
        draft = PlanDraft(self.config.max_num_batched_tokens, num_steps)
        self._schedule_running(draft)
        if self._waiting and not draft.is_short_of_pages:
            self._admit_waiting(draft)
        is_stuck = not draft.requests and self._requests and not self.in_flight
        assert not is_stuck, "requests are left, and none can run"
        plan = draft.publish(
            self._unreported_finished_ids,
            self._unreported_preempted_ids,
            self.memory.publish_moves(),
            self.memory.states,
        )
        self.in_flight.add(plan)
        self._unreported_finished_ids = {}
        self._unreported_preempted_ids = []
        return plan

    def update_from_output(
        self,
        plan: StepPlan,
        sampled: Mapping[str, Sequence[int]],
        failed: Mapping[str, str] = {},
    ) -> list[RequestUpdate]:
        """Takes in what a step computed.

        Args:
            plan: the one that was run, the earliest that has not been taken in.
            sampled: the new tokens of each request in `plan.sampled_request_ids`, one for each
                decode step that it took part in. Those finished since may be in it or not.
            failed: requests of the plan whose row went wrong, with the reason. They keep what they
                got before and finish with FINISHED_ERROR, unless that ends them; their neighbours
                go on. One that has lost its pages computes and samples again instead.

        Returns:
            One update for each request that got a token, failed, or asked for its prompt alone
            and has it computed; in batch order.

        Raises:
            AssertionError: another plan, or samples that don't belong to it; nothing has changed.
        """
        self.in_flight.land(plan, sampled, failed)
        updates: list[RequestUpdate] = []
        num_before, max_model_len = len(self._requests), self.config.max_model_len
        is_multiple = plan.num_decode_steps > 1
        for request, tokens in uneven(plan, sampled, failed, updates):
            request_id = request.request_id
            has_pages = request.status is not RequestStatus.PREEMPTED
            if failed and request_id in failed:
                if request_id in plan.sampled_request_ids:
                    request.num_samples_in_flight -= plan.num_samples(request_id)
                if not has_pages:
                    self.memory.drop_saved(request)  # it may hold the reason
                    continue
                tokens, status, reason = append_tokens(request, tokens, max_model_len)
                if status is None:  # else it had ended before it went wrong
                    self.memory.discard(request)
                    self._finish(request, RequestStatus.FINISHED_ERROR, failed[request_id])
                else:
                    self._finish(request, status, reason)
                updates.append(RequestUpdate(request, tokens))
                continue
            status, stop_reason = None, None
            if tokens:
                request.num_samples_in_flight -= len(tokens)
                tokens, status, stop_reason = append_tokens(request, tokens, max_model_len)
                self.in_flight.num_discarded_tokens += len(sampled[request_id]) - len(tokens)
            if has_pages:
                num_scheduled = plan.num_scheduled_tokens[request_id]
                self.memory.advance(request, len(tokens) if is_multiple else num_scheduled)
            if tokens:
                updates.append(RequestUpdate(request, tokens))
                if status is not None:
                    self._finish(request, status, stop_reason)
                    if not has_pages:
                        self._waiting.remove([request])
                elif has_pages:
                    request.lands_evenly_until = self.memory.lands_evenly_until(request)
            elif request.is_prompt_only and request.num_computed_tokens == request.num_tokens:
                self._finish(request, RequestStatus.FINISHED_LENGTH, None)
                updates.append(RequestUpdate(request, ()))
        if len(self._requests) < num_before:
            self._running = [r for r in self._running if r.status is RequestStatus.RUNNING]
        return updates

    def abort_requests(self, request_ids: str | Iterable[str]) -> list[Request]:
        """Ends requests from outside, in whatever state they are, and frees their pages.

        Args:
            request_ids: one id or several; ids that are unknown or finished are ignored.

        Returns:
            Those that this call has ended.
        """
        ids = (request_ids,) if isinstance(request_ids, str) else dict.fromkeys(request_ids)
        requests = [self._requests[id_] for id_ in ids if id_ in self._requests]
        self._waiting.remove(r for r in requests if r.status is not RequestStatus.RUNNING)
        for request in requests:
            self._finish(request, RequestStatus.FINISHED_ABORTED, None)
        self._running = [request for request in self._running if not request.is_finished]
        return requests

    def stop_at(self, request: Request, num_output_tokens: int, stop_reason: str) -> None:
        """Ends a request with so many tokens, which complete a stop string; the others go.

        Also one that the last of those tokens, or a later one, has ended for another reason.
        """
        self.abort_requests(request.request_id)
        del request.output_token_ids[num_output_tokens:]
        request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, stop_reason

    def preempt_all(self) -> None:
        """Sends all running requests back to the front of the queue, their output kept, no K/V.

        What plans under way sample is not taken in; it is sampled again.
        """
        self.in_flight.forget_all()
        for request in reversed(self._running):
            self._preempt(request)
        self._running = []

    def reset_prefix_cache(self, *, preempt_running: bool = False) -> bool:
        """Drops all cached K/V, so that later requests hit nothing that was computed before.

        Returns:
            Whether it was done; False, and nothing has changed, while requests run, unless
            `preempt_running` sends them back to the queue for it.
        """
        if self._running and not preempt_running:
            return False
        self.preempt_all()
        self.memory.drop_all((), self._requests.values())
        return True

    def isolate_running(self) -> None:
        """Drops cached K/V; running requests go on with theirs. No plan may be under way."""
        self.memory.drop_all(self._running, self._requests.values())

    def drop_adapter(self, adapter: str | None, *, keeps_running: bool) -> None:
        """Drops the K/V of an adapter. No plan may be under way.

        Requests that run with it go on with theirs, or else go back to the queue.
        """
        mine = [one for one in self._requests.values() if one.adapter == adapter]
        running = [one for one in self._running if one.adapter == adapter]
        for request in [] if keeps_running else reversed(running):
            self._preempt(request)
        self._running = [one for one in self._running if one.status is RequestStatus.RUNNING]
        self.memory.drop_adapter(adapter, running if keeps_running else (), mine)

    def shutdown(self) -> list[Request]:
        """Aborts all requests, drops all cached K/V, and returns the requests.

        The scheduler can be used on, also after an interrupted step. Plans under way are void.
        """
        requests = self.abort_requests(tuple(self._requests))
        self.in_flight.clear()
        self.reset_prefix_cache()
        return requests

    def check(self) -> None:
        """Raises AssertionError unless queue, batch, requests and pages agree; O(everything)."""
        check_integrity(
            self.config, self.memory, self._requests.values(), self._running, self._waiting
        )

    def _schedule_running(self, draft: PlanDraft) -> None:
        max_model_len = self.config.max_model_len
        for request in draft.put_even(self._running):
            if request.status is not RequestStatus.RUNNING:
                continue  # a victim of this same step
            num_left = num_tokens_left(request, max_model_len)
            if not num_left:
                continue
            if draft.num_decode_steps > 1:
                num_tokens = min(draft.num_decode_steps, num_samples_left(request, max_model_len))
            else:
                num_tokens = self.memory.chunk_size(request, num_left, draft)
                if not num_tokens:
                    continue
            page_ids = self._reserve_or_preempt(request, num_tokens, draft)
            if page_ids is not None:
                draft.put(request, num_tokens, page_ids)
                if num_left == 1:
                    request.plans_evenly_until = self.memory.plans_evenly_until(request)
        if draft.is_short_of_pages:
            self._running = [r for r in self._running if r.status is RequestStatus.RUNNING]

    def _admit_waiting(self, draft: PlanDraft) -> None:
        admitted: list[Request] = []
        passed: list[Request] = []
        adapters = {one.adapter for one in self._running} - {None}
        for request in self._waiting:
            if len(self._running) == self.config.max_num_seqs or not draft.budget_left:
                break
            is_new = request.adapter is not None and request.adapter not in adapters
            if is_new and len(adapters) == self.config.max_loras:
                if request.num_passed >= _MOST_PASSING * self.config.max_num_seqs:
                    break
                passed.append(request)
                continue
            if self.memory.must_wait(request):
                continue  # it keeps its place
            if not self._admit(request, draft):
                break
            admitted.append(request)
            if request.adapter is not None:
                adapters.add(request.adapter)
            for one in passed:
                one.num_passed += 1
        self._waiting.remove(admitted)

    def _admit(self, request: Request, draft: PlanDraft) -> bool:
        """Takes a waiting request into the batch; False if it has to stay."""
        if request.num_samples_in_flight:
            return False  # it was preempted meanwhile; what it is to compute is not known yet
        start = self.memory.find_start(request)
        num_left = request.num_tokens - start.num_tokens
        num_tokens = self.memory.chunk_size(request, num_left, draft)
        if not self.config.enable_chunked_prefill and num_tokens < num_left:
            return False  # nor may a shorter one jump the head of the queue
        if not self.memory.admit(request, start, num_tokens, has_company=bool(self._running)):
            return False
        if request.status is RequestStatus.WAITING:
            self.memory.count_start(request)
        request.status = RequestStatus.RUNNING
        self._running.append(request)
        draft.put_new(request, num_tokens)
        return True

    def _reserve_or_preempt(
        self, request: Request, num_tokens: int, draft: PlanDraft
    ) -> list[int] | None:
        """Gives a request pages for its next tokens; None when it gets nothing in this step.

        It is the victim itself, or waits for the pages of a request whose last result is in flight.
        """
        while (page_ids := self.memory.extend(request, num_tokens)) is None:
            most = self.config.max_model_len
            others = (r for r in self._running if r.page_ids and r.request_id not in draft.requests)
            if any(num_tokens_left(one, most) == 0 for one in others):
                draft.is_short_of_pages = True
                return None
            running = [r for r in self._running if r.status is RequestStatus.RUNNING]
            victim = self._waiting.least_urgent(running)
            draft.put_victim(victim)
            self.memory.save(victim)
            self._preempt(victim)
            if victim is request:
                return None
        return page_ids

    def _preempt(self, victim: Request) -> None:
        """Puts a running request back in the queue; the batch is left to the caller."""
        self.memory.release(victim)
        self.in_flight.forget(victim, but_tokens=True)
        victim.status = RequestStatus.PREEMPTED
        victim.num_preemptions += 1
        self._unreported_preempted_ids.append(victim.request_id)
        self._waiting.add(victim)

    def _finish(
        self, request: Request, status: RequestStatus, stop_reason: int | str | None
    ) -> None:
        """Ends a request; taking it out of the queue or the batch is left to the caller."""
        self.memory.release(request)
        self.memory.drop_saved(request)
        request.forked_from = None
        request.status = status
        request.stop_reason = stop_reason
        del self._requests[request.request_id]
        self.in_flight.forget(request)
        self._unreported_finished_ids[request.request_id] = None
