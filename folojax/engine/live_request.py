"""A user's request under way: the samples that the scheduler knows, and what has come of them.

One record goes from the door to the runner and back. `Sample` is the scheduler's `Request`, which
the scheduler writes; with what the sampler needs, which the runner reads (`SamplingRequest`); and
with what the engine keeps of its tokens.
"""

import abc
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from folojax.compile.programs import SPENT
from folojax.engine.snapshot import Progress
from folojax.requests.lora_request import LoRARequest
from folojax.requests.outputs import (
    CompletionOutput,
    Logprob,
    LogprobRecord,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
)
from folojax.requests.sampling_params import SamplingRequest
from folojax.requests.validation import CheckedRequest
from folojax.runner.residuals import SampleResiduals
from folojax.runner.results import PromptLogprobs, TokenLogprob
from folojax.sched.request import StopRule
from folojax.text.detokenizer import Detokenizer
from folojax.text.tokenizer import Tokenizer

NOTHING_YET = Progress()

UNKNOWN_VERSION = -1
"""Of the weights, for tokens that a fork or a snapshot began with."""

UNKNOWN_RECORD = LogprobRecord(math.nan, math.nan, math.nan, math.nan, math.nan, rank=0)
"""Of such tokens."""

_Output = TypeVar("_Output", RequestOutput, ScoreOutput)


@dataclasses.dataclass(eq=False, kw_only=True)
class LiveRequest(abc.ABC, Generic[_Output]):
    """What a user has asked for, until its last output; times are of `time.perf_counter`."""

    request_id: str  # of the user, or drawn
    is_streamed: bool = False  # whether every step reports it, or only the last one
    arrival_time_s: float = math.nan  # when it was queued
    first_scheduled_time_s: float | None = None  # when a step first computed some of it
    first_token_time_s: float | None = None  # when its first token was read
    # What the process had spent on compiling at those times.
    compiled_at_arrival_s: float = 0.0
    compiled_at_first_token_s: float | None = None
    # Of the prompt's tokens after the first, as far as they are known.
    prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)

    @property
    @abc.abstractmethod
    def parts(self) -> Sequence[SamplingRequest]:
        """What the scheduler knows of it."""

    @abc.abstractmethod
    def output(self) -> _Output:
        """What the user gets: all that there is so far; a finished request ends now."""

    @property
    def is_finished(self) -> bool:
        """Whether every part has ended."""
        return all(part.is_finished for part in self.parts)

    def add_prompt_logprobs(self, chunk: PromptLogprobs) -> None:
        """Takes in a chunk; after a preemption it may be known already."""
        del self.prompt_logprobs[chunk.first - 1 :]
        self.prompt_logprobs += chunk.entries

    def restart(self) -> None:
        """Forgets what unfinished parts have, and the log-probabilities of the prompt."""
        for part in self.parts:
            if not part.is_finished:
                part.restart()
        self.prompt_logprobs = []

    def metrics(self) -> RequestMetrics:
        """Times and counts so far."""
        now_s, start_s = SPENT.seconds, self.compiled_at_arrival_s
        first_s = self.compiled_at_first_token_s
        return RequestMetrics(
            arrival_time_s=self.arrival_time_s,
            first_scheduled_time_s=self.first_scheduled_time_s,
            first_token_time_s=self.first_token_time_s,
            finish_time_s=time.perf_counter() if self.is_finished else None,
            num_output_tokens=sum(part.num_output_tokens for part in self.parts),
            num_preemptions=sum(part.num_preemptions for part in self.parts),
            compile_s=now_s - start_s,
            first_token_compile_s=(now_s if first_s is None else first_s) - start_s,
        )


