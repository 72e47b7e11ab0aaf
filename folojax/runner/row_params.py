"""Sampling parameters of the running requests, as arrays indexed by slot."""

import collections
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from folojax.requests.sampling_params import SamplingRequest
from folojax.requests.user_functions import NO_FUNCTIONS, UserFunctions
from folojax.sampling.logit_edits import (
    ANY_TOKEN,
    NUM_RECENT,
    PROMPT_BIT,
    EditRows,
    SlotEdits,
)
from folojax.sampling.logits_processors import LogitsProcessor, ProcessorRows
from folojax.sampling.rows import SampleInputs, SamplingRows
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.steps.layers import NO_EXTRAS, StepExtras

NO_LOGPROBS = -1

_FEWEST_BANS = 64
_FEWEST_EDITS = 64
_EDITS_FACTOR = 8


class RowTable:
    """One entry a slot, and at index M one for rows of padding, which asks for nothing."""

    def __init__(
        self, num_slots: int, vocab_size: int, functions: UserFunctions = NO_FUNCTIONS
    ) -> None:
        self.functions = functions
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        size = num_slots + 1

        def column(value: Any, dtype: Any, *shape: int) -> Any:
            return np.full((size, *shape), value, dtype)

        self._sampling = SamplingRows(
            temperature=column(0, np.float32),
            top_k=column(vocab_size, np.int32),
            top_p=column(1, np.float32),
            min_p=column(0, np.float32),
            seed=column(0, np.uint32, 2),
        )
        # Of `EditRows`, but for the bans: slot, repetition, presence and frequency penalty.
        self._edits: list[Any] = [column(num_slots, np.int32)]
        self._edits += [column(off, np.float32) for off in (1, 0, 0)]
        self._class = column(SamplingClass.GREEDY, np.int32)
        self._num_logprobs = column(NO_LOGPROBS, np.int32)
        self._has_record = column(False, bool)
        self._has_grammar = column(False, bool)
        self._processors = column(False, bool, len(functions.processors))
        self._activation_edits = column(False, bool, len(functions.activation_edits))
        self._reads_residuals = column(False, bool)
        self._reads_experts = column(False, bool)
        # Below this position a row has bans of a step: 0 for most, never ending for bad words.
        self._banned_until = column(0, np.int32)
        self._row: list[SamplingRequest | None] = [None] * size

    def put(self, slot: int, row: SamplingRequest) -> None:
        """Sets a slot's parameters."""
        params, seed = row.sampling_params, row.seed or 0
        has_top_k = 0 < params.top_k < self.vocab_size
        sampling = (
            0.0 if params.is_greedy else params.temperature,
            params.top_k if has_top_k else self.vocab_size,
            params.top_p,
            params.min_p,
            (seed >> 32, seed & 0xFFFFFFFF),
        )
        edits = (
            slot if row.has_slot_edits else self.num_slots,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        columns = (*self._sampling, *self._edits)
        for column, value in zip(columns, (*sampling, *edits), strict=True):
            column[slot] = value
        self._class[slot] = SamplingClass.EDITED if row.has_slot_edits else params.sampling_class
        self._num_logprobs[slot] = NO_LOGPROBS if row.num_logprobs is None else row.num_logprobs
        self._has_record[slot] = params.record
        self._has_grammar[slot] = row.grammar is not None
        asked, edited = params.logits_processors or (), params.activation_edits or ()
        functions = self.functions
        self._processors[slot] = [one.name in asked for one in functions.processors]
        self._activation_edits[slot] = [one.name in edited for one in functions.activation_edits]
        self._reads_residuals[slot] = params.activations
        self._reads_experts[slot] = params.routed_experts
        self._banned_until[slot] = row.banned_until if row.banned_ids else 0
        if any(len(word) > 1 for word in row.bad_word_ids):
            self._banned_until[slot] = np.iinfo(np.int32).max
        self._row[slot] = row

    def sampling_class(self, slot: Any, positions: Any) -> SamplingClass:
        """What the most demanding row needs of the sampler; arguments as for `sample_inputs`."""
        if (positions < self._banned_until[slot]).any():  # of one step, or of several
            return SamplingClass.EDITED
        return SamplingClass(int(self._class[slot].max()))

    def by_kind(self, slot: Any, position: Any) -> list[Any]:
        """Indices of the rows that ask the sampler for the same, for all that is asked for.

        Args:
            slot: [B], B > 0.
            position: Likewise, of the tokens to be drawn.
        """
        needed = np.where(position < self._banned_until[slot], SamplingClass.EDITED, 0)
        asked = (
            np.maximum(needed, self._class[slot]),
            self._num_logprobs[slot],
            self._has_record[slot],
            self._has_grammar[slot],
            *self._processors[slot].T,
        )
        kind = np.unique(np.stack(asked), axis=1, return_inverse=True)[1].reshape(-1)
        return [np.flatnonzero(kind == number) for number in range(kind.max() + 1)]

    def most_logprobs(self, slot: Any) -> int | None:
        """The most alternatives that any of the slots reports; None if none reports anything."""
        most = int(self._num_logprobs[slot].max())
        return None if most == NO_LOGPROBS else most

    def has_record(self, slot: Any) -> bool:
        """Whether one of the slots asks for log-probability records."""
        return bool(self._has_record[slot].any())

    def has_grammar(self, slot: Any) -> bool:
        """Whether one of the slots follows a grammar."""
        return bool(self._has_grammar[slot].any())

    def processors(self, slot: Any) -> tuple[LogitsProcessor, ...]:
        """The logits processors that some of the slots ask for."""
        return _some(self.functions.processors, self._processors[slot])

    def sample_inputs(self, slot: Any, positions: Any, spec: SamplingSpec) -> SampleInputs:
        """What a sampler is given of B rows.

        Args:
            slot: [B]; M for a row that samples nothing.
            positions: Of the tokens to be drawn, [B]; or of K steps, [K, B], and then the bans are
                those of each step.
            spec: At least as demanding as every row.
        """
        rows = SamplingRows._make(column[slot] for column in self._sampling)
        position = positions if positions.ndim == 1 else positions[0]
        inputs = SampleInputs(slot, position, rows)
        if spec.processors:
            columns = [self.functions.processors.index(one) for one in spec.processors]
            is_on: Any = self._processors[slot][:, columns]
            where: Any = np.where(is_on.any(axis=1), slot, self.num_slots).astype(np.int32)
            inputs = inputs._replace(processors=ProcessorRows(where, is_on))
        if spec.needed >= SamplingClass.EDITED:
            bans = self._bans(slot, np.atleast_2d(positions))
            bans = bans[0] if positions.ndim == 1 else bans
            edits = EditRows._make([column[slot] for column in self._edits] + [bans])
            inputs = inputs._replace(edits=edits)
        return inputs

    def extras(self, slot: Any) -> tuple[StepExtras, Any]:
        """What slots ask of the model's step, and [B, Z], which rows its edits are on for."""
        edits = _some(self.functions.activation_edits, self._activation_edits[slot])
        layers = self.functions.residual_layers
        if not layers or not self._reads_residuals[slot].any():
            layers = ()
        reads_experts = bool(self._reads_experts[slot].any())
        if not edits:
            is_plain = not layers and not reads_experts
            return NO_EXTRAS if is_plain else StepExtras((), layers, reads_experts), None
        columns = [self.functions.activation_edits.index(one) for one in edits]
        return StepExtras(edits, layers, reads_experts), self._activation_edits[slot][:, columns]

    def _bans(self, slot: Any, positions: Any) -> Any:
        """The bans of K steps, [K, Z, 2 + NUM_RECENT]; positions are [K, B]."""
        found = [
            [
                (i, token, prefix)
                for i in np.flatnonzero(position < self._banned_until[slot]).tolist()
                for token, prefix in self._row_of(int(slot[i])).bans(int(position[i]))
            ]
            for position in positions
        ]
        size = _bucket(max(map(len, found)), _FEWEST_BANS, 4)
        bans: Any = np.full((len(found), size, 2 + NUM_RECENT), ANY_TOKEN, np.int32)
        bans[:, :, 0] = len(slot)
        for table, step in zip(bans, found, strict=True):
            for entry, (i, token, prefix) in zip(table, step, strict=False):
                entry[:2] = i, token
                entry[len(entry) - len(prefix) :] = prefix
        return bans

    def _row_of(self, slot: int) -> SamplingRequest:
        row = self._row[slot]
        assert row is not None, f"slot {slot} was never filled"
        return row


def slot_edits(request: SamplingRequest, token_ids: Any, vocab_size: int) -> SlotEdits:
    """What `write_slot` is to write when a request joins.

    Args:
        request: That joins.
        token_ids: All of its tokens so far.
        vocab_size: V.
    """
    history: collections.Counter[int] = collections.Counter()
    if request.has_penalty:
        num_prompt_tokens = request.num_prompt_tokens
        prompt, output = token_ids[:num_prompt_tokens], token_ids[num_prompt_tokens:]
        history.update(output.tolist())
        history.update(dict.fromkeys(prompt.tolist(), PROMPT_BIT))
    allowed = request.sampling_params.allowed_token_ids
    bias = dict(request.sampling_params.logit_bias or {})
    if allowed is not None:
        bias = {token: bias.get(token, 0.0) for token in allowed}
    bias |= {word[0]: -np.inf for word in request.bad_word_ids if len(word) == 1}
    size = _bucket(max(len(history), len(bias)), _FEWEST_EDITS, _EDITS_FACTOR)
    recent: Any = np.full(NUM_RECENT, ANY_TOKEN, np.int32)
    last = token_ids[-NUM_RECENT:]
    recent[NUM_RECENT - len(last) :] = last
    other_bias: Any = np.float32(0.0 if allowed is None else -np.inf)
    return SlotEdits(
        *_padded(history, size, vocab_size, np.int32),
        *_padded(bias, size, vocab_size, np.float32),
        other_bias,
        recent,
    )


def empty_slot_edits(vocab_size: int) -> Iterator[SlotEdits]:
    """Of every size that `slot_edits` may give, one that says nothing."""
    size, most = _FEWEST_EDITS, _bucket(vocab_size, _FEWEST_EDITS, _EDITS_FACTOR)
    while size <= most:
        nothing: Any = np.float32(0.0)
        recent: Any = np.full(NUM_RECENT, ANY_TOKEN, np.int32)
        history = _padded({}, size, vocab_size, np.int32)
        yield SlotEdits(*history, *_padded({}, size, vocab_size, np.float32), nothing, recent)
        size *= _EDITS_FACTOR


def exceptional_bans(inputs: SampleInputs) -> int:
    """Z, the room for a step's bans, where it is more than compile plans count on; else 0."""
    size: int = 0 if inputs.edits is None else inputs.edits.bans.shape[-2]
    return size if size > _FEWEST_BANS else 0


def _some(functions: tuple[Any, ...], is_on: np.ndarray) -> tuple[Any, ...]:
    """Those of the functions that are on in some row."""
    if not functions:
        return ()
    is_asked: list[bool] = np.any(is_on, axis=0).tolist()
    return tuple(itertools.compress(functions, is_asked))


def _padded(values: Mapping[int, Any], size: int, vocab_size: int, dtype: Any) -> tuple[Any, Any]:
    """Keys and values as arrays; ids of V fill up."""
    ids, padded = np.full(size, vocab_size, np.int32), np.zeros(size, dtype)
    ids[: len(values)], padded[: len(values)] = list(values), list(values.values())
    return ids, padded


def _bucket(count: int, smallest: int, factor: int) -> int:
    """The smallest size that holds `count`, of few: each has its own executable."""
    size = smallest
    while size < count:
        size *= factor
    return size
