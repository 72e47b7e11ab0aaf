"""What a step gave: arrays on the device, read and sorted by request."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from folojax.runner.batch import Chunk, Row
from folojax.runner.residuals import ResidualPiece, wanted_of
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
    """What a step gave, by request id."""

    tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Those that were sampled."""
    logprobs: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Of them; of whoever sampled."""
    reports: dict[str, list[TokenLogprob]] = dataclasses.field(default_factory=dict)
    """Of them, all that was asked for, of requests that asked for more."""
    failed: set[str] = dataclasses.field(default_factory=set)
    """Those for which the model then gave no usable distribution (NaN, or all -inf)."""
    prompt_logprobs: dict[str, PromptLogprobs] = dataclasses.field(default_factory=dict)
    """Of requests that asked. One that was preempted and is computed again reports again."""
    residuals: dict[str, list[ResidualPiece]] = dataclasses.field(default_factory=dict)
    """Of requests that asked for activations or experts, in the order of their tokens; likewise."""


class Pending(NamedTuple):
    """Results of a call that are still on the device."""

    rows: Sequence[Row | None] = ()  # whose token each row of the report is; None: nobody's
    report: PackedReport | None = None  # of sampling; of several steps with their axis in front
    num_steps: Sequence[int] | None = None  # of use to each row; None: there is no such axis
    chunks: Sequence[Chunk] = ()  # which tokens each row of the model's call was
    scores: TokenScores | None = None  # of the tokens behind theirs
    residuals: Mapping[int, Any] | None = None  # by layer, [rows * C, E] of rows of C tokens
    row_len: int = 1  # C


def arrays_of(pending: Sequence[Pending]) -> list[Any]:
    """All arrays that `read` waits for."""
    found = [(one.report and one.report.array, one.scores, one.residuals) for one in pending]
    return jax.tree.leaves(found)


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


def follow(item: Pending) -> None:
    """Waits for the tokens of a call, and has the grammars of its rows follow them."""
    followed = [(i, row) for i, row in enumerate(item.rows) if row is not None and row.matcher]
    if item.report is None or not followed:
        return
    out: StepOutput = item.report.packing.unpack(np.asarray(item.report.array), [])
    for i, row in followed:
        if out.is_valid[i]:
            row.matcher.consume_token(out.tokens[i].item())


def read(pending: Sequence[Pending]) -> StepResult:
    """Waits for the device and sorts its rows by request."""
    result = StepResult()
    reports = [item.report and item.report.array for item in pending]
    others = [(item.scores, item.residuals) for item in pending]
    arrays = jax.device_get(list(zip(reports, others, strict=True)))
    for item, (report, (scores, residuals)) in zip(pending, arrays, strict=True):
        if item.report is not None:
            counts = item.num_steps
            for number, one in enumerate([report] if counts is None else report[: max(counts)]):
                rows = item.rows
                if counts is not None:
                    pairs = zip(rows, counts, strict=True)
                    rows = [row if number < count else None for row, count in pairs]
                _read_step(rows, item.report.packing.unpack(one, []), result)
        if scores is not None:
            _read_scores(item.chunks, scores, result)
        for index, chunk in enumerate(item.chunks if residuals else ()):
            wanted = wanted_of(chunk.row.request.sampling_params, residuals)
            if wanted and chunk.end > chunk.start:
                piece = ResidualPiece.cut(chunk, wanted, index * item.row_len)
                result.residuals.setdefault(chunk.row.request_id, []).append(piece)
    return result


def _read_step(rows: Sequence[Row | None], out: StepOutput, result: StepResult) -> None:
    """Sorts a step by request: by whole columns, as most rows ask for nothing but a token."""
    count = len(rows)
    places: Any = slice(count)
    is_valid = out.is_valid[:count]
    if not is_valid.all():
        failed = (rows[i] for i in np.flatnonzero(~is_valid).tolist())
        result.failed.update(row.request_id for row in failed if row is not None)
    if result.failed or not all(rows):
        failed_ids = result.failed
        pairs = enumerate(rows)
        places = [i for i, row in pairs if row is not None and row.request_id not in failed_ids]
        rows = [rows[i] for i in places]
    drawing: Sequence[Any] = rows
    ids = [row.request_id for row in drawing]
    tokens, logprobs = out.tokens[places, None].tolist(), out.logprobs[places, None].tolist()
    if result.tokens.keys().isdisjoint(ids):
        result.tokens.update(zip(ids, tokens, strict=True))
        result.logprobs.update(zip(ids, logprobs, strict=True))
    else:  # of several steps, one behind the other
        for request_id, token, logprob in zip(ids, tokens, logprobs, strict=True):
            result.tokens.setdefault(request_id, []).extend(token)
            result.logprobs.setdefault(request_id, []).extend(logprob)
    if out.record is not None or out.ranks.any():
        _read_reports(drawing, jax.tree.map(lambda column: column[places].tolist(), out), result)


def _read_reports(rows: Sequence[Row], out: Any, result: StepResult) -> None:
    """All that rows ask for, of columns that are lists by now: of arrays each number is slow."""
    records = None if out.record is None else list(zip(*out.record, strict=True))
    likeliest = zip(out.ranks, out.top_tokens, out.top_logprobs, strict=True)
    columns = zip(rows, out.tokens, out.logprobs, likeliest, strict=True)
    for i, (row, token, logprob, (rank, top_tokens, top_logprobs)) in enumerate(columns):
        if not row.request.is_reported:
            continue
        count = row.request.num_logprobs or 0
        tops = tuple(top_tokens[:count]), tuple(top_logprobs[:count])
        wants_record = row.request.sampling_params.record
        record = records[i] if records is not None and wants_record else None
        entry = TokenLogprob(token, logprob, rank, *tops, record)
        result.reports.setdefault(row.request_id, []).append(entry)


def _read_scores(chunks: Sequence[Chunk], scores: TokenScores, result: StepResult) -> None:
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