@dataclasses.dataclass(eq=False, kw_only=True)
class Sample(SamplingRequest):
    """One of the samples of a `LiveGeneration`, its owner."""

    index: int  # its place among them
    tokenizer: Tokenizer | None  # None where it has no text
    num_given: int = 0  # output tokens that it began with; no stop string ends in them
    # One entry an output token in each of these; the next two are empty if not asked for.
    token_logprobs: list[float] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    records: list[LogprobRecord] = dataclasses.field(default_factory=list)
    weights_versions: list[int] = dataclasses.field(default_factory=list)
    lora_versions: list[int] = dataclasses.field(default_factory=list)  # if it has an adapter
    is_watched: bool = dataclasses.field(init=False)  # whether `take` is to see its tokens
    activations: SampleResiduals | None = None  # of its tokens, where they are asked for
    detokenizer: Detokenizer | None = None  # made when text is first wanted

    def __post_init__(self) -> None:
        """Notes whether it is to `take` its tokens."""
        has_stop = self.sampling_params.stop and self.tokenizer is not None
        self.is_watched = bool(has_stop or self.is_reported or self.adapter is not None)

    def take(
        self, entries: Sequence[TokenLogprob], num_tokens: int, lora_version: int
    ) -> tuple[int, str] | None:
        """Takes in what was asked for of tokens that the scheduler has appended.

        Args:
            entries: Of each, if the sample is reported; else none.
            num_tokens: How many they are.
            lora_version: Of the adapter that they came from.

        Returns:
            Where one of them completes a stop string, how many output tokens there are up to it,
            and the string. What is known of tokens behind it is gone.
        """
        sampling_params = self.sampling_params
        self.lora_versions += [lora_version] * num_tokens
        for entry in entries:
            if entry.record is not None:
                raw, tempered, processed, log_kept, entropy, rank = entry.record
                self.records.append(
                    LogprobRecord(raw, tempered, processed, log_kept, entropy, int(rank))
                )
            if sampling_params.logprobs is not None:
                self.logprobs.append(as_logprobs(entry, self.tokenizer))
        if sampling_params.stop and self.tokenizer is not None:
            for count in range(self.num_output_tokens - num_tokens + 1, self.num_output_tokens + 1):
                stop = self._reader(self.tokenizer).read(self._text_tokens()[:count])
                if stop is not None:
                    self._cut(count)
                    return count, stop
        return None

    def restart(self) -> None:
        """Forgets its output, as if it had just arrived."""
        super().restart()
        self._cut(0)
        self.num_given = 0
        self.activations = self.detokenizer = None

    def add_activations(self, piece: Any) -> None:
        """Takes in the residual stream of some tokens (`folojax.runner.residuals`)."""
        if self.activations is None:
            self.activations = SampleResiduals()
        self.activations.add(piece)

    def progress(self) -> Progress:
        """What it has so far."""
        has_logprobs = self.sampling_params.logprobs is not None
        return Progress(
            tuple(self.output_token_ids),
            tuple(self.token_logprobs),
            tuple(self.logprobs) if has_logprobs else None,
        )

    def completion(self) -> CompletionOutput:
        """What the user gets of it."""
        sampling_params, activations = self.sampling_params, None
        routed = None
        if self.is_finished and self.activations is not None:
            # Of all tokens but the last, which was never computed.
            read = self.activations.arrays(self.num_tokens - 1) or {}
            if sampling_params.activations:
                activations = {layer: one for layer, one in read.items() if layer >= 0}
            if sampling_params.routed_experts:
                routed = np.stack([read[key] for key in sorted(read, reverse=True) if key < 0], 1)
        return CompletionOutput(
            index=self.index,
            text=self._text(),
            token_ids=list(self.output_token_ids),
            cumulative_logprob=sum(self.token_logprobs),
            logprobs=None if sampling_params.logprobs is None else list(self.logprobs),
            finish_reason=self.status.finish_reason,
            stop_reason=self.stop_reason,
            seed=self.seed,
            record=list(self.records) if sampling_params.record else None,
            weights_versions=list(self.weights_versions),
            lora_versions=None if self.adapter is None else list(self.lora_versions),
            activations=activations,
            routed_experts=routed,
        )

    def _text(self) -> str:
        if self.tokenizer is None:
            return ""
        reader, token_ids = self._reader(self.tokenizer), self._text_tokens()
        if self.is_finished:
            return reader.finish(token_ids)
        reader.read(token_ids)
        return reader.text

    def _text_tokens(self) -> list[int]:
        """The tokens that have text: one that ended the sample has none, unless asked for."""
        is_stopped = self.status.finish_reason == "stop"
        is_left_out = is_stopped and not self.sampling_params.include_stop_str_in_output
        return self.output_token_ids[:-1] if is_left_out else self.output_token_ids

    def _reader(self, tokenizer: Tokenizer) -> Detokenizer:
        if self.detokenizer is None:
            sampling_params = self.sampling_params
            self.detokenizer = Detokenizer(
                tokenizer,
                tuple(sampling_params.stop or ()),
                min_tokens=max(sampling_params.min_tokens, self.num_given),
                is_stop_included=sampling_params.include_stop_str_in_output,
                prompt_token_ids=self.prompt_token_ids,
                skip_special_tokens=sampling_params.skip_special_tokens,
                spaces_between_special_tokens=sampling_params.spaces_between_special_tokens,
            )
        return self.detokenizer

    def _cut(self, num_tokens: int) -> None:
        """Forgets what is known of tokens from some number on."""
        columns: tuple[list[Any], ...] = (
            self.token_logprobs,
            self.logprobs,
            self.records,
            self.weights_versions,
            self.lora_versions,
        )
        for column in columns:
            del column[num_tokens:]


