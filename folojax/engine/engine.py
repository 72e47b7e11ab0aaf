"""One step of the engine: schedule, dispatch, collect, commit.

make_request ─> queue ─> scheduler ─(plan)─> runner ─(tokens)─> scheduler ─(updates)─> outputs

With asynchronous scheduling the plan that a step dispatches is one ahead of the tokens that it
collects, and the device has always something to do. Whatever ends, moves or replaces what the
device works with (sleep, other parameters) first takes in all that is under way.
"""

import contextlib
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from folojax.compile.programs import SPENT
from folojax.engine.adapters import KnownAdapters
from folojax.engine.live_request import NOTHING_YET, LiveGeneration, make_generation
from folojax.engine.live_score import LiveScore, make_score
from folojax.engine.metrics import EngineMetrics, read_metrics
from folojax.engine.reports import Live, owner_of, take_asked, take_reports
from folojax.engine.snapshot import Progress
from folojax.engine.weights import check_policy, fingerprint_of, placed_like
from folojax.requests.continuations import AskedScore
from folojax.requests.outputs import RequestOutput, ScoreOutput
from folojax.requests.prompts import ParsedPrompt
from folojax.requests.sampling_params import SamplingParams, SamplingRequest
from folojax.requests.validation import Validator
from folojax.runner.results import Pending, StepResult
from folojax.runner.runner import Runner
from folojax.sched.request import RequestStatus
from folojax.sched.scheduler import Scheduler
from folojax.sched.step_plan import StepPlan
from folojax.text.tokenizer import Tokenizer

Output: TypeAlias = RequestOutput | ScoreOutput


