"""Residual streams on their way to the user: rows of a call in, one array a sample and layer out.

A call reads the streams of all its tokens, padding included; the host picks those of the requests
that asked, token by token in the order of their positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from folojax.runner.batch import Row
from folojax.steps.state import DecodeInputs


class Span(NamedTuple):
    """The tokens of a request in a row of a call: at positions from `first` on."""

    row: Row
    first: int
    num_tokens: int


class Tapped(NamedTuple):
    """What a call has read, still on the device.

    Attributes:
        streams: By layer, [rows * tokens of a row, E].
        spans: Of each row that is not padding.
        row_len: Tokens of a row.
    """

    streams: Mapping[int, Any]
    spans: Sequence[Span]
    row_len: int = 1


class StreamPiece(NamedTuple):
    """By layer, the streams [N, E] of N tokens at positions from `first` on."""

    first: int
    streams: dict[int, np.ndarray]

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.first + len(next(iter(self.streams.values())))

    def until(self, end: int) -> "StreamPiece":
        """The part before a position."""
        kept = {layer: stream[: end - self.first] for layer, stream in self.streams.items()}
        return StreamPiece(self.first, kept)


def sort_streams(tapped: Tapped, found: dict[str, list[StreamPiece]]) -> None:
    """Adds to `found` what a call has read of the requests that asked, copied out of its arrays."""
    for index, (row, first, count) in enumerate(tapped.spans):
        if row.request.sampling_params.activations and count:
            start = index * tapped.row_len
            mine = {
                layer: np.array(stream[start : start + count])
                for layer, stream in tapped.streams.items()
            }
            found.setdefault(row.request_id, []).append(StreamPiece(first, mine))


def tapped_rows(
    streams: dict[int, Any],
    rows: Sequence[Row],
    inputs: DecodeInputs,
    num_tokens: Sequence[int],
    row_len: int = 1,
) -> Tapped | None:
    """What a call that decodes has read, if anything."""
    if not streams:
        return None
    spans = map(Span, rows, inputs.position.tolist(), num_tokens)
    return Tapped(streams, list(spans), row_len)


class Streams:
    """What is known of a sample: pieces that follow each other, from its first token on."""

    def __init__(self) -> None:
        self._pieces: list[StreamPiece] = []

    def add(self, piece: StreamPiece) -> None:
        """Takes in a piece; after a preemption it takes the place of what was known from there."""
        end = self._pieces[-1].end if self._pieces else 0
        assert piece.first <= end, f"tokens {end} to {piece.first - 1} are missing"
        if piece.first < end:
            kept = [one for one in self._pieces if one.first < piece.first]
            self._pieces = [one.until(piece.first) for one in kept]
        self._pieces.append(piece)

    def arrays(self, num_tokens: int) -> dict[int, np.ndarray] | None:
        """By layer, [N, E] of the first tokens, at most `num_tokens`; None: nothing is known."""
        if not self._pieces:
            return None
        layers = self._pieces[0].streams
        joined = {
            layer: np.concatenate([one.streams[layer] for one in self._pieces]) for layer in layers
        }
        self._pieces = [StreamPiece(0, joined)]  # copied once, however often it is asked for
        return self._pieces[0].until(num_tokens).streams
