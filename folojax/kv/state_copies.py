"""States of recurrent layers on the move between steps, from entry to entry of a cache.

::

    entries    | slots of running requests | kept for the prefix cache | padding |
                        ^ |                        | ^
                        | `-------- save ----------|-'       behind the step that has led there
                        `---------- load ----------'         before the first step of a request
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Int

from folojax.kv.cache import KVCache
from folojax.models.core.recurrence import RecurrentState

_SIZES = (2, 8)
"""States are copied in groups of so many. Not 1: for that XLA on CPU copies the whole array."""


def copy_states(cache: KVCache, copies: Sequence[tuple[int, int]]) -> KVCache:
    """Copies states of all recurrent layers: of a group, every source is read before a target.

    DONATES `cache`.

    Args:
        cache: That has the sources, and gets the targets.
        copies: (source, target) entries; no target is there twice, or a source of another.
    """
    states = cache.states
    padding = len(states[0].conv) - 1
    for first in range(0, len(copies), _SIZES[-1]):
        some = copies[first : first + _SIZES[-1]]
        size = next(size for size in _SIZES if len(some) <= size)
        index = np.full((2, size), padding, np.int32)
        index[:, : len(some)] = np.array(some).T
        states = [_copy(one, index) for one in states]
    return cache.with_states(states)


def compile_copies(cache: KVCache) -> KVCache:
    """Compiles what `copy_states` calls, by runs that copy padding alone. DONATES `cache`."""
    if cache.states:
        padding = len(cache.states[0].conv) - 1
        for size in _SIZES:
            cache = copy_states(cache, [(padding, padding)] * size)
    return cache


@functools.partial(jax.jit, donate_argnums=0)
def _copy(state: RecurrentState, index: Int[Array, "2 X"]) -> RecurrentState:
    source, target = index
    return jax.tree.map(lambda one: one.at[target].set(one[source]), state)