@dataclasses.dataclass(eq=False, kw_only=True)
class LiveGeneration(LiveRequest[RequestOutput]):
    """A request for outputs."""

    asked: CheckedRequest
    samples: list[Sample]  # by index
    tokenizer: Tokenizer | None  # for the text of single tokens; None where there is none
    lora_request: LoRARequest | None = None
    # As the user gets them, once they are complete.
    told_prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def parts(self) -> Sequence[Sample]:
        """The samples."""
        return self.samples

    @property
    def is_seedless(self) -> bool:
        """Whether its samples are drawn with a seed that the engine is to give."""
        return self.asked.sampling_params.seed is None and not self.asked.sampling_params.is_greedy

    def set_seed(self, seed: int) -> None:
        """Gives sample i the seed `seed` + i."""
        for sample in self.samples:
            sample.seed = (seed + sample.index) % 2**64

    def add_prompt_logprobs(self, chunk: PromptLogprobs) -> None:
        """Takes in a chunk; after a preemption it may be known already."""
        super().add_prompt_logprobs(chunk)
        self.told_prompt_logprobs = None
        if len(self.prompt_logprobs) == len(self.asked.prompt_token_ids) - 1:
            entries = (as_logprobs(entry, self.tokenizer) for entry in self.prompt_logprobs)
            self.told_prompt_logprobs = [None, *entries]

    def restart(self) -> None:
        """Forgets what unfinished samples have, and the log-probabilities of the prompt."""
        super().restart()
        self.told_prompt_logprobs = None

    def output(self) -> RequestOutput:
        """All that there is so far."""
        prompt_logprobs = self.told_prompt_logprobs
        if self.asked.num_prompt_logprobs is not None and len(self.asked.prompt_token_ids) == 1:
            prompt_logprobs = [None]  # nothing precedes the only token
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.asked.prompt,
            prompt_token_ids=list(self.asked.prompt_token_ids),
            prompt_logprobs=prompt_logprobs and list(prompt_logprobs),
            outputs=[sample.completion() for sample in self.samples],
            finished=self.is_finished,
            metrics=self.metrics(),
            num_cached_tokens=self.samples[0].num_cached_tokens,
            lora_request=self.lora_request,
        )


