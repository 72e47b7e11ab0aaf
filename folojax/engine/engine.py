"""One step of the engine: schedule, dispatch, collect, commit.

add_request ─> Job ─> scheduler ─(plan)─> runner ─(tokens)─> scheduler ─(updates)─> outputs

With asynchronous scheduling the plan that a step dispatches is one ahead of the tokens that it
collects, and the device has always something to do. Whatever ends, moves or replaces what the
device works with (sleep, other parameters) first takes in all that is under way.
"""

import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from folojax.engine.live_request import NOTHING_YET, Job, Sample, make_job
from folojax.engine.live_score import ScoreJob, make_score_job
from folojax.engine.metrics import EngineMetrics, read_metrics
from folojax.engine.snapshot import Progress
from folojax.engine.step_reports import take_reports
from folojax.engine.weights import check_same_shapes, fingerprint
from folojax.requests.outputs import RequestOutput, ScoreOutput
from folojax.requests.prompts import ParsedPrompt
from folojax.requests.sampling_params import SamplingParams
from folojax.requests.user_functions import NO_FUNCTIONS, UserFunctions
from folojax.requests.validation import CheckedRequest, Validator
from folojax.runner.results import Pending, StepResult, TokenLogprob
from folojax.runner.runner import Runner
from folojax.sched.plan import SchedulerOutput
from folojax.sched.request import Request, RequestStatus
from folojax.sched.scheduler import Scheduler
from folojax.text.tokenizer import Tokenizer

UPDATE_POLICIES = ("recompute", "keep", "restart")

Output: TypeAlias = RequestOutput | ScoreOutput


