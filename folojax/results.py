"""What a step gave: arrays on the device, read and sorted by request."""

import dataclasses
from typing import NamedTuple

import jax

from folojax.batch import Chunk, Row
from folojax.state import StepOutput, TokenScores


class TokenLogprob(NamedTuple):
    """A token, sampled or given, and how likely it was.

    `top_tokens` and `top_logprobs` are the likeliest alternatives, descending: as many as the
    request asked for. `rank` is 0 where it asked for no log-probabilities.
    """

    token: int
    logprob: float
    rank: int
    top_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class PromptLogprobs(NamedTuple):
    """Log-probabilities of a chunk of a prompt: entry i is of the token at position `first + i`."""

    first: int
    entries: list[TokenLogprob]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step gave, by request id.

    Attributes:
        sampled: The new token; None: the model gave no usable distribution (NaN, or all -inf).
        prompt_logprobs: Of requests that asked. A request that was preempted and is computed again
            reports again.
    """

    sampled: dict[str, TokenLogprob | None] = dataclasses.field(default_factory=dict)
    prompt_logprobs: dict[str, PromptLogprobs] = dataclasses.field(default_factory=dict)


class Pending(NamedTuple):
    """Results of a call that are still on the device; row i of the arrays belongs to `rows[i]`."""

    rows: list[Row | None]
    out: StepOutput | None
    chunks: list[Chunk]
    scores: TokenScores | None


def is_scored(row: Row, position: int) -> bool:
    """Whether the token after a position has a log-probability that the request asked for."""
    if row.params.num_prompt_logprobs is None:
        return False
    return position + 1 < row.num_prompt_tokens or (
        row.params.next_token is not None and position + 1 == row.num_prompt_tokens
    )


def tokens_after(chunk: Chunk) -> list[int]:
    """The scored tokens that follow the positions of a chunk."""
    row = chunk.row
    tokens = row.token_ids[: row.num_prompt_tokens].tolist()[chunk.start + 1 : chunk.end + 1]
    if chunk.end == row.num_prompt_tokens and row.params.next_token is not None:
        tokens.append(row.params.next_token)
    return tokens


def read(pending: list[Pending]) -> StepResult:
    """Waits for the device and sorts its rows by request."""
    result = StepResult()
    arrays = jax.device_get([(item.out, item.scores) for item in pending])
    for item, (out, scores) in zip(pending, arrays, strict=True):
        if out is not None:
            _read_samples(item.rows, out, result)
        if scores is not None:
            _read_scores(item.chunks, scores, result)
    return result


def _read_samples(rows: list[Row | None], out: StepOutput, result: StepResult) -> None:
    tokens, logprobs, ranks = out.tokens.tolist(), out.logprobs.tolist(), out.ranks.tolist()
    is_valid = out.is_valid.tolist()
    for i, row in enumerate(rows):
        if row is None:
            continue
        entry = TokenLogprob(tokens[i], logprobs[i], ranks[i])
        if row.params.num_logprobs:
            entry = entry._replace(
                top_tokens=tuple(out.top_tokens[i, : row.params.num_logprobs].tolist()),
                top_logprobs=tuple(out.top_logprobs[i, : row.params.num_logprobs].tolist()),
            )
        result.sampled[row.request_id] = entry if is_valid[i] else None


def _read_scores(chunks: list[Chunk], scores: TokenScores, result: StepResult) -> None:
    for i, chunk in enumerate(chunks):
        count = chunk.row.params.num_prompt_logprobs
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
