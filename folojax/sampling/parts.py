"""A vocabulary that several devices share: which part one of them has, and what they tell others.

Functions of a step run on every device at once, with its own part of the logits. What they need of
the others is a few numbers a row, gathered from all (`gather`). All devices then compute the same
of the same numbers, to the last bit: a loop that one left and another did not would never end.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_T = TypeVar("_T")


class Part(NamedTuple):
    """How the tokens lie over devices: each has as many, in order, the last ones may be padding."""

    axis: str  # of the mesh
    vocab_size: int  # V, of the whole

    def first(self, size: int) -> Int[Array, ""]:
        """The first token of this device, where each has so many."""
        return lax.axis_index(self.axis) * size


def gather(numbers: _T, part: Part) -> _T:
    """What every device has told: arrays [B] or [B, J] with an axis of devices in front.

    It is one collective. Integers go as float32, which holds those up to 16 million.
    """
    leaves, tree = jax.tree.flatten(numbers)
    columns = [leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for leaf in leaves]
    every = lax.all_gather(jnp.concatenate(columns, axis=1), part.axis)
    found, start = [], 0
    for leaf, column in zip(leaves, columns, strict=True):
        taken = every[:, :, start : start + column.shape[1]]
        found.append(taken.reshape(len(every), *leaf.shape).astype(leaf.dtype))
        start += column.shape[1]
    return jax.tree.unflatten(tree, found)


def total(number: Float[Array, " B"], part: Part | None) -> Float[Array, " B"]:
    """The sum over devices, added in one order by all; without a part there is nothing to add."""
    return number if part is None else gather(number, part).sum(axis=0)


def own_columns(table: Any, first: Int[Array, ""] | int | None, size: int) -> Any:
    """Columns of an array that each device has whole, [B, V], from the first on; 0 behind the end.

    Without a first one, all of them.
    """
    if first is None:
        return table[:, :size]
    filled = jnp.pad(table, ((0, 0), (0, size)))
    return lax.dynamic_slice_in_dim(filled, first, size, axis=1)
