"""Sampling parameters of the running requests, as arrays indexed by slot."""

import dataclasses
from typing import Any

import numpy as np

from folojax.sampling import SamplingClass
from folojax.sampling_params import SamplingParams
from folojax.state import SamplingRows

MAX_BANNED = 16
"""X: most ids that one request may ban (EOS and stop ids, until min_tokens)."""


@dataclasses.dataclass(frozen=True)
class RowParams:
    """What the sampler needs to know of a request.

    Attributes:
        params: As the user gave them.
        seed: Of this sample; 0 for greedy, where it is not used.
        banned_ids: Not to be sampled at positions below `banned_until`; at most MAX_BANNED.
        banned_until: A position in the sequence, prompt included.
        num_logprobs: Alternatives to report with each sampled token; None: no log-probabilities.
        num_prompt_logprobs: The same for the tokens of the prompt.
        next_token: One that follows the prompt and is to be scored with it.
    """

    params: SamplingParams
    seed: int
    banned_ids: tuple[int, ...] = ()
    banned_until: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    next_token: int | None = None


class RowTable:
    """One entry a slot, and a neutral one at index M for padding rows."""

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self.num_slots = num_slots
        self._vocab_size = vocab_size
        size = num_slots + 1
        self._temperature = np.zeros(size, np.float32)
        self._top_k = np.full(size, vocab_size, np.int32)
        self._top_p = np.ones(size, np.float32)
        self._min_p = np.zeros(size, np.float32)
        self._seed = np.zeros((size, 2), np.uint32)
        self._banned = np.full((size, MAX_BANNED), vocab_size, np.int32)
        self._banned_until = np.zeros(size, np.int32)
        self._class = np.zeros(size, np.int32)

    def put(self, slot: int, row: RowParams) -> None:
        """Sets a slot's parameters."""
        params = row.params
        self._temperature[slot] = 0.0 if params.is_greedy else params.temperature
        has_top_k = 0 < params.top_k < self._vocab_size
        self._top_k[slot] = params.top_k if has_top_k else self._vocab_size
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = row.seed >> 32, row.seed & 0xFFFFFFFF
        self._banned[slot] = self._vocab_size
        self._banned[slot, : len(row.banned_ids)] = row.banned_ids
        self._banned_until[slot] = row.banned_until
        self._class[slot] = params.sampling_class

    def rows(self, slot: np.ndarray, position: np.ndarray) -> SamplingRows:
        """The parameters of slots whose next token stands at `position`."""
        banned: Any = np.where(
            (position < self._banned_until[slot])[:, None],
            self._banned[slot],
            np.int32(self._vocab_size),
        )
        fields: tuple[Any, ...] = (
            self._temperature[slot],
            self._top_k[slot],
            self._top_p[slot],
            self._min_p[slot],
            self._seed[slot],
            banned,
        )
        return SamplingRows(*fields)

    def sampling_class(self, slot: Any, position: Any) -> SamplingClass:
        """What the most demanding of the rows needs; arguments as for `rows`."""
        if (self._class[slot] == SamplingClass.EDITED).any() or (
            (position < self._banned_until[slot]) & (self._banned[slot, 0] < self._vocab_size)
        ).any():
            return SamplingClass.EDITED
        return SamplingClass(int(self._class[slot].max()))
