"""What comes back: completions, their log-probabilities and their times."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Logprob:
    """One token's log-probability.

    Attributes:
        logprob: Natural logarithm, in the raw model distribution (before temperature).
        decoded_token: The token's text on its own.
    """

    logprob: float
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """Times of one request; seconds on `time.perf_counter`'s clock.

    Attributes:
        arrival_time_s: When the request was added.
        first_scheduled_time_s: When a step first computed some of it; None if none did.
        first_token_time_s: When its first token had been read; None if none was.
        finish_time_s: When it ended.
        num_output_tokens: Of all its samples.
        num_preemptions: How often it lost its pages and was computed again.
    """

    arrival_time_s: float
    first_scheduled_time_s: float | None
    first_token_time_s: float | None
    finish_time_s: float
    num_output_tokens: int
    num_preemptions: int

    @property
    def e2e_s(self) -> float:
        """From arrival to end."""
        return self.finish_time_s - self.arrival_time_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, waiting included."""
        if self.first_token_time_s is None:
            return None
        return self.first_token_time_s - self.arrival_time_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None below two tokens."""
        if self.first_token_time_s is None or self.num_output_tokens < 2:
            return None
        return (self.finish_time_s - self.first_token_time_s) / (self.num_output_tokens - 1)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over `e2e_s`."""
        return self.num_output_tokens / max(self.e2e_s, 1e-9)


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One sample of a prompt.

    Attributes:
        index: Which of the prompt's `n` samples.
        text: Detokenised output, cut at a stop string.
        token_ids: All output tokens, the one that ended it included.
        cumulative_logprob: Sum of the tokens' log-probabilities in the raw model distribution.
        logprobs: Per token a dict from token id to Logprob; None if not asked for.
        finish_reason: "stop", "length", "abort" or "error".
        stop_reason: The stop id or stop string; None for EOS; the reason after an error.
        seed: Gives the same tokens again in any batch; None for greedy.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str | None
    stop_reason: int | str | None
    seed: int | None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples.

    Attributes:
        request_id: As given to `add_request`, or drawn by `generate`.
        prompt: The text; None where token ids were given.
        prompt_token_ids: What the model saw.
        outputs: One for each of the `n` samples, by index.
        finished: Whether all of them have ended.
        metrics: Times of the request, from its arrival to the end of its last sample.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics


@dataclasses.dataclass(frozen=True)
class BatchMetrics:
    """Times of several requests that were served together.

    Attributes:
        num_requests: How many.
        num_prompt_tokens: Sum over the prompts.
        num_output_tokens: Sum over all samples.
        duration_s: From the first arrival to the last end.
        mean_ttft_s: Mean time to first token; None if no request had one.
        mean_tpot_s: Mean time per output token after the first; None if no request had two.
        num_preemptions: Sum over the requests.
    """

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    duration_s: float
    mean_ttft_s: float | None
    mean_tpot_s: float | None
    num_preemptions: int

    @property
    def output_throughput(self) -> float:
        """Output tokens per second."""
        return self.num_output_tokens / max(self.duration_s, 1e-9)

    @property
    def request_throughput(self) -> float:
        """Requests per second."""
        return self.num_requests / max(self.duration_s, 1e-9)


def batch_metrics(outputs: list[RequestOutput]) -> BatchMetrics:
    """Sums up requests that were served together; of no requests, all is zero."""
    metrics = [output.metrics for output in outputs]
    start = min((m.arrival_time_s for m in metrics), default=0.0)
    end = max((m.finish_time_s for m in metrics), default=0.0)
    return BatchMetrics(
        num_requests=len(outputs),
        num_prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        num_output_tokens=sum(m.num_output_tokens for m in metrics),
        duration_s=end - start,
        mean_ttft_s=_mean([m.ttft_s for m in metrics]),
        mean_tpot_s=_mean([m.tpot_s for m in metrics]),
        num_preemptions=sum(m.num_preemptions for m in metrics),
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