class Engine:
    """Requests in, outputs out; the caller owns the loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: Tokenizer | None,
        eos_token_ids: Iterable[int],
        *,
        num_tokens: int | None = None,
        max_logprobs: int = 20,
        seed: int = 0,
        is_checked: bool = False,
        functions: UserFunctions = NO_FUNCTIONS,
    ) -> None:
        """Makes an engine without requests.

        Args:
            scheduler: An empty one.
            runner: An empty one.
            tokenizer: None: there is no text.
            eos_token_ids: The model's end tokens, the one first that is no `stop_reason`.
            num_tokens: Ids that can be sampled; None is the model's whole vocabulary.
            max_logprobs: Most alternatives that are reported with a token; -1 is no cap.
            seed: Of the seeds that requests without one are given.
            is_checked: Whether every step ends with `check_integrity`.
            functions: The user's, as the runner knows them.
        """
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.num_steps = 0
        self.is_asleep = False
        self.weights_version = 0
        self._num_preemptions = 0
        self._is_checked = is_checked
        self._fingerprint: str | None = None
        self._eos_token_ids = tuple(eos_token_ids)
        self._jobs: dict[str, Job | ScoreJob] = {}
        self._owner: dict[str, tuple[Job, Sample] | tuple[ScoreJob, None]] = {}
        # Plans under way, the earliest first: those that the scheduler knows of.
        self._in_flight: deque[tuple[SchedulerOutput, list[Pending]]] = deque()
        # Outputs that no step has returned yet.
        self._untold: list[Output] = []
        self._seeds = np.random.default_rng(seed)
        vocab_size = runner.model.config.vocab_size
        self._validator = Validator(
            scheduler.config,
            vocab_size=vocab_size,
            num_tokens=vocab_size if num_tokens is None else num_tokens,
            max_logprobs=max_logprobs,
            tokenizer=tokenizer,
            eos_token_ids=self._eos_token_ids,
            functions=functions,
            tapped_bytes=functions.tapped_bytes(runner.model),
            is_strict=runner.gate.is_strict,
        )

    def check(
        self, request_id: str, prompt: ParsedPrompt, params: SamplingParams, priority: int = 0
    ) -> CheckedRequest:
        """Checks a request for `add`; queues nothing.

        Raises:
            ValueError: the id is in use, the prompt is empty, too long or holds an id outside the
                vocabulary, or the parameters ask for what this engine cannot do.
        """
        checked = self._validator.check(request_id, prompt, params, priority)
        if request_id in self._jobs:
            raise ValueError(
                f"request id {request_id!r} belongs to an unfinished request: use another id, or "
                "abort that request first"
            )
        return checked

    def check_score(self, prompt: ParsedPrompt, continuation: ParsedPrompt) -> None:
        """Checks a continuation for `add_scores`; ValueError if it is refused."""
        self._validator.check_score(prompt, continuation)

    def add(self, checked: Iterable[CheckedRequest], is_streamed: bool) -> None:
        """Queues requests, all or none.

        Args:
            checked: As `check` gave them, and no other request has come since.
            is_streamed: Whether every step that gives one a token reports it, or only the last.
        """
        self.queue([self.make_job(request, is_streamed=is_streamed) for request in checked])

    def make_job(
        self,
        request: CheckedRequest,
        *,
        is_streamed: bool = True,
        progress: Progress = NOTHING_YET,
        forked_from: Request | None = None,
    ) -> Job:
        """A job of this engine, not queued yet; the last arguments are those of `job.make_job`."""
        seed = request.params.seed
        if request.params.is_greedy:
            seed = None
        elif seed is None:
            seed = int(self._seeds.integers(2**63))
        return make_job(
            request,
            seed=seed,
            eos_token_ids=self._eos_token_ids,
            tokenizer=self.tokenizer,
            is_streamed=is_streamed,
            progress=progress,
            forked_from=forked_from,
        )

    def queue(self, jobs: Sequence[Job]) -> None:
        """Queues jobs, all or none; ValueError if the scheduler refuses one."""
        for job in jobs:
            for part in job.requests:
                self.scheduler.validate(part)
        for job in jobs:
            self._jobs[job.request_id] = job
            for sample in job.samples:
                self.scheduler.add_request(sample.request)
                self._owner[sample.request.request_id] = (job, sample)

    @property
    def jobs(self) -> Mapping[str, Job | ScoreJob]:
        """The unfinished requests by id; for reading."""
        return self._jobs

    @property
    def weights(self) -> str:
        """Fingerprint of the parameters in use."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.runner.params)
        return self._fingerprint

    def add_scores(self, scored: Iterable[tuple[str, ParsedPrompt, ParsedPrompt]]) -> None:
        """Queues continuations to be scored: request id, prompt and continuation of each."""
        for job in [make_score_job(*one) for one in scored]:
            self._jobs[job.request_id] = job
            self.scheduler.add_request(job.request)
            self._owner[job.request.request_id] = (job, None)

    def step(self) -> list[Output]:
        """Reads one step of the device, and keeps it busy with the next meanwhile.

        Returns:
            The requests that are known to have finished since the step before, and the streamed
            ones that got a token, with all that there is so far.

        Raises:
            RuntimeError: the engine sleeps.
        """
        self.check_is_awake()
        self._take_in_unawaited()
        while len(self._in_flight) < self.scheduler.config.max_plans_in_flight:
            plan = self._dispatch()
            if plan.is_empty:
                break
        self._take_in_unawaited()
        if self._in_flight:
            self._take_in()
        if self._is_checked:
            self.check_integrity()
        outputs, self._untold = self._untold, []
        return outputs

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
        for request_id in ids:
            job = self._jobs.get(request_id)
            if job is not None:
                self._finish(job.requests, RequestStatus.FINISHED_ABORTED)
                outputs.append(self._close(job))
        # What no step has told of them yet is out of date.
        told = {output.request_id for output in outputs}
        self._untold = [one for one in self._untold if one.finished or one.request_id not in told]
        return outputs

    def discard(self, request_ids: Collection[str]) -> None:
        """Ends requests, and forgets what no step has told of them yet."""
        self.abort(request_ids)
        self._untold = [one for one in self._untold if one.request_id not in request_ids]

    def reset(self) -> list[Output]:
        """Aborts everything and makes the engine usable again, also after an interrupted step."""
        aborted = self.abort(list(self._jobs))
        outputs, self._untold = [*self._untold, *aborted], []
        self._in_flight.clear()
        self.scheduler.shutdown()
        self.runner.batch.clear()
        if not self.is_asleep:
            self.runner.reset()
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
        """Replaces the model's parameters; the prefix cache is dropped.

        Args:
            params: The new ones.
            running: What becomes of unfinished requests; see `LLM.update_params`.

        Raises:
            ValueError: other names, shapes or dtypes, all of them named, or an unknown policy;
                nothing has changed.
        """
        if running not in UPDATE_POLICIES:
            raise ValueError(f"running is {running!r}; it must be one of {list(UPDATE_POLICIES)}")
        params = check_same_shapes(self.runner.params, params)
        self.drain()
        if running == "keep":
            self.scheduler.isolate_running()
        else:
            self.scheduler.reset_prefix_cache(preempt_running=True)
            if running == "restart":
                for job in self._jobs.values():
                    job.restart()
        self.runner.params = params
        self._fingerprint = None
        self.weights_version += 1

    def reset_prefix_cache(self, *, preempt_running: bool = False) -> bool:
        """Drops all cached K/V; False, and nothing has changed, while requests run.

        Args:
            preempt_running: Whether to compute running requests again for it. What is under way is
                taken in first.
        """
        if preempt_running:
            self.drain()
        return self.scheduler.reset_prefix_cache(preempt_running=preempt_running)

    def has_request(self, request_id: str) -> bool:
        """Whether an unfinished request has this id."""
        return request_id in self._jobs

    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything to do or to return."""
        return bool(self._jobs or self._untold)

    def metrics(self) -> EngineMetrics:
        """Counts as they stand now."""
        return read_metrics(self.scheduler, self.runner, self.num_steps, self._num_preemptions)

    def drain(self) -> None:
        """Takes in all that is under way; its outputs come with the next step."""
        while self._in_flight:
            self._take_in()

    def _dispatch(self) -> SchedulerOutput:
        """Plans a step, and hands it to the device."""
        plan = self.scheduler.schedule()
        now = time.perf_counter()
        self._in_flight.append((plan, self.runner.dispatch(plan)))
        self._num_preemptions += len(plan.preempted_request_ids)
        self.num_steps += not plan.is_empty
        for new in plan.new_requests:
            job = self._owner[new.request_id][0]
            if job.first_scheduled_time_s is None:
                job.first_scheduled_time_s = now
        return plan

    def _take_in(self) -> None:
        """Reads the earliest plan under way."""
        plan, pending = self._in_flight[0]
        result = self.runner.collect(pending)
        self._in_flight.popleft()
        self._untold += self._commit(plan, result)
        self._take_in_unawaited()

    def _take_in_unawaited(self) -> None:
        """Takes in plans of which nobody awaits anything, without a look at what they gave."""
        while self._in_flight and not self.scheduler.flights.awaited(self._in_flight[0][0]):
            plan, _ = self._in_flight.popleft()
            self.scheduler.update_from_output(plan, {})

    def _commit(self, plan: SchedulerOutput, result: StepResult) -> list[Output]:
        awaited = self.scheduler.flights.awaited(plan)
        failed = take_reports(result, awaited.keys(), self._owner)
        sampled = result.sampled
        tokens = {
            request_id: [entry.token for entry in entries]
            for request_id, entries in sampled.items()
        }
        now = time.perf_counter()
        told: dict[str, Job | ScoreJob] = {}  # and perhaps finished
        owner = self._owner
        for request, new_token_ids in self.scheduler.update_from_output(plan, tokens, failed):
            job, sample = owner[request.request_id]
            if new_token_ids and isinstance(job, Job) and sample is not None:
                entries = sampled[request.request_id][: len(new_token_ids)]
                self._take_tokens(job, sample, entries, now)
            if job.is_streamed or request.is_finished:
                told[job.request_id] = job
        return [
            self._close(job) if job.is_finished else job.output()
            for job in told.values()
            if job.is_finished or job.is_streamed
        ]

    def _take_tokens(
        self, job: Job, sample: Sample, entries: Sequence[TokenLogprob], now: float
    ) -> None:
        if job.first_token_time_s is None:
            job.first_token_time_s = now
        stop = job.add_tokens(sample, entries, self.weights_version)
        if stop is not None:
            # It ends a sample also where the newest token has just ended it for another reason.
            self._finish([sample.request], RequestStatus.FINISHED_STOPPED)
            sample.request.status = RequestStatus.FINISHED_STOPPED
            sample.request.stop_reason = stop

    def _finish(self, requests: Sequence[Request], status: RequestStatus) -> None:
        self.scheduler.finish_requests([request.request_id for request in requests], status)

    def _close(self, job: Job | ScoreJob) -> Output:
        del self._jobs[job.request_id]
        for request in job.requests:
            del self._owner[request.request_id]
        return job.output()
