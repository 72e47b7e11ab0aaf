"""One step of the engine: schedule, run, commit.

add_request ─> Job ─> scheduler ─(plan)─> runner ─(tokens)─> scheduler ─(updates)─> outputs
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence

import numpy as np

from folojax.job import Job, Sample, make_job
from folojax.outputs import RequestOutput
from folojax.runner import Runner, TokenLogprob
from folojax.sampling_params import SamplingParams
from folojax.sched.plan import SchedulerOutput
from folojax.sched.request import RequestStatus
from folojax.sched.scheduler import Scheduler
from folojax.tokenizer import Tokenizer

NO_DISTRIBUTION = "the model's logits hold a NaN, or no finite value"


@dataclasses.dataclass(frozen=True)
class EngineMetrics:
    """Where the engine stands.

    Attributes:
        num_running: Samples in the batch.
        num_waiting: Samples in the queue, new or preempted.
        num_used_pages: KV pages with an owner.
        num_pages: KV pages in all.
        num_steps: Steps that computed something.
        num_prefill_calls: Device calls for prompt chunks.
        num_decode_calls: Device calls for single tokens, at most one a step.
        num_scheduled_tokens: Tokens computed for requests.
        num_padding_tokens: Tokens computed for nobody, to fill a bucket.
    """

    num_running: int
    num_waiting: int
    num_used_pages: int
    num_pages: int
    num_steps: int
    num_prefill_calls: int
    num_decode_calls: int
    num_scheduled_tokens: int
    num_padding_tokens: int


class Engine:
    """Requests in, finished outputs out; the caller owns the loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: Tokenizer | None,
        eos_token_ids: Iterable[int],
        seed: int = 0,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.num_steps = 0
        self._eos_token_ids = tuple(eos_token_ids)
        self._jobs: dict[str, Job] = {}
        self._owner: dict[str, tuple[Job, Sample]] = {}
        self._seeds = np.random.default_rng(seed)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None = None,
        priority: int = 0,
    ) -> None:
        """Queues a request; nothing is queued if it is refused.

        Raises:
            ValueError: the id is in use, the prompt is empty, too long or holds an id outside the
                vocabulary, or the parameters ask for what this engine cannot do.
        """
        if request_id in self._jobs:
            raise ValueError(
                f"request id {request_id!r} belongs to an unfinished request: use another id, or "
                "abort that request first"
            )
        self._check_tokens("prompt", prompt_token_ids)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop is {list(params.stop)!r}, but the engine has no tokenizer")
        seed = params.seed
        if seed is None and not params.is_greedy:
            seed = int(self._seeds.integers(2**63))
        job = make_job(
            request_id,
            prompt,
            tuple(int(token) for token in prompt_token_ids),
            params,
            seed=None if params.is_greedy else seed,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self.scheduler.config.max_model_len,
            priority=priority,
            tokenizer=self.tokenizer,
        )
        for sample in job.samples:
            self.scheduler.validate(sample.request)
        for sample in job.samples:
            self.scheduler.add_request(sample.request)
            self._owner[sample.request.request_id] = (job, sample)
        self._jobs[request_id] = job

    def step(self) -> list[RequestOutput]:
        """Runs one step; returns the requests that finished in it."""
        plan = self.scheduler.schedule()
        start = time.perf_counter()
        results = self.runner.run(plan).sampled
        if plan.is_empty:
            return []
        self.num_steps += 1
        for request_id in plan.num_scheduled_tokens:
            job = self._owner[request_id][0]
            if job.first_scheduled_time_s is None:
                job.first_scheduled_time_s = start
        return self._commit(plan, results)

    def abort(self, request_ids: str | Iterable[str]) -> list[RequestOutput]:
        """Ends requests where they stand and returns them; unknown ids are passed over."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        outputs = []
        for request_id in ids:
            job = self._jobs.get(request_id)
            if job is not None:
                self.scheduler.finish_requests(
                    [sample.request.request_id for sample in job.samples],
                    RequestStatus.FINISHED_ABORTED,
                )
                outputs.append(self._close(job))
        return outputs

    def reset(self) -> list[RequestOutput]:
        """Aborts everything and makes the engine usable again, also after an interrupted step."""
        outputs = self.abort(list(self._jobs))
        self.runner.reset()
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._jobs)

    def metrics(self) -> EngineMetrics:
        """Counts as they stand now."""
        stats, pages = self.runner.stats, self.scheduler.allocator
        return EngineMetrics(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_used_pages=pages.num_used,
            num_pages=self.scheduler.config.num_pages,
            num_steps=self.num_steps,
            num_prefill_calls=stats.num_prefill_calls,
            num_decode_calls=stats.num_decode_calls,
            num_scheduled_tokens=stats.num_scheduled_tokens,
            num_padding_tokens=stats.num_computed_tokens - stats.num_scheduled_tokens,
        )

    def _commit(
        self, plan: SchedulerOutput, results: dict[str, TokenLogprob | None]
    ) -> list[RequestOutput]:
        tokens = {i: result.token for i, result in results.items() if result is not None}
        failed = {i: NO_DISTRIBUTION for i, result in results.items() if result is None}
        now = time.perf_counter()
        touched: dict[str, Job] = {}
        for update in self.scheduler.update_from_output(plan, tokens, failed):
            request_id = update.request.request_id
            job, sample = self._owner[request_id]
            touched[job.request_id] = job
            for token in update.new_token_ids:
                if job.first_token_time_s is None:
                    job.first_token_time_s = now
                result = results[request_id]
                assert result is not None
                sample.logprobs.append(result.logprob)
                stop = sample.find_stop(token, job.params)
                if stop is not None:
                    self._stop(sample, stop)
        return [self._close(job) for job in touched.values() if job.is_finished]

    def _stop(self, sample: Sample, stop: str) -> None:
        """A stop string ends a sample, also one that has just reached its last token."""
        self.scheduler.finish_requests(sample.request.request_id, RequestStatus.FINISHED_STOPPED)
        sample.request.status = RequestStatus.FINISHED_STOPPED
        sample.request.stop_reason = stop

    def _close(self, job: Job) -> RequestOutput:
        del self._jobs[job.request_id]
        for sample in job.samples:
            del self._owner[sample.request.request_id]
        return job.output(self.tokenizer)

    def _check_tokens(self, name: str, token_ids: Iterable[int]) -> None:
        vocab_size = self.runner.model.config.vocab_size
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise ValueError(f"{name} holds {token!r}: token ids must be integers")
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name} holds id {token}; the vocabulary has 0 to {vocab_size - 1}"
                )
