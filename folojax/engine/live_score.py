"""A continuation to be scored: a prompt-only request whose tokens are reported."""

import dataclasses
import math
import time

from folojax.requests.outputs import RequestMetrics, ScoreOutput
from folojax.requests.prompts import ParsedPrompt
from folojax.requests.sampling_params import SamplingParams
from folojax.runner.results import PromptLogprobs, TokenLogprob
from folojax.runner.row_params import RowParams
from folojax.sched.request import Request, StopRule


@dataclasses.dataclass(eq=False)
class ScoreJob:
    """A prompt and what is thought of its continuation.

    The sequence less its last token is the scheduler's request; the last one is scored, and never
    computed::

        prompt  p0 p1 p2 p3 | c0 c1 c2     computed: p0 ... c1     scored: c0 c1 c2

    Attributes:
        request_id: Drawn by the caller.
        prompt: What comes before.
        continuation: What is scored.
        request: The scheduler's part.
        arrival_time_s: When it was made; the times are of `time.perf_counter`.
        first_scheduled_time_s: When a step first computed some of it.
        scores: Of the tokens after the first, as far as they are known.
    """

    request_id: str
    prompt: ParsedPrompt
    continuation: ParsedPrompt
    request: Request
    arrival_time_s: float
    first_scheduled_time_s: float | None = None
    scores: list[TokenLogprob] = dataclasses.field(default_factory=list)
    is_streamed: bool = False

    @property
    def requests(self) -> list[Request]:
        """The scheduler's part."""
        return [self.request]

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self.request.is_finished

    def add_prompt_logprobs(self, chunk: PromptLogprobs) -> None:
        """Takes in a chunk; after a preemption it may be known already."""
        del self.scores[chunk.first - 1 :]
        self.scores += chunk.entries

    def restart(self) -> None:
        """Forgets the scores so far."""
        self.request.restart()
        self.scores = []

    def output(self) -> ScoreOutput:
        """What the user gets; the job ends now."""
        reason = self.request.status.finish_reason
        assert reason is not None, "a score is reported at the end"
        scores = self.scores[len(self.prompt.token_ids) - 1 :] if reason == "length" else []
        return ScoreOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=list(self.prompt.token_ids),
            continuation=self.continuation.text,
            token_ids=list(self.continuation.token_ids),
            logprobs=[entry.logprob for entry in scores],
            ranks=[entry.rank for entry in scores],
            finish_reason=reason,
            metrics=RequestMetrics(
                arrival_time_s=self.arrival_time_s,
                first_scheduled_time_s=self.first_scheduled_time_s,
                first_token_time_s=None,
                finish_time_s=time.perf_counter(),
                num_output_tokens=0,
                num_preemptions=self.request.num_preemptions,
            ),
        )


def make_score_job(request_id: str, prompt: ParsedPrompt, continuation: ParsedPrompt) -> ScoreJob:
    """A checked prompt and continuation, as the scheduler takes them."""
    *computed, last = (int(token) for token in (*prompt.token_ids, *continuation.token_ids))
    row = RowParams(SamplingParams(temperature=0), seed=0, num_prompt_logprobs=0, next_token=last)
    stop = StopRule(max_tokens=0)
    request = Request(request_id, tuple(computed), stop, row, skip_prefix_cache=True)
    return ScoreJob(request_id, prompt, continuation, request, time.perf_counter())


def has_nan(chunk: PromptLogprobs) -> bool:
    """Whether the model gave no usable distribution somewhere in a chunk."""
    return any(math.isnan(entry.logprob) for entry in chunk.entries)
