"""Outputs as padded arrays, ready for a trainer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from folojax.requests.outputs import RequestOutput


class RecordArrays(NamedTuple):
    """The log-probability record of every output token (`LogprobRecord`); 0 elsewhere."""

    raw: Float[np.ndarray, "B N"]
    tempered: Float[np.ndarray, "B N"]
    processed: Float[np.ndarray, "B N"]
    log_kept: Float[np.ndarray, "B N"]
    entropy: Float[np.ndarray, "B N"]
    rank: Int[np.ndarray, "B N"]


class OutputArrays(NamedTuple):
    """B samples of N tokens, prompt and output, padded at the right.

        tokens  p p p o o o o . .        p: prompt, o: output, .: padding
        mask    0 0 0 1 1 1 1 0 0

    The samples of a prompt stand together, by index.
    """

    tokens: Int[np.ndarray, "B N"]
    mask: Bool[np.ndarray, "B N"]  # True for output tokens
    prompt: Int[np.ndarray, " B"]  # which of the outputs the sample belongs to, from 0
    length: Int[np.ndarray, " B"]  # tokens of the sample, prompt included
    weights_version: Int[np.ndarray, "B N"]  # of the parameters that sampled a token; -1 elsewhere
    record: RecordArrays | None  # None: some sample has none
    routed_experts: Int[np.ndarray, "B N L M"] | None = None
    """As of `CompletionOutput`; -1 for the last token of a sample and for padding, which were never
    computed. None: some sample has none."""


def outputs_to_arrays(
    outputs: Sequence[RequestOutput], *, pad_token_id: int = 0, length: int | None = None
) -> OutputArrays:
    """Lays all samples of all outputs out in arrays, as `log_likelihood` takes them.

    Args:
        outputs: Of `generate` and the like. Records are there if all of them were asked for with
            `SamplingParams(record=True)`, and experts with `routed_experts=True`.
        pad_token_id: Fills `tokens`.
        length: N; None is that of the longest sample. A fixed one spares a jitted trainer from
            being compiled for every length.

    Raises:
        ValueError: there are no outputs, or a sample is longer than `length`.
    """
    samples = [
        (i, output.prompt_token_ids, one)
        for i, output in enumerate(outputs)
        for one in output.outputs
    ]
    if not samples:
        raise ValueError("outputs is empty; at least one output is needed to make arrays of")
    lengths = [len(prompt) + len(one.token_ids) for _, prompt, one in samples]
    longest = max(lengths)
    if length is not None and length < longest:
        raise ValueError(
            f"length is {length}, but a sample has {longest} tokens, prompt included: raise it, or "
            "lower max_tokens"
        )
    shape = (len(samples), longest if length is None else length)
    tokens = np.full(shape, pad_token_id, np.int32)
    mask = np.zeros(shape, bool)
    versions = np.full(shape, -1, np.int32)
    record = None
    if all(one.record is not None for _, _, one in samples):
        dtypes = [np.int32 if name == "rank" else np.float32 for name in RecordArrays._fields]
        record = RecordArrays(*(np.zeros(shape, dtype) for dtype in dtypes))
    routed = None
    found = [one.routed_experts for _, _, one in samples if one.routed_experts is not None]
    if len(found) == len(samples):
        routed = np.full((*shape, *found[0].shape[1:]), -1, np.int32)
        for row, experts in enumerate(found):
            routed[row, : len(experts)] = experts
    for row, (_, prompt, one) in enumerate(samples):
        start, end = len(prompt), lengths[row]
        tokens[row, :end] = [*prompt, *one.token_ids]
        mask[row, start:end] = True
        versions[row, start:end] = one.weights_versions
        if record is not None and one.record:
            for name, array in record._asdict().items():
                array[row, start:end] = [getattr(token, name) for token in one.record]
    return OutputArrays(
        tokens=tokens,
        mask=mask,
        prompt=np.array([i for i, _, _ in samples], np.int32),
        length=np.array(lengths, np.int32),
        weights_version=versions,
        record=record,
        routed_experts=routed,
    )
