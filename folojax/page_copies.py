"""Whole pages on the move between steps: out of the cache, into it, and from page to page."""

import bisect
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Num

from folojax.kv_cache import KVCache

COPY_SIZES = (4, 16)
"""Pages are copied in groups of so many. Not 1: for that XLA on CPU copies the whole array."""


class TakenPages(NamedTuple):
    """Some pages of one segment, out of the cache.

    Attributes:
        place: Which of the pages asked for they are; -1 is padding.
        arrays: Keys, then values, of every layer, X pages each, as they lie in the cache.
    """

    place: np.ndarray
    arrays: list[Array]


def take_pages(cache: KVCache, pages: Sequence[int]) -> list[TakenPages]:
    """Copies whole pages, all layers, out of the cache.

    Args:
        cache: Not donated.
        pages: Page ids.
    """
    arrays, firsts = _by_segment(cache)
    segment_of = [bisect.bisect_right(firsts, page) - 1 for page in pages]
    taken = []
    for segment in sorted(set(segment_of)):
        places = [place for place, found in enumerate(segment_of) if found == segment]
        for first in range(0, len(places), COPY_SIZES[-1]):
            some = places[first : first + COPY_SIZES[-1]]
            size = next(size for size in COPY_SIZES if len(some) <= size)
            index, place = np.zeros(size, np.int32), np.full(size, -1)
            index[: len(some)] = [pages[one] - firsts[segment] for one in some]
            place[: len(some)] = some
            parts = [_take(part, index) for part in _calls(arrays[segment])]
            taken.append(TakenPages(place, list(itertools.chain(*parts))))
    return taken


def put_pages(cache: KVCache, taken: Iterable[TakenPages], targets: Mapping[int, int]) -> KVCache:
    """Writes whole pages, all layers, into the cache.

    DONATES `cache`.

    Args:
        cache: Pages, new or old.
        taken: What `take_pages` gave, from this cache or one of the same layout.
        targets: Page ids by the place of what is to be written there; pages of other places are
            passed over.
    """
    arrays, firsts = _by_segment(cache)
    sizes = [segment[0].shape[0] for segment in arrays]
    for place, pages in taken:
        target = np.array([targets.get(one, -1) for one in place.tolist()])
        for segment, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
            is_here = (target >= first) & (target < first + size)
            if is_here.any():
                index = np.where(is_here, target - first, size).astype(np.int32)
                calls = zip(_calls(arrays[segment]), _calls(pages), strict=True)
                parts = [_put(part, index, some) for part, some in calls]
                arrays[segment] = list(itertools.chain(*parts))
    return _from_segments(arrays)


def copy_pages(cache: KVCache, copies: Sequence[tuple[int, int]]) -> KVCache:
    """Copies whole pages, all layers, all at once: every source is read before a target is written.

    DONATES `cache`.

    Args:
        cache: Pages, new or old.
        copies: (source, target) page ids; targets differ.
    """
    taken = take_pages(cache, [source for source, _ in copies])
    return put_pages(cache, taken, dict(enumerate(target for _, target in copies)))


def compile_copies(cache: KVCache) -> tuple[KVCache, int]:
    """Compiles what `copy_pages` may need, by copying nothing; returns how many programs there are.

    DONATES `cache`.
    """
    arrays, _ = _by_segment(cache)
    shapes = set()
    for size in COPY_SIZES:
        index = np.zeros(size, np.int32)
        for segment in arrays:
            place = np.full(size, segment[0].shape[0], np.int32)
            parts = [_put(part, place, _take(part, index)) for part in _calls(segment)]
            shapes |= {tuple(array.shape for array in part) for part in parts}
            segment[:] = itertools.chain(*parts)
    return _from_segments(arrays), 2 * len(COPY_SIZES) * len(shapes)


def _calls(arrays: list[Array]) -> list[list[Array]]:
    """The arrays of a segment, in as many calls as they are best moved with.

    On CPU one by one: a small program compiles in no time, where one over all layers takes
    seconds, and is no slower. A GPU moves a page in less time than the host needs for a call.
    """
    size = 1 if jax.default_backend() == "cpu" else len(arrays)
    return [arrays[first : first + size] for first in range(0, len(arrays), size)]


def _by_segment(cache: KVCache) -> tuple[list[list[Array]], list[int]]:
    """Keys, then values, of every layer, by segment; and the first page of each segment."""
    arrays = [[*keys, *values] for keys, values in zip(*cache, strict=True)]
    sizes = [segment[0].shape[0] for segment in arrays]
    return arrays, [0, *itertools.accumulate(sizes[:-1])]


def _from_segments(arrays: list[list[Array]]) -> KVCache:
    """A cache of the keys, then values, of every layer, by segment."""
    num_layers = len(arrays[0]) // 2
    return KVCache(
        keys=tuple(tuple(segment[:num_layers]) for segment in arrays),
        values=tuple(tuple(segment[num_layers:]) for segment in arrays),
    )


@jax.jit
def _take(arrays: list[Num[Array, "P K _ _"]], index: Int[Array, " X"]) -> list[Array]:
    return [array[index] for array in arrays]


@functools.partial(jax.jit, donate_argnums=0)
def _put(
    arrays: list[Num[Array, "P K _ _"]],
    index: Int[Array, " X"],
    pages: list[Num[Array, "X K _ _"]],
) -> list[Array]:
    return [
        array.at[index].set(some, mode="drop") for array, some in zip(arrays, pages, strict=True)
    ]
