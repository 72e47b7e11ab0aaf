"""Which sizes the arrays of a step may have, and so how many executables an engine may need.

A step's arrays are padded up to the next size of each axis. Few sizes mean few executables, many
sizes mean little padding. Pages are read where they lie, so no shape depends on how many are in
use: a decode step is a number of rows, a prefill step a number of rows of C tokens.
"""

import dataclasses
import itertools
from collections.abc import Iterable

from folojax.sampling.sampler import SamplingClass

_SLOT_MULTIPLE = 32

_USUAL_LOGPROBS = 20
"""J where nobody wants more, also in an engine that allows the whole vocabulary."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes of each axis, ascending."""

    decode_rows: tuple[int, ...]  # B, up to max_num_seqs
    sampled_rows: tuple[int, ...]
    """B of decode steps that sample otherwise than greedily, where model and sampler are one
    program: fewer, as each kind of sampling is a program then."""
    prefill_rows: tuple[int, ...]  # R; rows beyond the largest go into further calls
    prefill_columns: int  # C
    table_pages: int  # N, pages of max_model_len
    is_coarse: bool = False
    """Fewer kinds of sampling, as each of them is a program with the model in it: a draw from
    everything runs as one that cuts nothing, and whoever wants log-probabilities has alternatives
    computed."""
    prefill_tokens: int | None = None
    """Most tokens of prompts in a step, where a call computes no more than that though its rows
    have room for them; None: a call computes all, padding included."""

    def num_alternatives(self, wanted: int | None, most: int) -> int | None:
        """J, where so many are wanted of at most `most`; None is no log-probabilities at all.

        One size for nearly all who want any, so that one executable serves them.
        """
        if wanted is None:
            return None
        if wanted > _USUAL_LOGPROBS:
            return most
        return min(_USUAL_LOGPROBS, most) if wanted > 0 or self.is_coarse else 0

    def sampling_class(self, needed: SamplingClass) -> SamplingClass:
        """The class that a step runs as whose most demanding row needs this one."""
        is_plain_draw = needed is SamplingClass.RANDOM
        return SamplingClass.TRUNCATED if self.is_coarse and is_plain_draw else needed


def slots_for(max_num_seqs: int) -> int:
    """M, slots on the device: rounded up, so that engines of other limits share executables.

    >>> slots_for(33)
    64
    """
    return -(-max_num_seqs // _SLOT_MULTIPLE) * _SLOT_MULTIPLE


def with_parts(sizes: tuple[int, ...], first_halved: int, first_quartered: int) -> tuple[int, ...]:
    """Ascending sizes, from one on also those half-way between two, from another on quarters.

    >>> with_parts((1, 2, 4, 8, 16, 32), first_halved=4, first_quartered=16)
    (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
    """
    found = set(sizes)
    for low, high in itertools.pairwise(sizes):
        count = 4 if low >= first_quartered else 2 if low >= first_halved else 1
        found |= {low + (high - low) * part // count for part in range(1, count)}
    return tuple(sorted(found))


def powers(last: int, factor: int, first: int = 1) -> tuple[int, ...]:
    """`first`, times `factor`, ... up to `last`, which is always there (or `first`, if larger).

    >>> powers(20, 2)
    (1, 2, 4, 8, 16, 20)
    """
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] * factor, last))
    return tuple(sizes)


def up_to(sizes: Iterable[int], last: int) -> tuple[int, ...]:
    """The ascending sizes below `last`, and `last` itself.

    >>> up_to((1, 8, 32), 20)
    (1, 8, 20)
    """
    return (*(size for size in sizes if size < last), last)
