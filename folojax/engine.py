"""One step of the engine: schedule, dispatch, collect, commit.

add_request ─> Job ─> scheduler ─(plan)─> runner ─(tokens)─> scheduler ─(updates)─> outputs

With asynchronous scheduling the plan that a step dispatches is one ahead of the tokens that it
collects, and the device has always something to do. Whatever ends, moves or replaces what the
device works with (sleep, other parameters) first takes in all that is under way.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from folojax.job import Job, Sample, make_job
from folojax.outputs import RequestOutput, ScoreOutput
from folojax.prompts import ParsedPrompt
from folojax.results import Pending, StepResult, TokenLogprob
from folojax.runner import Runner
from folojax.sampling_params import SamplingParams
from folojax.sched.plan import SchedulerOutput
from folojax.sched.request import Request, RequestStatus
from folojax.sched.scheduler import Scheduler
from folojax.score_job import ScoreJob, has_nan, make_score_job
from folojax.tokenizer import Tokenizer
from folojax.validation import CheckedRequest, Validator
from folojax.weights import check_same_shapes

NO_DISTRIBUTION = "the model's logits hold a NaN, or no finite value"

Output: TypeAlias = RequestOutput | ScoreOutput


@dataclasses.dataclass(frozen=True)
class EngineMetrics:
    """Where the engine stands.

    Attributes:
        num_running: Samples in the batch.
        num_waiting: Samples in the queue, new or preempted.
        num_used_pages: KV pages with an owner.
        num_cached_pages: KV pages without one, kept for prompts that begin alike.
        num_pages: KV pages in all.
        num_steps: Steps that computed something.
        num_prefill_calls: Device calls for prompt chunks.
        num_decode_calls: Device calls for single tokens, at most one a step.
        num_scheduled_tokens: Tokens computed for requests.
        num_padding_tokens: Tokens computed for nobody, to fill a bucket.
        num_discarded_tokens: Tokens sampled for requests that had ended, which no one has seen.
        num_preemptions: How often a sample lost its pages and was computed again.
        num_prefix_query_tokens: Tokens that were looked up in the prefix cache.
        num_prefix_hit_tokens: Those of them that were found, and not computed.
    """

    num_running: int
    num_waiting: int
    num_used_pages: int
    num_cached_pages: int
    num_pages: int
    num_steps: int
    num_prefill_calls: int
    num_decode_calls: int
    num_scheduled_tokens: int
    num_padding_tokens: int
    num_discarded_tokens: int
    num_preemptions: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int


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
    ) -> None:
        """Makes an engine without requests.

        Args:
            scheduler: An empty one.
            runner: An empty one.
            tokenizer: None: there is no text.
            eos_token_ids: The model's end tokens.
            num_tokens: Ids that can be sampled; None is the model's whole vocabulary.
            max_logprobs: Most alternatives that are reported with a token; -1 is no cap.
            seed: Of the seeds that requests without one are given.
        """
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.num_steps = 0
        self.is_asleep = False
        self._num_preemptions = 0
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
        jobs = []
        for request in checked:
            seed = request.params.seed
            if request.params.is_greedy:
                seed = None
            elif seed is None:
                seed = int(self._seeds.integers(2**63))
            job = make_job(
                request,
                seed=seed,
                eos_token_ids=self._eos_token_ids,
                tokenizer=self.tokenizer,
                is_streamed=is_streamed,
            )
            jobs.append(job)
        for job in jobs:
            for part in job.requests:
                self.scheduler.validate(part)
        for job in jobs:
            self._jobs[job.request_id] = job
            for sample in job.samples:
                self.scheduler.add_request(sample.request)
                self._owner[sample.request.request_id] = (job, sample)

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
        outputs, self._untold = self._untold, []
        return outputs

    def abort(self, request_ids: str | Iterable[str]) -> list[Output]:
        """Ends requests where they stand and returns them; unknown ids are passed over."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        outputs = []
        for request_id in ids:
            job = self._jobs.get(request_id)
            if job is not None:
                self._finish(job.requests, RequestStatus.FINISHED_ABORTED)
                outputs.append(self._close(job))
        return outputs

    def reset(self) -> list[Output]:
        """Aborts everything and makes the engine usable again, also after an interrupted step."""
        outputs = [*self._untold, *self.abort(list(self._jobs))]
        self._untold = []
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
        self.runner.batch.clear()
        self.runner.release()
        self.is_asleep = True

    def wake_up(self) -> None:
        """Allocates the KV cache again."""
        if self.is_asleep:
            self.runner.reset()
            self.is_asleep = False

    def check_is_awake(self) -> None:
        """Raises the RuntimeError of an engine that sleeps."""
        if self.is_asleep:
            raise RuntimeError("the engine sleeps, and has no KV cache: call wake_up() first")

    def update_params(self, params: Any) -> None:
        """Replaces the model's parameters; what was computed with the old ones is dropped.

        Raises:
            ValueError: other names, shapes or dtypes; all of them are named, nothing has changed.
        """
        params = check_same_shapes(self.runner.params, params)
        self.reset_prefix_cache(preempt_running=True)
        self.runner.params = params

    def reset_prefix_cache(self, *, preempt_running: bool = False) -> bool:
        """Drops all cached K/V; False, and nothing has changed, while requests run.

        Args:
            preempt_running: Whether to compute running requests again for it. What is under way is
                taken in first.
        """
        if preempt_running:
            while self._in_flight:
                self._take_in()
        return self.scheduler.reset_prefix_cache(preempt_running=preempt_running)

    def has_request(self, request_id: str) -> bool:
        """Whether an unfinished request has this id."""
        return request_id in self._jobs

    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything to do or to return."""
        return bool(self._jobs or self._untold)

    def metrics(self) -> EngineMetrics:
        """Counts as they stand now."""
        stats, memory = self.runner.stats, self.scheduler.memory
        return EngineMetrics(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_used_pages=memory.allocator.num_used,
            num_cached_pages=memory.allocator.num_idle,
            num_pages=self.scheduler.config.num_pages,
            num_steps=self.num_steps,
            num_prefill_calls=stats.num_prefill_calls,
            num_decode_calls=stats.num_decode_calls,
            num_scheduled_tokens=stats.num_scheduled_tokens,
            num_padding_tokens=stats.num_computed_tokens - stats.num_scheduled_tokens,
            num_discarded_tokens=self.scheduler.flights.num_discarded_tokens,
            num_preemptions=self._num_preemptions,
            num_prefix_query_tokens=memory.num_query_tokens,
            num_prefix_hit_tokens=memory.num_hit_tokens,
        )

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
        failed = {i: NO_DISTRIBUTION for i, entry in result.sampled.items() if entry is None}
        awaited = self.scheduler.flights.awaited(plan)
        for request_id, chunk in result.prompt_logprobs.items():
            if has_nan(chunk):
                failed[request_id] = NO_DISTRIBUTION
            elif request_id in awaited:
                self._owner[request_id][0].add_prompt_logprobs(chunk)
        entries = {
            i: entry for i, entry in result.sampled.items() if entry is not None and i not in failed
        }
        tokens = {request_id: entry.token for request_id, entry in entries.items()}
        now = time.perf_counter()
        told: dict[str, Job | ScoreJob] = {}  # and perhaps finished
        for update in self.scheduler.update_from_output(plan, tokens, failed):
            request_id = update.request.request_id
            job, sample = self._owner[request_id]
            if isinstance(job, Job) and sample is not None and request_id in entries:
                self._take_token(job, sample, entries[request_id], now)
            if job.is_streamed or update.request.is_finished:
                told[job.request_id] = job
        return [
            self._close(job) if job.is_finished else job.output()
            for job in told.values()
            if job.is_finished or job.is_streamed
        ]

    def _take_token(self, job: Job, sample: Sample, entry: TokenLogprob, now: float) -> None:
        if job.first_token_time_s is None:
            job.first_token_time_s = now
        stop = job.add_token(sample, entry)
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
