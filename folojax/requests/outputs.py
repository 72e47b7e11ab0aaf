"""What comes back: completions, their log-probabilities and their times."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from folojax.requests.lora_request import LoRARequest

_VLLM_TIMES = {
    **dict.fromkeys(("arrival_time", "queued_ts"), "arrival_time_s"),
    **dict.fromkeys(("first_scheduled_time", "scheduled_ts"), "first_scheduled_time_s"),
    **dict.fromkeys(("first_token_time", "first_token_ts"), "first_token_time_s"),
    **dict.fromkeys(("finished_time", "last_token_time", "last_token_ts"), "finish_time_s"),
    "first_token_latency": "ttft_s",
    "num_generation_tokens": "num_output_tokens",
}
"""Names that vLLM's engines have had for what `RequestMetrics` holds."""


@dataclasses.dataclass(slots=True)
class Logprob:
    """One token's log-probability at one place.

    Attributes:
        logprob: Natural logarithm, in the distribution that EngineConfig.logprobs_mode names.
        rank: 1 is the likeliest token that can be sampled; of equals the lower id comes first.
        decoded_token: The token's text where others stand before it (so " hi" for SentencePiece's
            "\u2581hi", also as a first word); None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class LogprobRecord:
    """How a token was drawn: see `folojax.sampling.token_record` for the three distributions.

    Attributes:
        raw: Log-probability in the model's own distribution.
        tempered: After penalties, biases, bans and temperature.
        processed: In what was drawn from: `tempered` - `log_kept`.
        log_kept: Logarithm of the mass that min-p, top-k and top-p have kept; at most 0.
        entropy: Of the model's own distribution, in nats.
        rank: In the model's own distribution; 1 is the likeliest.
    """

    raw: float
    tempered: float
    processed: float
    log_kept: float
    entropy: float
    rank: int


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """Times of one request; seconds on `time.perf_counter`'s clock.

    Attributes:
        arrival_time_s: When the request was added.
        first_scheduled_time_s: When a step first computed some of it; None if none did.
        first_token_time_s: When its first token had been read; None if none was.
        finish_time_s: When it ended; None while it goes on.
        num_output_tokens: Of all its samples.
        num_preemptions: How often it lost its pages; it was computed again, or came back from host
            memory.
        compile_s: Seconds, of those from its arrival to its end, in which programs were compiled,
            or loaded that an earlier process had compiled. Rates leave them out.
        first_token_compile_s: Of these, the ones before its first token.
    """

    arrival_time_s: float
    first_scheduled_time_s: float | None
    first_token_time_s: float | None
    finish_time_s: float | None
    num_output_tokens: int
    num_preemptions: int
    compile_s: float = 0.0
    first_token_compile_s: float = 0.0

    if not TYPE_CHECKING:  # who reads vLLM's names as well

        def __getattr__(self, name: str) -> Any:
            if name not in _VLLM_TIMES:
                raise AttributeError(f"RequestMetrics has no {name!r}")
            return getattr(self, _VLLM_TIMES[name])

    @property
    def e2e_s(self) -> float | None:
        """From arrival to end, compiling included; None while it goes on."""
        return None if self.finish_time_s is None else self.finish_time_s - self.arrival_time_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, waiting and compiling included."""
        if self.first_token_time_s is None:
            return None
        return self.first_token_time_s - self.arrival_time_s

    @property
    def tpot_s(self) -> float | None:
        """Time after the first token per further one of all samples, less what was compiled.

        None below two tokens, and while it goes on.
        """
        if (
            self.first_token_time_s is None
            or self.finish_time_s is None
            or self.num_output_tokens < 2
        ):
            return None
        compile_s = self.compile_s - self.first_token_compile_s
        took_s = self.finish_time_s - self.first_token_time_s - compile_s
        return max(took_s, 0.0) / (self.num_output_tokens - 1)

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens over `e2e_s` less `compile_s`."""
        if self.e2e_s is None:
            return None
        return self.num_output_tokens / max(self.e2e_s - self.compile_s, 1e-9)


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One sample of a prompt.

    Attributes:
        index: Which of the prompt's `n` samples.
        text: Detokenised output, cut at a stop string. While the request goes on, only what can
            no longer change: it may lag behind `token_ids`.
        token_ids: All output tokens, the one that ended it included.
        cumulative_logprob: Sum of the tokens' log-probabilities.
        logprobs: For each token a dict from token id to Logprob, the sampled token first, then
            the likeliest ones by rank; None if not asked for. Later outputs of the same request
            share the dicts.
        finish_reason: "stop", "length", "abort" or "error"; None while it goes on.
        stop_reason: The stop id or stop string; None for EOS, and the id for further end tokens of
            the model; the reason after an error.
        seed: Gives the same tokens again in any batch; None for greedy.
        record: How each token was drawn; None if not asked for.
        weights_versions: For each token, how often the parameters had been updated when it was
            sampled; -1 for tokens that a fork or a snapshot began with, whose record is NaN.
        lora_versions: For each token, how often its adapter had been updated; likewise. None
            without an adapter.
        activations: By layer of `activation_taps`, the residual stream [N, E] behind it of the N
            tokens of prompt and output, less the last one, which was sampled and never computed; in
            the model's dtype, fewer after an abort or an error. None if not asked for, while the
            sample goes on, and if nothing was computed.
        routed_experts: Of the same tokens, the M experts that each was sent to in each of the L
            layers that have any, [N, L, M]; likewise.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    seed: int | None = None
    record: list[LogprobRecord] | None = None
    weights_versions: list[int] = dataclasses.field(default_factory=list)
    lora_versions: list[int] | None = None
    activations: dict[int, np.ndarray] | None = dataclasses.field(default=None, compare=False)
    routed_experts: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason is not None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples, finished or as far as they are.

    Attributes:
        request_id: As given to `add_request`, or drawn by `generate`.
        prompt: The text; None where token ids were given.
        prompt_token_ids: What the model saw.
        prompt_logprobs: For each prompt token a dict as in `CompletionOutput.logprobs`, for the
            first one None, which nothing precedes; None if not asked for, or not known yet.
        outputs: One for each of the `n` samples, by index.
        finished: Whether all of them have ended.
        metrics: Times of the request, from its arrival to the end of its last sample.
        num_cached_tokens: Tokens whose keys and values were there when it was first admitted: in
            the prefix cache, with the request that it was forked from, or in a snapshot.
        lora_request: The adapter that it was continued with.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    lora_request: LoRARequest | None = None


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """What the model thinks of a given continuation.

    Attributes:
        request_id: Drawn by `score`.
        prompt: The text; None where token ids were given.
        prompt_token_ids: What comes before. Of two texts that were encoded together, as many tokens
            as the prompt has by itself, less spaces at its end.
        continuation: The text; None where token ids were given.
        token_ids: Of the continuation: the tokens behind those.
        logprobs: Log-probability of each of them, given all before it.
        ranks: Of each of them: 1 is the token that a greedy request would have taken.
        finish_reason: "length", or "error" or "abort"; the numbers are there after "length".
        metrics: Times of the request.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    continuation: str | None
    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]
    finish_reason: str
    metrics: RequestMetrics

    @property
    def finished(self) -> bool:
        """Always: a score is reported at its end."""
        return True

    @property
    def cumulative_logprob(self) -> float:
        """Log-probability of the whole continuation."""
        return sum(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would write this continuation."""
        return bool(self.ranks) and all(rank == 1 for rank in self.ranks)


@dataclasses.dataclass(frozen=True)
class BatchMetrics:
    """Times of several requests that were served together.

    Attributes:
        num_requests: How many.
        num_prompt_tokens: Sum over the prompts.
        num_output_tokens: Sum over all samples.
        duration_s: From the first arrival to the last end, compiling included.
        mean_ttft_s: Mean of the requests' `ttft_s`; None if no request had a token.
        mean_tpot_s: Mean of the requests' `tpot_s`; None if no request had two tokens.
        num_preemptions: Sum over the requests.
        compile_s: The most `compile_s` of a request: of the whole batch, if all arrived together.
    """

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    duration_s: float
    mean_ttft_s: float | None
    mean_tpot_s: float | None
    num_preemptions: int
    compile_s: float = 0.0

    @property
    def output_throughput(self) -> float:
        """Output tokens per second of `duration_s` less `compile_s`."""
        return self.num_output_tokens / max(self.duration_s - self.compile_s, 1e-9)

    @property
    def request_throughput(self) -> float:
        """Requests per second of the same."""
        return self.num_requests / max(self.duration_s - self.compile_s, 1e-9)


def batch_metrics(outputs: list[RequestOutput]) -> BatchMetrics:
    """Sums up finished requests that were served together; of none, sums are 0 and means None."""
    metrics = [output.metrics for output in outputs]
    start = min((m.arrival_time_s for m in metrics), default=0.0)
    end = max((m.finish_time_s for m in metrics if m.finish_time_s is not None), default=start)
    return BatchMetrics(
        num_requests=len(outputs),
        num_prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        num_output_tokens=sum(m.num_output_tokens for m in metrics),
        duration_s=end - start,
        mean_ttft_s=_mean([m.ttft_s for m in metrics]),
        mean_tpot_s=_mean([m.tpot_s for m in metrics]),
        num_preemptions=sum(m.num_preemptions for m in metrics),
        compile_s=max((m.compile_s for m in metrics), default=0.0),
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
