"""A continuation to be scored: a prompt-only request whose tokens are reported."""

import dataclasses
import math
from collections.abc import Sequence

from folojax.engine.live_request import LiveRequest
from folojax.requests.continuations import AskedScore
from folojax.requests.outputs import ScoreOutput
from folojax.requests.prompts import ParsedPrompt
from folojax.requests.sampling_params import SamplingParams, SamplingRequest
from folojax.runner.results import PromptLogprobs, TokenLogprob
from folojax.sched.request import StopRule

NOT_SCORED = TokenLogprob(-1, math.nan, 0)
"""Of a prompt's token that was found computed."""


@dataclasses.dataclass(eq=False, kw_only=True)
class LiveScore(LiveRequest[ScoreOutput]):
    """A prompt and what is thought of its continuation.

    The sequence less its last token is the scheduler's request; the last one is scored, and never
    computed::

        prompt  p0 p1 p2 p3 | c0 c1 c2     computed: p0 ... c1     scored: c0 c1 c2

    p0 p1 p2 are computed once for all that are scored behind the same prompt.
    """

    prompt: ParsedPrompt  # what comes before
    continuation: ParsedPrompt  # what is scored
    request: SamplingRequest  # the scheduler's part

    @property
    def parts(self) -> Sequence[SamplingRequest]:
        """The one request."""
        return [self.request]

    def add_prompt_logprobs(self, chunk: PromptLogprobs) -> None:
        """Takes in a chunk; what is found computed of the prompt has no log-probabilities."""
        num_missing = chunk.first - 1 - len(self.prompt_logprobs)
        self.prompt_logprobs += [NOT_SCORED] * num_missing
        super().add_prompt_logprobs(chunk)

    def output(self) -> ScoreOutput:
        """What the user gets at the end; there is no log-probability unless all are known."""
        reason = self.request.status.finish_reason
        assert reason is not None, "a score is reported at the end"
        num_before = len(self.prompt.token_ids) - 1
        scores = self.prompt_logprobs[num_before:] if reason == "length" else []
        return ScoreOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=list(self.prompt.token_ids),
            continuation=self.continuation.text,
            token_ids=list(self.continuation.token_ids),
            logprobs=[entry.logprob for entry in scores],
            ranks=[entry.rank for entry in scores],
            finish_reason=reason,
            metrics=self.metrics(),
        )


def make_score(request_id: str, asked: AskedScore) -> LiveScore:
    """A checked prompt and continuation, not queued yet."""
    prompt, continuation, adapter, routing = asked
    is_alone = routing is not None  # what others have left was computed by other experts
    *computed, last = (int(token) for token in (*prompt.token_ids, *continuation.token_ids))
    request = SamplingRequest(
        request_id,
        tuple(computed),
        StopRule(max_tokens=0),
        group=None if is_alone else (adapter, *map(int, prompt.token_ids)),
        skip_prefix_cache=is_alone,
        is_private=is_alone,
        adapter=adapter,
        most_found_tokens=len(prompt.token_ids) - 1,
        sampling_params=SamplingParams(temperature=0),
        num_prompt_logprobs=0,
        next_token=last,
        routing=routing,
    )
    live = LiveScore(
        request_id=request_id, prompt=prompt, continuation=continuation, request=request
    )
    request.owner = live
    return live
