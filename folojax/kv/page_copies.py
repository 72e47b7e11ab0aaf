"""Whole pages on the move between steps: out of the cache, into it, and from page to page."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Num

from folojax.kv.cache import KVCache

COPY_SIZES = (4, 16)
"""Pages are copied in groups of so many. Not 1: for that XLA on CPU copies the whole array."""


class TakenPages(NamedTuple):
    """Copies of X pages of a cache.

    Attributes:
        place: For each of them its place among the pages that were asked for; -1 is padding.
        layers: Of every layer that has pages, these, [X, N, _, _, D], as they lie in the cache.
    """

    place: np.ndarray
    layers: list[Array]


class PageCopies:
    """Copies of whole pages, all layers, some arrays in a call.

    On CPU one array is best: a small program compiles in no time, where one over all layers takes
    seconds, and is no slower. A GPU moves a page in less time than the host needs for a call.
    """

    def __init__(self, arrays_per_call: int | None) -> None:
        """`arrays_per_call`: layers whose pages a call moves; None is all of them."""
        self._size = arrays_per_call

    def take(self, cache: KVCache, pages: Sequence[int]) -> list[TakenPages]:
        """Copies the pages of these ids out of the cache, which is not donated."""
        taken = []
        for first in range(0, len(pages), COPY_SIZES[-1]):
            some = pages[first : first + COPY_SIZES[-1]]
            size = next(size for size in COPY_SIZES if len(some) <= size)
            index, place = np.zeros(size, np.int32), np.full(size, -1)
            index[: len(some)] = some
            place[: len(some)] = np.arange(first, first + len(some))
            parts = [_take(part, index) for part in self._calls(cache.pages)]
            taken.append(TakenPages(place, list(itertools.chain(*parts))))
        return taken

    def put(
        self, cache: KVCache, taken: Iterable[TakenPages], targets: Mapping[int, int]
    ) -> KVCache:
        """Writes pages into the cache.

        DONATES `cache`.

        Args:
            cache: That gets them.
            taken: What `take` gave, from this cache or one of the same layout.
            targets: Page ids by the place of what is to be written there; pages of other places are
                passed over.
        """
        layers: Sequence[Array] = cache.pages
        for place, pages in taken:
            index = np.array(
                [targets.get(one, cache.num_pages) for one in place.tolist()], np.int32
            )
            calls = zip(self._calls(layers), self._calls(pages), strict=True)
            layers = list(itertools.chain(*(_put(part, index, some) for part, some in calls)))
        return cache.with_pages(layers)

    def copy(self, cache: KVCache, copies: Sequence[tuple[int, int]]) -> KVCache:
        """Copies pages all at once: every source is read before a target is written.

        DONATES `cache`.

        Args:
            cache: That has the sources, and gets the targets.
            copies: (source, target) page ids; no target is there twice.
        """
        taken = self.take(cache, [source for source, _ in copies])
        return self.put(cache, taken, dict(enumerate(target for _, target in copies)))

    def compile(self, cache: KVCache) -> KVCache:
        """Compiles all that the other methods call, by runs that copy nothing. DONATES `cache`."""
        for size in COPY_SIZES:
            cache = self.put(cache, self.take(cache, [0] * size), {})
        return cache

    def _calls(self, layers: Sequence[Array]) -> list[list[Array]]:
        size = self._size or len(layers)
        return [list(layers[first : first + size]) for first in range(0, len(layers), size)]


@jax.jit
def _take(arrays: list[Num[Array, "P N _ _ D"]], index: Int[Array, " X"]) -> list[Array]:
    return [array[index] for array in arrays]


@functools.partial(jax.jit, donate_argnums=0)
def _put(
    arrays: list[Num[Array, "P N _ _ D"]],
    index: Int[Array, " X"],
    pages: list[Num[Array, "X N _ _ D"]],
) -> list[Array]:
    return [
        array.at[index].set(some, mode="drop") for array, some in zip(arrays, pages, strict=True)
    ]
