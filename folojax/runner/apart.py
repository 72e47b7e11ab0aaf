"""Rows that ask for different sampling, apart: in deterministic mode each kind is a call."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from folojax.runner.row_params import RowTable
from folojax.sampling.sampler import SamplingSpec


def rows_by_spec(
    drawing: Sequence[Any],
    slots: Any,
    positions: Any,
    table: RowTable,
    spec_of: Callable[[Any, Any], SamplingSpec],
) -> dict[SamplingSpec, list[Any]]:
    """The rows that sample, by the sampler that each needs by itself.

    Args:
        drawing: Rows; None for one that samples nothing, in the result for those of other kinds.
        slots: Of the rows, at least so many.
        positions: Likewise, of the tokens to be drawn.
        table: What the rows ask for.
        spec_of: From slots [B] and positions [1, B] to the sampler that serves them.
    """
    place = np.array([i for i, row in enumerate(drawing) if row is not None], int)
    found: dict[SamplingSpec, list[Any]] = {}
    for mine in table.by_kind(slots[place], positions[place]) if len(place) else ():
        spec = spec_of(slots[place[mine]], positions[place[mine]][None])
        rows = found.setdefault(spec, [None] * len(drawing))
        for i in place[mine].tolist():
            rows[i] = drawing[i]
    return found
