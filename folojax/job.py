"""A user's request: its `n` samples, each a request of the scheduler, and what becomes of them."""

import dataclasses
import time
from collections.abc import Iterable

from folojax.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from folojax.row_params import RowParams
from folojax.sampling_params import SamplingParams
from folojax.sched.request import Request, StopRule
from folojax.detokenizer import Detokenizer as StopStringSearch
from folojax.tokenizer import Tokenizer


@dataclasses.dataclass(eq=False)
class Sample:
    """One of the samples of a job."""

    index: int
    request: Request
    seed: int | None
    logprobs: list[float]
    search: StopStringSearch | None
    cut_text: str | None = None  # the text, where a stop string ended it

    def find_stop(self, token: int, params: SamplingParams) -> str | None:
        """Reads a new token; returns the stop string that it completes."""
        if self.search is None:
            return None
        is_searched = self.request.num_output_tokens > params.min_tokens
        found = self.search.add(token, is_searched)
        if found is None:
            return None
        stop, start = found
        end = start + len(stop) if params.include_stop_str_in_output else start
        self.cut_text = self.search.text[:end]
        return stop


@dataclasses.dataclass(eq=False)
class Job:
    """A prompt with its parameters, samples and times."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    samples: list[Sample]
    arrival_time_s: float
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.request.is_finished for sample in self.samples)

    def output(self, tokenizer: Tokenizer | None) -> RequestOutput:
        """What the user gets; the end of the job is now."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(self._completion(sample, tokenizer) for sample in self.samples),
            finished=self.is_finished,
            metrics=RequestMetrics(
                arrival_time_s=self.arrival_time_s,
                first_scheduled_time_s=self.first_scheduled_time_s,
                first_token_time_s=self.first_token_time_s,
                finish_time_s=time.perf_counter(),
                num_output_tokens=sum(s.request.num_output_tokens for s in self.samples),
                num_preemptions=sum(s.request.num_preemptions for s in self.samples),
            ),
        )

    def _completion(self, sample: Sample, tokenizer: Tokenizer | None) -> CompletionOutput:
        request = sample.request
        token_ids = tuple(request.output_token_ids)
        logprobs = None
        if self.params.logprobs is not None:
            logprobs = tuple(
                {token: Logprob(logprob, tokenizer.decode([token]) if tokenizer else None)}
                for token, logprob in zip(token_ids, sample.logprobs, strict=True)
            )
        return CompletionOutput(
            index=sample.index,
            text=self._text(sample, tokenizer),
            token_ids=token_ids,
            cumulative_logprob=sum(sample.logprobs),
            logprobs=logprobs,
            finish_reason=request.status.finish_reason,
            stop_reason=request.stop_reason,
            seed=sample.seed,
        )

    def _text(self, sample: Sample, tokenizer: Tokenizer | None) -> str:
        if sample.cut_text is not None:
            return sample.cut_text
        if tokenizer is None or not self.params.detokenize:
            return ""
        request = sample.request
        token_ids = request.output_token_ids
        # The token that ended the text is no part of it, unless asked for.
        is_stopped = request.status.finish_reason == "stop"
        if is_stopped and not self.params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        return tokenizer.decode(token_ids, **decode_options(self.params))


def make_job(
    request_id: str,
    prompt: str | None,
    prompt_token_ids: tuple[int, ...],
    params: SamplingParams,
    *,
    seed: int | None,
    eos_token_ids: Iterable[int],
    max_model_len: int,
    priority: int,
    tokenizer: Tokenizer | None,
) -> Job:
    """Splits a user's request into requests of the scheduler, one a sample.

    Args:
        request_id: The samples of n > 1 are called `<request_id>#<index>` inside.
        prompt: The text, if it was given as text.
        prompt_token_ids: The prompt.
        params: Of all samples.
        seed: Of the first sample; None for greedy.
        eos_token_ids: The model's end tokens.
        max_model_len: Stands in for `max_tokens=None`.
        priority: Smaller is more urgent.
        tokenizer: Needed for stop strings.

    """
    eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
    stop = StopRule(
        max_tokens=params.max_tokens or max_model_len,
        eos_token_ids=eos,
        stop_token_ids=frozenset(params.stop_token_ids),
        min_tokens=params.min_tokens,
    )
    banned = tuple(sorted(eos | stop.stop_token_ids)) if params.min_tokens else ()
    samples = []
    for index in range(params.n):
        sample_seed = None if seed is None else (seed + index) % 2**64
        row = RowParams(
            params,
            sample_seed or 0,
            banned,
            len(prompt_token_ids) + params.min_tokens,
            num_logprobs=params.logprobs,
        )
        child_id = request_id if params.n == 1 else f"{request_id}#{index}"
        search = None
        if params.stop:
            assert tokenizer is not None, "stop strings were accepted without a tokenizer"
            search = StopStringSearch(tokenizer, tuple(params.stop), **decode_options(params))
        request = Request(child_id, prompt_token_ids, stop, row, priority)
        samples.append(Sample(index, request, sample_seed, [], search))
    return Job(request_id, prompt, prompt_token_ids, params, samples, time.perf_counter())


def decode_options(params: SamplingParams) -> dict[str, bool]:
    """The tokenizer's part of the parameters."""
    return {
        "skip_special_tokens": params.skip_special_tokens,
        "spaces_between_special_tokens": params.spaces_between_special_tokens,
    }
