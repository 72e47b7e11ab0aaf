"""Beam search over one prompt: which beams go on, which have ended. Scores are as in transformers.

Of each step's candidates, every open beam's likeliest continuations, the best are looked at::

    open beams x tokens ─> best of them all ─┬─ they go on ────────> the best `beam_width` are open
                                             └─ they have ended ──> of the first `beam_width`: kept,
                                                                    if they are among the best ended

A beam's score is its log-probability over a power of the number of its tokens, its end included:
the search is over once no open beam would beat the worst of `beam_width` ended ones if it ended
now, or where all have reached their longest.

Source: `GenerationMixin._beam_search` of transformers, with early_stopping=False.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from folojax.requests.outputs import Logprob
from folojax.requests.vllm_names import BEAM_FIELDS, takes_names
from folojax.sched.option_fields import documented, option, option_problems
from folojax.text.plain_numbers import plain


@takes_names(BEAM_FIELDS)
@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How `LLM.beam_search` continues prompts.

    Raises:
        ValueError: some fields are out of range; all of them are named.
    """

    beam_width: int = option(
        dataclasses.MISSING, "Beams that are open, and that are returned.", at_least=1, at_most=1024
    )
    max_tokens: int = option(dataclasses.MISSING, "Most output tokens of a beam.", at_least=1)
    ignore_eos: bool = option(False, "The model's end tokens are tokens like any other.")
    length_penalty: float = option(
        1.0,
        """Power of a beam's length that divides its log-probability: above 0 is for long ones, 0
        leaves it as it is.""",
        at_least=-100,
        at_most=100,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        if problems := option_problems(self):
            raise ValueError("BeamSearchParams: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class BeamSearchSequence:
    """A beam.

    Attributes:
        tokens: Of the prompt and the output, an end token included.
        logprobs: For each output token a dict from token id to Logprob, of all that were compared.
        cum_logprob: Log-probability of the output.
        text: Of all tokens, special ones too; None without a tokenizer.
        finish_reason: "stop" or "length".
        stop_reason: The end token; None for "length".
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass(frozen=True)
class BeamSearchOutput:
    """What beam search has found for a prompt.

    Attributes:
        sequences: The best beams, the best first.
    """

    sequences: list[BeamSearchSequence]


class BeamSearch:
    """The search from one prompt.

    Args:
        prompt: Its tokens.
        params: How it goes on.
        eos_token_ids: What ends a beam.
        max_tokens: Most output tokens.

    Attributes:
        open: The beams that go on, the best first; none once the search is over.
        ended: The best that have ended, by score, the best first.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: BeamSearchParams,
        eos_token_ids: Sequence[int],
        max_tokens: int,
    ) -> None:
        self.open = [BeamSearchSequence(list(prompt), [])]
        self.ended: list[tuple[float, BeamSearchSequence]] = []
        self._params, self._max_tokens = params, max_tokens
        self._eos_token_ids = () if params.ignore_eos else tuple(eos_token_ids)
        self._num_tokens = 0

    @staticmethod
    def num_logprobs(params: BeamSearchParams, eos_token_ids: Sequence[int]) -> int:
        """The likeliest tokens that a step needs of each beam: if all ends come first, enough."""
        num_ends = 0 if params.ignore_eos else len(eos_token_ids)
        return max(2, 1 + num_ends) * params.beam_width

    def take(self, logprobs: Sequence[Mapping[int, Logprob]]) -> None:
        """Goes on by a token: the likeliest ones of each open beam are known."""
        width, power = self._params.beam_width, self._params.length_penalty
        self._num_tokens += 1
        found = [
            (beam.cum_logprob + one.logprob, beam, token, row)
            for beam, row in zip(self.open, logprobs, strict=True)
            for token, one in row.items()
        ]
        found.sort(key=lambda one: -one[0])
        length = self._num_tokens**power
        going = []
        most = self.num_logprobs(self._params, self._eos_token_ids)
        for place, candidate in enumerate(found[:most]):
            beam = self._continued(*candidate)
            if beam.finish_reason is None:
                going.append(beam)
            elif place < width:
                self.ended.append((beam.cum_logprob / length, beam))
        self.ended = sorted(self.ended, key=lambda one: -one[0])[:width]
        self.open = going[:width]
        worst = self.ended[-1][0] if len(self.ended) == width else -math.inf
        if self.open and self.open[0].cum_logprob / length <= worst:
            self.open = []

    def _continued(
        self, total: float, beam: BeamSearchSequence, token: int, row: Mapping[int, Logprob]
    ) -> BeamSearchSequence:
        finish_reason = "length" if self._num_tokens == self._max_tokens else None
        stop_reason: Any = token if token in self._eos_token_ids else None
        return BeamSearchSequence(
            [*beam.tokens, token],
            [*beam.logprobs, dict(row)],
            total,
            finish_reason="stop" if stop_reason is not None else finish_reason,
            stop_reason=stop_reason,
        )