class Engine:
    """Requests in, outputs out; the caller owns the loop.

    Attributes:
        live: The unfinished requests by id; for reading.
        adapters: What requests may name.
        weights_version: How often the parameters have been updated.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        validator: Validator,
        *,
        seed: int | np.random.Generator = 0,
        is_checked: bool = False,
    ) -> None:
        """Makes an engine without requests.

        Args:
            scheduler: An empty one.
            runner: An empty one.
            validator: What it asks of a request, with the tokenizer and the model's end tokens.
            seed: Decides the seeds that requests without one are given; or what draws them.
            is_checked: Whether every step ends with `check_integrity`.
        """
        self.scheduler = scheduler
        self.runner = runner
        self.validator = validator
        self.adapters = KnownAdapters([runner])
        self.num_steps = self._num_preemptions = 0
        self.is_asleep = False
        self.weights_version = 0
        self.live: dict[str, Live] = {}
        self._is_checked = is_checked
        self._fingerprint: str | None = None
        # Plans under way, the earliest first: those that the scheduler knows of.
        self._in_flight: deque[tuple[StepPlan, list[Pending]]] = deque()
        # Outputs that no step has returned yet.
        self._untold: list[Output] = []
        self._is_half_done = False  # a step, of which even the end by `reset` may be interrupted
        self._seeds = np.random.default_rng(seed)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of prompts and outputs; None: they are token ids, and there is no text."""
        return self.validator.tokenizer

    def engine_of(self, request_id: str) -> "Engine":
        """The engine that has a request, as `Replicas` tell it: this one."""
        return self

    def make_request(
        self,
        request_id: str,
        prompt: ParsedPrompt,
        sampling_params: SamplingParams,
        priority: int = 0,
        adapter: str | None = None,
        *,
        is_streamed: bool = True,
        progress: Progress = NOTHING_YET,
        forked_from: SamplingRequest | None = None,
    ) -> LiveGeneration:
        """Checks a request, once and for all, and makes what `queue` takes.

        Args:
            request_id: Of the user, or drawn.
            prompt: Its tokens, and its text if there is one.
            sampling_params: How it is continued.
            priority: Smaller is more urgent.
            adapter: Name of a known one.
            is_streamed: Whether every step that gives it a token reports it, or only the last.
            progress: What every sample has already.
            forked_from: Whose progress that was, while it goes on; else None.

        Raises:
            ValueError: as of `Validator.check`.
        """
        asked = self.validator.check(
            request_id,
            prompt,
            sampling_params,
            priority,
            given=progress.token_ids,
            has_given_logprobs=progress.logprobs is not None,
        )
        return make_generation(
            asked,
            eos_token_ids=self.validator.eos_token_ids,
            tokenizer=self.tokenizer,
            lora_request=None if adapter is None else self.adapters[adapter].request,
            is_streamed=is_streamed,
            progress=progress,
            forked_from=forked_from,
        )

    def make_score(self, request_id: str, asked: AskedScore) -> LiveScore:
        """The same for a continuation to be scored; ValueError if it is refused."""
        self.validator.check_score(asked)
        return make_score(request_id, asked)

    def queue(self, requests: Sequence[Live]) -> None:
        """Queues requests; those without a seed are given one.

        Raises:
            ValueError: the id of one is in use; none was queued.
        """
        self._mend()
        self.check_ids(requests)
        for live in requests:
            live.arrival_time_s = time.perf_counter()
            live.compiled_at_arrival_s = SPENT.seconds
            if isinstance(live, LiveGeneration) and live.is_seedless:
                live.set_seed(int(self._seeds.integers(2**63)))
            self.live[live.request_id] = live
            for part in live.parts:
                self.scheduler.add_request(part)

    def check_ids(self, requests: Sequence[Live]) -> None:
        """Raises the ValueError of a request whose id is in use."""
        for live in requests:
            ids = [part.request_id for part in live.parts]
            if live.request_id in self.live or any(map(self.scheduler.get_request, ids)):
                raise ValueError(
                    f"request id {live.request_id!r} belongs to an unfinished request: use "
                    "another id, or abort that request first"
                )

    @property
    def weights(self) -> str:
        """Fingerprint of the parameters in use."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.runner)
        return self._fingerprint

    def step(self, is_read: bool = True) -> list[Output]:
        """Reads one step of the device, and keeps it busy with the next meanwhile.

        Args:
            is_read: False: the device gets as many plans as may be under way, and `collect` is to
                read the earliest.

        Returns:
            The requests that are known to have finished since the step before, and the streamed
            ones that got a token, with all that there is so far.

        Raises:
            RuntimeError: the engine sleeps.
            BaseException: whatever interrupts the step. It may have consumed the state of all
                requests, so they are aborted; the next step returns them.
        """
        self.check_is_awake()
        with self._or_reset():
            self._take_in_unawaited()
            while self.has_room:
                plan = self.scheduler.schedule()
                self._in_flight.append((plan, self.runner.dispatch(plan)))
                self._count(plan)
                if plan.is_empty:
                    break
            self._take_in_unawaited()
        return self.collect() if is_read else []

    def collect(self) -> list[Output]:
        """The half of a step that waits for the earliest plan under way."""
        with self._or_reset():
            if self._in_flight:
                self._take_in()
            if self._is_checked:
                self.check_integrity()
        outputs, self._untold = self._untold, []
        return outputs

    @property
    def has_room(self) -> bool:
        """Whether another plan may be under way."""
        return len(self._in_flight) < self.scheduler.config.max_plans_in_flight

    @property
    def awaited(self) -> list[Pending]:
        """What `collect` would wait for."""
        return self._in_flight[0][1] if self._in_flight else []

    def put_back(self, outputs: Sequence[Output]) -> None:
        """Has the next step return outputs that one has returned already."""
        self._untold = [*outputs, *self._untold]

    @contextlib.contextmanager
    def _or_reset(self) -> Iterator[None]:
        self._mend()
        self._is_half_done = True
        try:
            yield
        except BaseException:
            self._untold = self.reset()
            raise
        self._is_half_done = False

    def _mend(self) -> None:
        if self._is_half_done:
            self._untold = self.reset()

    def check_integrity(self) -> None:
        """Raises AssertionError unless queues, pages, slots and tables agree; O(everything)."""
        self.scheduler.check()
        known = ((id_, self.scheduler.get_request(id_)) for id_ in self.runner.batch.rows)
        self.runner.batch.check(
            {
                request_id: request.page_ids
                for request_id, request in known
                # Of others the runner learns with the next plan that they have left.
                if request is not None and request.status is RequestStatus.RUNNING
            }
        )

    def abort(self, request_ids: str | Iterable[str]) -> list[Output]:
        """Ends requests where they stand and returns them; unknown ids are passed over."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        outputs = []
        for live in [self.live[one] for one in dict.fromkeys(ids) if one in self.live]:
            self.scheduler.abort_requests(part.request_id for part in live.parts)
            outputs.append(self._close(live))
        # What no step has told of them yet is out of date.
        told = {output.request_id for output in outputs}
        self._untold = [one for one in self._untold if one.finished or one.request_id not in told]
        return outputs

    def discard(self, requests: Collection[Live]) -> None:
        """Ends requests, and forgets what no step has told of them yet."""
        ids = {one.request_id for one in requests if self.live.get(one.request_id, one) is one}
        self.abort(ids)
        self._untold = [one for one in self._untold if one.request_id not in ids]

    def reset(self) -> list[Output]:
        """Aborts everything, and returns it; the engine is usable again, after any interruption."""
        aborted = self.abort(list(self.live))
        outputs, self._untold = [*self._untold, *aborted], []
        self._in_flight.clear()
        self.scheduler.shutdown()
        self.runner.batch.clear()
        if not self.is_asleep:
            self.runner.reset()
        self._is_half_done = False
        return outputs

    def sleep(self) -> None:
        """Gives the memory of the KV cache back; unfinished requests are computed again later."""
        if self.is_asleep:
            return
        self.reset_prefix_cache(preempt_running=True)
        self.runner.release()
        self.is_asleep = True

    def wake_up(self) -> None:
        """Allocates the KV cache again."""
        if self.is_asleep:
            self.runner.restore()
            self.is_asleep = False

    def check_is_awake(self) -> None:
        """Raises the RuntimeError of an engine that sleeps."""
        if self.is_asleep:
            raise RuntimeError("the engine sleeps, and has no KV cache: call wake_up() first")

    def update_params(self, params: Any, running: str = "recompute") -> None:
        """Replaces the model's parameters; the prefix cache is dropped. See `LLM.update_params`."""
        check_policy(running)
        params = placed_like(self.runner, params)
        self.drain()
        if running == "keep":
            self.scheduler.isolate_running()
        else:
            self.scheduler.reset_prefix_cache(preempt_running=True)
            if running == "restart":
                for live in self.live.values():
                    live.restart()
        self.runner.params = params
        self._fingerprint = None
        self.weights_version += 1

    def reset_prefix_cache(self, *, preempt_running: bool = False) -> bool:
        """Drops all cached K/V; False, and nothing has changed, while requests run.

        Unless these are to be computed again for it; then what is under way is taken in first.
        """
        if preempt_running:
            self.drain()
        return self.scheduler.reset_prefix_cache(preempt_running=preempt_running)

    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything to do or to return."""
        return bool(self.live or self._untold)

    def metrics(self) -> EngineMetrics:
        """Counts as they stand now."""
        return read_metrics(self.scheduler, self.runner, self.num_steps, self._num_preemptions)

    def drain(self) -> None:
        """Takes in all that is under way; its outputs come with the next step."""
        while self._in_flight:
            self._take_in()

    def _count(self, plan: StepPlan) -> None:
        now = time.perf_counter()
        self._num_preemptions += len(plan.preempted_request_ids)
        self.num_steps += not plan.is_empty
        for live in map(owner_of, plan.new_requests):
            if live.first_scheduled_time_s is None:
                live.first_scheduled_time_s = now

    def _take_in(self) -> None:
        """Reads the earliest plan under way."""
        plan, pending = self._in_flight[0]
        result = self.runner.collect(pending)
        self._in_flight.popleft()
        self._untold += self._commit(plan, result)
        self._take_in_unawaited()

    def _take_in_unawaited(self) -> None:
        """Takes in plans of which nobody awaits anything, without a look at what they gave."""
        while self._in_flight and not self._in_flight[0][0].awaited:
            plan, _ = self._in_flight.popleft()
            self.scheduler.update_from_output(plan, {})

    def _commit(self, plan: StepPlan, result: StepResult) -> list[Output]:
        """Hands out what a step gave, to the scheduler first, and ends what has ended."""
        failed = take_reports(result, plan.awaited)
        logprobs, now, running = result.logprobs, time.perf_counter(), RequestStatus.RUNNING
        updates: Any = self.scheduler.update_from_output(plan, result.tokens, failed)
        version = [self.weights_version]
        told: dict[str, Live] = {}  # and perhaps finished
        for request, new_token_ids in updates:
            live: Live = request.owner
            if num_new := len(new_token_ids):
                if live.first_token_time_s is None:
                    live.first_token_time_s = now
                    live.compiled_at_first_token_s = SPENT.seconds
                given = logprobs[request.request_id]
                request.token_logprobs += given if len(given) == num_new else given[:num_new]
                request.weights_versions += version if num_new == 1 else version * num_new
                if request.is_watched:
                    stop = take_asked(request, num_new, result, self.adapters)
                    if stop is not None:
                        self.scheduler.stop_at(request, *stop)
            if live.is_streamed or (request.status is not running and request.is_finished):
                told[live.request_id] = live
        return [
            self._close(live) if live.is_finished else live.output()
            for live in told.values()
            if live.is_finished or live.is_streamed
        ]

    def _close(self, live: Live) -> Output:
        del self.live[live.request_id]
        output = live.output()
        for part in live.parts:
            part.owner = None  # or each would keep the other in memory
        return output
