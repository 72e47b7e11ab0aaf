"""The residual stream on its way to the user: rows of a call in, one array a sample and layer out.

A call reads the stream of all its tokens, padding included; the host picks that of the requests
that asked, token by token in the order of their positions.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from folojax.requests.sampling_params import SamplingParams
from folojax.runner.batch import Chunk


def wanted_of(sampling_params: SamplingParams, residuals: Mapping[int, Any]) -> dict[int, Any]:
    """Of what a call has read, what a request asks for; experts have keys below 0."""
    has_streams, has_experts = sampling_params.activations, sampling_params.routed_experts
    return {
        layer: found
        for layer, found in residuals.items()
        if (has_streams if layer >= 0 else has_experts)
    }


class ResidualPiece(NamedTuple):
    """By layer, the residual stream [N, E] of N tokens at positions from `first` on."""

    first: int
    by_layer: dict[int, np.ndarray]

    @classmethod
    def cut(cls, chunk: Chunk, residuals: Mapping[int, Any], start: int) -> "ResidualPiece":
        """A chunk's own, copied out of a call's arrays, where they begin at `start`."""
        end = start + chunk.end - chunk.start
        return cls(chunk.start, {layer: np.array(x[start:end]) for layer, x in residuals.items()})

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.first + len(next(iter(self.by_layer.values())))

    def until(self, end: int) -> "ResidualPiece":
        """The part before a position."""
        kept = {layer: x[: end - self.first] for layer, x in self.by_layer.items()}
        return ResidualPiece(self.first, kept)


class SampleResiduals:
    """What is known of a sample: pieces that follow each other, from its first token on."""

    def __init__(self) -> None:
        self._pieces: list[ResidualPiece] = []

    def add(self, piece: ResidualPiece) -> None:
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
        layers = self._pieces[0].by_layer
        joined = {
            layer: np.concatenate([one.by_layer[layer] for one in self._pieces]) for layer in layers
        }
        self._pieces = [ResidualPiece(0, joined)]  # copied once, however often it is asked for
        return self._pieces[0].until(num_tokens).by_layer
