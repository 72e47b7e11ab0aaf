"""What a step gave: arrays on the device, read and sorted by request."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax

from folojax.runner.activation_taps import StreamPiece, Tapped, sort_streams
from folojax.runner.batch import Chunk, Row
from folojax.sampling.rows import StepOutput, TokenScores
from folojax.steps.packing import PackedReport


class TokenLogprob(NamedTuple):
    """A token, sampled or given, and how likely it was.

    `top_tokens` and `top_logprobs` are the likeliest alternatives, descending: as many as the
    request asked for. `rank` is 0 where it asked for no log-probabilities. `record` holds the
    fields of `folojax.sampling.token_record.TokenRecord`, where it asked for one.
    """

    token: int
    logprob: float
    rank: int
    top_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    record: tuple[float, ...] | None = None


class PromptLogprobs(NamedTuple):
    """Log-probabilities of a chunk of a prompt: entry i is of the token at position `first + i`."""

    first: int
    entries: list[TokenLogprob]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step gave, by request id.

    Attributes:
        sampled: The new tokens.
        failed: Those for which the model then gave no usable distribution (NaN, or all -inf).
        prompt_logprobs: Of requests that asked. A request that was preempted and is computed again
            reports again.
        streams: Of requests that asked for activations, in the order of their tokens; likewise.
    """

    sampled: dict[str, Sequence[TokenLogprob]] = dataclasses.field(default_factory=dict)
    failed: set[str] = dataclasses.field(default_factory=set)
    prompt_logprobs: dict[str, PromptLogprobs] = dataclasses.field(default_factory=dict)
    streams: dict[str, list[StreamPiece]] = dataclasses.field(default_factory=dict)


class Pending(NamedTuple):
    """Results of a call that are still on the device; row i of the arrays belongs to `rows[i]`.

    Those of several decode steps have one axis more, in front; `num_steps` says how many of them
    are of use to each row.
    """

    rows: list[Row | None]
    out: StepOutput | PackedReport | None
    chunks: list[Chunk]
    scores: TokenScores | None
    num_steps: list[int] | None = None
    tapped: Tapped | None = None


def is_scored(row: Row, position: int) -> bool:
    """Whether the token after a position has a log-probability that the request asked for."""
    if row.request.num_prompt_logprobs is None:
        return False
    return position + 1 < row.request.num_prompt_tokens or (
        row.request.next_token is not None and position + 1 == row.request.num_prompt_tokens
    )


def tokens_after(chunk: Chunk) -> list[int]:
    """The scored tokens that follow the positions of a chunk."""
    row = chunk.row
    last = min(chunk.end + 1, row.request.num_prompt_tokens)
    tokens = row.token_ids[chunk.start + 1 : last].tolist()
    if chunk.end == row.request.num_prompt_tokens and row.request.next_token is not None:
        tokens.append(row.request.next_token)
    return tokens


def read(pending: list[Pending]) -> StepResult:
    """Waits for the device and sorts its rows by request."""
    result = StepResult()
    if len(pending) == 1 and isinstance(pending[0].out, PackedReport):
        (item,) = pending
        if item.scores is None and item.tapped is None:  # most steps
            array, packing = pending[0].out
            _read_samples(item, packing.unpack(jax.device_get(array), []), result)
            return result
    streams = [item.tapped and item.tapped.streams for item in pending]
    outs = [item.out.array if isinstance(item.out, PackedReport) else item.out for item in pending]
    scored = [item.scores for item in pending]
    arrays = jax.device_get(list(zip(outs, scored, streams, strict=True)))
    for item, (out, scores, tapped) in zip(pending, arrays, strict=True):
        if isinstance(item.out, PackedReport):
            out = item.out.packing.unpack(out, [])
        if out is not None:
            _read_samples(item, out, result)
        if scores is not None:
            _read_scores(item.chunks, scores, result)
        if item.tapped is not None:
            sort_streams(item.tapped._replace(streams=tapped), result.streams)
    return result


def _read_samples(item: Pending, out: StepOutput, result: StepResult) -> None:
    if item.num_steps is None:
        _read_step(item.rows, out, result)
        return
    for number in range(max(item.num_steps)):
        rows = [
            row if number < count else None
            for row, count in zip(item.rows, item.num_steps, strict=True)
        ]
        now = StepResult()
        at_step = jax.tree.map(lambda array, number=number: array[number], out)
        _read_step(rows, at_step, now)
        for request_id, entries in now.sampled.items():
            if request_id not in result.failed:
                before = result.sampled.get(request_id, ())
                result.sampled[request_id] = (*before, *entries)
        result.failed.update(now.failed)


def _read_step(rows: list[Row | None], out: StepOutput, result: StepResult) -> None:
    logprobs, ranks = out.logprobs.tolist(), out.ranks.tolist()
    is_valid = out.is_valid.tolist()
    tops = out.top_tokens.tolist(), out.top_logprobs.tolist()
    # Spelled out: it goes through every row in every step.
    sampled, make = result.sampled, TokenLogprob
    for i, (row, token) in enumerate(zip(rows, out.tokens.tolist(), strict=False)):
        if row is None:
            continue
        if not is_valid[i]:
            result.failed.add(row.request_id)
            continue
        count = row.request.num_logprobs
        if count:
            top_tokens, top_logprobs = (tuple(top[i][:count]) for top in tops)
            entry = make(token, logprobs[i], ranks[i], top_tokens, top_logprobs)
        else:
            entry = make(token, logprobs[i], ranks[i])
        if out.record is not None and row.request.sampling_params.record:
            entry = entry._replace(record=tuple(field[i].item() for field in out.record))
        sampled[row.request_id] = (entry,)


def _read_scores(chunks: list[Chunk], scores: TokenScores, result: StepResult) -> None:
    for i, chunk in enumerate(chunks):
        count = chunk.row.request.num_prompt_logprobs
        if count is None or not is_scored(chunk.row, chunk.start):
            continue
        entries = [
            TokenLogprob(
                token,
                float(scores.logprobs[i, j]),
                int(scores.ranks[i, j]),
                tuple(scores.top_tokens[i, j, :count].tolist()),
                tuple(scores.top_logprobs[i, j, :count].tolist()),
            )
            for j, token in enumerate(tokens_after(chunk))
        ]
        first = PromptLogprobs(chunk.start + 1, [])
        result.prompt_logprobs.setdefault(chunk.row.request_id, first).entries.extend(entries)
