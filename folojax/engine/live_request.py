"""A user's request: its `n` samples, each a request of the scheduler, and what becomes of them."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from folojax.engine.snapshot import Progress
from folojax.requests.outputs import (
    CompletionOutput,
    Logprob,
    LogprobRecord,
    RequestMetrics,
    RequestOutput,
)
from folojax.requests.validation import CheckedRequest
from folojax.runner.activation_taps import Streams
from folojax.runner.results import PromptLogprobs, TokenLogprob
from folojax.runner.row_params import RowParams
from folojax.sched.request import Request, StopRule
from folojax.text.detokenizer import Detokenizer
from folojax.text.tokenizer import Tokenizer

NOTHING_YET = Progress()


UNKNOWN_VERSION = -1
"""Of the weights, for tokens that a fork or a snapshot began with."""

UNKNOWN_RECORD = LogprobRecord(math.nan, math.nan, math.nan, math.nan, math.nan, rank=0)
"""Of such tokens."""


@dataclasses.dataclass(eq=False)
class Sample:
    """One of the samples of a job.

    Attributes:
        index: Its place among them.
        request: What the scheduler knows of it.
        seed: None for greedy.
        detokenizer: None where there is no text. It reads tokens when text is wanted.
        cumulative_logprob: Of its tokens so far.
        token_logprobs: Of each of them.
        logprobs: One entry a token; empty if not asked for.
        record: The same.
        weights_versions: One entry a token.
        streams: Of the residual stream, where it is asked for.
    """

    index: int
    request: Request
    seed: int | None
    detokenizer: Detokenizer | None
    cumulative_logprob: float = 0.0
    token_logprobs: list[float] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    record: list[LogprobRecord] = dataclasses.field(default_factory=list)
    weights_versions: list[int] = dataclasses.field(default_factory=list)
    streams: Streams = dataclasses.field(default_factory=Streams)

    def text_tokens(self, is_stop_included: bool) -> list[int]:
        """The tokens that have text: a token that ended the sample has none, unless asked for."""
        tokens = self.request.output_token_ids
        is_stopped = self.request.status.finish_reason == "stop"
        return tokens[:-1] if is_stopped and not is_stop_included else tokens


@dataclasses.dataclass(eq=False)
class Job:
    """A request for outputs, with its samples and times.

    Attributes:
        request: As it was checked.
        samples: By index.
        tokenizer: For the text of single tokens; None: there is none.
        is_streamed: Whether every step reports it, or only the last one.
        arrival_time_s: When it was added; the times are of `time.perf_counter`.
        first_scheduled_time_s: When a step first computed some of it.
        first_token_time_s: When its first token was read.
        prompt_logprobs: Of the prompt's tokens after the first, as far as they are known.
        told_prompt_logprobs: The same as the user gets them, once they are complete.
    """

    request: CheckedRequest
    samples: list[Sample]
    tokenizer: Tokenizer | None
    is_streamed: bool
    arrival_time_s: float
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    told_prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def request_id(self) -> str:
        """The user's id of it."""
        return self.request.request_id

    @property
    def requests(self) -> list[Request]:
        """The scheduler's part."""
        return [sample.request for sample in self.samples]

    @property
    def is_finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.request.is_finished for sample in self.samples)

    def add_tokens(
        self, sample: Sample, entries: Sequence[TokenLogprob], weights_version: int
    ) -> str | None:
        """Takes in tokens that the scheduler has; returns the stop string that one completes.

        Tokens behind that one are taken away from the sample again.
        """
        params = self.request.params
        for entry in entries:
            sample.cumulative_logprob += entry.logprob
            sample.token_logprobs.append(entry.logprob)
            sample.weights_versions.append(weights_version)
            if entry.record is not None:
                raw, tempered, processed, log_kept, entropy, rank = entry.record
                sample.record.append(
                    LogprobRecord(raw, tempered, processed, log_kept, entropy, int(rank))
                )
            if params.logprobs is not None:
                sample.logprobs.append(as_logprobs(entry, self._token_texts()))
        if not params.stop or sample.detokenizer is None:
            return None
        num_before = sample.request.num_output_tokens - len(entries)
        for count in range(1, len(entries) + 1):
            stop = self._find_stop(sample, num_before + count)
            if stop is not None:
                self._cut(sample, num_before + count)
                return stop
        return None

    def _cut(self, sample: Sample, num_tokens: int) -> None:
        """Takes tokens away from the end of a sample."""
        by_token: tuple[list[Any], ...] = (
            sample.request.output_token_ids,
            sample.token_logprobs,
            sample.logprobs,
            sample.record,
            sample.weights_versions,
        )
        for entries in by_token:
            del entries[num_tokens:]
        sample.cumulative_logprob = sum(sample.token_logprobs)

    def _find_stop(self, sample: Sample, num_tokens: int) -> str | None:
        """The stop string that the first `num_tokens` tokens complete."""
        assert sample.detokenizer is not None, "stop strings are found in text"
        is_stop_included = self.request.params.include_stop_str_in_output
        tokens = sample.text_tokens(is_stop_included)[:num_tokens]
        return sample.detokenizer.read(tokens)

    def progress(self, sample: Sample) -> Progress:
        """What a sample has so far."""
        has_logprobs = self.request.params.logprobs is not None
        return Progress(
            tuple(sample.request.output_token_ids),
            tuple(sample.token_logprobs),
            tuple(sample.logprobs) if has_logprobs else None,
        )

    def add_prompt_logprobs(self, chunk: PromptLogprobs) -> None:
        """Takes in a chunk; after a preemption it may be known already."""
        del self.prompt_logprobs[chunk.first - 1 :]
        self.prompt_logprobs += chunk.entries
        self.told_prompt_logprobs = None
        if len(self.prompt_logprobs) == len(self.request.prompt_token_ids) - 1:
            texts = self._token_texts()
            entries = (as_logprobs(entry, texts) for entry in self.prompt_logprobs)
            self.told_prompt_logprobs = [None, *entries]

    def restart(self) -> None:
        """Forgets what unfinished samples have, and the log-probabilities of the prompt."""
        for sample in self.samples:
            if not sample.request.is_finished:
                sample.request.restart()
                sample.detokenizer = _make_detokenizer(self.request, self.tokenizer, 0)
                sample.cumulative_logprob = 0.0
                sample.token_logprobs, sample.logprobs = [], []
                sample.record, sample.weights_versions = [], []
                sample.streams = Streams()
        self.prompt_logprobs, self.told_prompt_logprobs = [], None

    def output(self) -> RequestOutput:
        """What the user gets: all that there is so far; a finished job ends now."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            prompt_logprobs=self._prompt_logprobs(),
            outputs=[self._completion(sample) for sample in self.samples],
            finished=self.is_finished,
            metrics=self.metrics(),
            num_cached_tokens=self.samples[0].request.num_cached_tokens,
        )

    def metrics(self) -> RequestMetrics:
        """Times and counts so far."""
        return RequestMetrics(
            arrival_time_s=self.arrival_time_s,
            first_scheduled_time_s=self.first_scheduled_time_s,
            first_token_time_s=self.first_token_time_s,
            finish_time_s=time.perf_counter() if self.is_finished else None,
            num_output_tokens=sum(request.num_output_tokens for request in self.requests),
            num_preemptions=sum(request.num_preemptions for request in self.requests),
        )

    def _completion(self, sample: Sample) -> CompletionOutput:
        return CompletionOutput(
            index=sample.index,
            text=self._text(sample),
            token_ids=list(sample.request.output_token_ids),
            cumulative_logprob=sample.cumulative_logprob,
            logprobs=None if self.request.params.logprobs is None else list(sample.logprobs),
            finish_reason=sample.request.status.finish_reason,
            stop_reason=sample.request.stop_reason,
            seed=sample.seed,
            record=list(sample.record) if self.request.params.record else None,
            weights_versions=list(sample.weights_versions),
            activations=self._activations(sample),
        )

    def _activations(self, sample: Sample) -> dict[int, np.ndarray] | None:
        """Of all tokens but the last, which was never computed."""
        is_told = self.request.params.activations and sample.request.is_finished
        return sample.streams.arrays(sample.request.num_tokens - 1) if is_told else None

    def _text(self, sample: Sample) -> str:
        if sample.detokenizer is None:
            return ""
        token_ids = sample.text_tokens(self.request.params.include_stop_str_in_output)
        if sample.request.is_finished:
            return sample.detokenizer.finish(token_ids)
        sample.detokenizer.read(token_ids)
        return sample.detokenizer.text

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        if self.request.num_prompt_logprobs is None:
            return None
        if len(self.request.prompt_token_ids) == 1:
            return [None]  # nothing precedes the only token
        told = self.told_prompt_logprobs
        return None if told is None else list(told)

    def _token_texts(self) -> Tokenizer | None:
        return self.tokenizer if self.request.params.detokenize else None


def make_job(
    checked: CheckedRequest,
    *,
    seed: int | None,
    eos_token_ids: Sequence[int],
    tokenizer: Tokenizer | None,
    is_streamed: bool,
    progress: Progress = NOTHING_YET,
    forked_from: Request | None = None,
) -> Job:
    """Splits a user's request into requests of the scheduler, one a sample.

    The samples of n > 1 are called `<request_id>#<index>` inside, and share the prompt's pages.

    Args:
        checked: The request.
        seed: Of the first sample; None for greedy.
        eos_token_ids: The model's end tokens, the one first that is no `stop_reason`.
        tokenizer: None: there is no text.
        is_streamed: Whether every step is to report it.
        progress: What every sample has already.
        forked_from: Whose progress that was, while it goes on; else None.

    Raises:
        ValueError: log-probabilities are asked for, and those of the first tokens are not known.
    """
    params = checked.params
    if params.logprobs is not None and progress.token_ids and progress.logprobs is None:
        raise ValueError(
            f"logprobs is {params.logprobs!r}, and the {len(progress.token_ids)} tokens that are "
            "there already came without: leave logprobs out, or ask for them from the start"
        )
    ends = () if params.ignore_eos else tuple(eos_token_ids)
    stop = StopRule(
        max_tokens=checked.max_tokens,
        # Only the first goes without a reason, as in vLLM; a further one is named as the reason.
        eos_token_ids=frozenset(ends[:1]),
        stop_token_ids=frozenset([*(params.stop_token_ids or ()), *ends[1:]]),
        min_tokens=params.min_tokens,
    )
    banned = tuple(sorted(stop.eos_token_ids | stop.stop_token_ids)) if params.min_tokens else ()
    samples = []
    for index in range(params.n):
        # One sample tells of the prompt, and so has to compute all of it.
        num_prompt_logprobs = checked.num_prompt_logprobs if index == 0 else None
        sample_seed = None if seed is None else (seed + index) % 2**64
        row = RowParams(
            params,
            seed=sample_seed or 0,
            banned_ids=banned,
            banned_until=len(checked.prompt_token_ids) + params.min_tokens,
            bad_word_ids=checked.bad_word_ids,
            num_logprobs=checked.num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
        )
        is_one = params.n == 1
        request = Request(
            checked.request_id if is_one else f"{checked.request_id}#{index}",
            checked.prompt_token_ids,
            stop,
            row,
            checked.priority,
            group=None if is_one else checked.request_id,
            skip_prefix_cache=num_prompt_logprobs is not None
            or bool(params.activation_edits)
            or params.activations,
            forked_from=forked_from,
            output_token_ids=list(progress.token_ids),
            is_private=bool(params.activation_edits),
        )
        num_given = len(progress.token_ids)
        sample = Sample(
            index, request, sample_seed, _make_detokenizer(checked, tokenizer, num_given)
        )
        sample.token_logprobs = list(progress.token_logprobs)
        sample.weights_versions = [UNKNOWN_VERSION] * num_given
        if params.record:
            sample.record = [UNKNOWN_RECORD] * num_given
        sample.cumulative_logprob = sum(progress.token_logprobs)
        if params.logprobs is not None:
            sample.logprobs = list(progress.logprobs or ())
        samples.append(sample)
    return Job(checked, samples, tokenizer, is_streamed, time.perf_counter())


def as_logprobs(entry: TokenLogprob, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The token itself, then the likeliest ones by rank."""
    # Spelled out: it goes through every alternative of every row in every step.
    found = {entry.token: (entry.logprob, entry.rank)}
    for rank, token in enumerate(entry.top_tokens, start=1):
        if token not in found:
            found[token] = (entry.top_logprobs[rank - 1], rank)
    if tokenizer is None:
        return {token: Logprob(*pair) for token, pair in found.items()}
    text = tokenizer.token_text
    return {token: Logprob(*pair, text(token)) for token, pair in found.items()}


def _make_detokenizer(
    checked: CheckedRequest, tokenizer: Tokenizer | None, num_given: int
) -> Detokenizer | None:
    params = checked.params
    if tokenizer is None or not params.detokenize:
        return None
    return Detokenizer(
        tokenizer,
        tuple(params.stop or ()),
        min_tokens=max(params.min_tokens, num_given),  # what was given does not end it
        is_stop_included=params.include_stop_str_in_output,
        prompt_token_ids=checked.prompt_token_ids,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
    )