def make_generation(
    asked: CheckedRequest,
    *,
    eos_token_ids: Sequence[int],
    tokenizer: Tokenizer | None,
    lora_request: LoRARequest | None,
    is_streamed: bool,
    progress: Progress,
    forked_from: SamplingRequest | None,
) -> LiveGeneration:
    """Splits a user's request into samples, not queued yet; arguments as in `Engine.make_request`.

    Those of n > 1 are called `<request_id>#<index>` inside, and share the prompt's pages. Of the
    model's end tokens the first is no `stop_reason`.
    """
    sampling_params = asked.sampling_params
    if not sampling_params.detokenize:
        tokenizer = None
    # Where a grammar ends there is nothing to go on with.
    is_endless = sampling_params.ignore_eos and asked.grammar is None
    ends = () if is_endless else tuple(eos_token_ids)
    stop = StopRule(
        max_tokens=asked.max_tokens,
        # Only the first goes without a reason, as in vLLM; a further one is named as the reason.
        eos_token_ids=frozenset(ends[:1]),
        stop_token_ids=frozenset([*(sampling_params.stop_token_ids or ()), *ends[1:]]),
        min_tokens=sampling_params.min_tokens,
    )
    banned_ids = tuple(sorted(stop.eos_token_ids | stop.stop_token_ids))
    is_edited, num_given = bool(sampling_params.activation_edits), len(progress.token_ids)
    live = LiveGeneration(
        request_id=asked.request_id,
        is_streamed=is_streamed,
        asked=asked,
        samples=[],
        tokenizer=tokenizer,
        lora_request=lora_request,
    )
    adapter = None if lora_request is None else lora_request.lora_name
    for index in range(sampling_params.n):
        # One sample tells of the prompt, and so has to compute all of it.
        num_prompt_logprobs = asked.num_prompt_logprobs if index == 0 else None
        is_read = sampling_params.activations or sampling_params.routed_experts
        is_reported = num_prompt_logprobs is not None or is_read
        live.samples.append(
            Sample(
                asked.request_id if sampling_params.n == 1 else f"{asked.request_id}#{index}",
                asked.prompt_token_ids,
                stop,
                asked.priority,
                group=None if sampling_params.n == 1 else asked.request_id,
                skip_prefix_cache=is_reported or is_edited,
                forked_from=forked_from,
                is_private=is_edited,
                adapter=adapter,
                output_token_ids=list(progress.token_ids),
                sampling_params=sampling_params,
                owner=live,
                banned_ids=banned_ids if sampling_params.min_tokens else (),
                banned_until=len(asked.prompt_token_ids) + sampling_params.min_tokens,
                bad_word_ids=asked.bad_word_ids,
                num_logprobs=asked.num_logprobs,
                num_prompt_logprobs=num_prompt_logprobs,
                grammar=asked.grammar,
                takes_single_steps=asked.grammar is not None,
                index=index,
                tokenizer=tokenizer,
                num_given=num_given,
                token_logprobs=list(progress.token_logprobs),
                logprobs=list(progress.logprobs or ())
                if sampling_params.logprobs is not None
                else [],
                records=[UNKNOWN_RECORD] * num_given if sampling_params.record else [],
                weights_versions=[UNKNOWN_VERSION] * num_given,
                lora_versions=[UNKNOWN_VERSION] * num_given,
            )
        )
    if sampling_params.seed is not None and not sampling_params.is_greedy:
        live.set_seed(sampling_params.seed)
    return live


def as_logprobs(entry: TokenLogprob, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The token itself, then the likeliest ones by rank."""
    # Spelled out: it goes through every alternative of every row in every step.
    text = tokenizer.token_text if tokenizer is not None else lambda token: None
    found = {entry.token: Logprob(entry.logprob, entry.rank, text(entry.token))}
    for rank, token in enumerate(entry.top_tokens, start=1):
        if token not in found:
            found[token] = Logprob(entry.top_logprobs[rank - 1], rank, text(token))
    return found
