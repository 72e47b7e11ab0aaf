"""What the scheduler, the runner and the engine hand on: a request with what the sampler needs."""

import dataclasses
from typing import Any

from folojax.requests.sampling_params import SamplingParams
from folojax.sched.request import Request


@dataclasses.dataclass(eq=False, kw_only=True)
class SamplingRequest(Request):
    """A request of the scheduler, and how its tokens are sampled and reported.

    The fields of `Request` are written by the scheduler, these by the engine, before it queues the
    request; the runner reads both.
    """

    sampling_params: SamplingParams  # as the user gave them
    owner: Any = dataclasses.field(default=None, repr=False)  # the user's request; opaque here
    seed: int | None = None  # of this sample; None for greedy
    banned_ids: tuple[int, ...] = ()  # not to be sampled at positions below `banned_until`
    banned_until: int = 0  # a position in the sequence, prompt included
    # Tokens that may never be completed, within or after the prompt: 1 to `MAX_BAD_WORD_TOKENS`.
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    num_logprobs: int | None = None  # alternatives to report with each token; None: no logprobs
    num_prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    next_token: int | None = None  # follows the prompt, and is to be scored with it

    @property
    def has_penalty(self) -> bool:
        """Whether a token's logit depends on what was sampled or prompted before."""
        params = self.sampling_params
        return bool(
            params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        )

    @property
    def has_slot_edits(self) -> bool:
        """Whether the request needs its own row of `EditState`, written when it joins."""
        params = self.sampling_params
        has_bias = params.logit_bias or params.allowed_token_ids is not None
        return bool(self.has_penalty or has_bias or self.bad_word_ids)

    def bans(self, position: int) -> list[tuple[int, tuple[int, ...]]]:
        """Tokens banned at a position, with those each may not follow; the bias has others."""
        bans = [(word[-1], word[:-1]) for word in self.bad_word_ids if len(word) > 1]
        if position < self.banned_until:
            bans += [(token, ()) for token in self.banned_ids]
        return bans
