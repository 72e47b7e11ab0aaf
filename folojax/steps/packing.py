"""Small arrays of one step as one: to a GPU each array is a copy of its own, 30 us of the host.

Arrays of 32 bits that have an entry for each of B rows become columns of one [B, W] of integers,
floats by their bits. Jitted code takes it apart again, which costs nothing there. A CUDA graph has
few kernels to change then, too: the next step's numbers come at one new address, and all that is
computed from them stays where it was.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a tree of arrays lies in one; hashable, static under jit.

    Attributes:
        tree: Its structure.
        fields: Shape behind the first axis, and dtype, of each leaf; None for a leaf that stays an
            array of its own: one that is no NumPy array with an entry of 32 bits for each row.
    """

    tree: Any
    fields: tuple[tuple[tuple[int, ...], str] | None, ...]

    @classmethod
    def of(cls, tree: Any, num_rows: int) -> "Packing":
        """The packing of such a tree, for B rows."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, tuple(_field(leaf, num_rows) for leaf in leaves))

    def pack(self, tree: Any) -> tuple[np.ndarray, list[Any]]:
        """The array, and the leaves that are not in it; on the host."""
        columns, rest = [], []
        for leaf, field in zip(jax.tree.leaves(tree), self.fields, strict=True):
            if field is None:
                rest.append(leaf)
            else:
                flat = np.ascontiguousarray(leaf).reshape(leaf.shape[0], -1)
                columns.append(flat.view(np.int32))
        return np.concatenate(columns, axis=1), rest

    def unpack(self, packed: Any, rest: list[Any]) -> Any:
        """The tree: of JAX arrays inside of a jitted function, of NumPy's on the host."""
        leaves, first, others = [], 0, iter(rest)
        for field in self.fields:
            if field is None:
                leaves.append(next(others))
                continue
            shape, dtype = field
            last = first + math.prod(shape)
            leaf, first = packed[:, first:last], last
            if dtype == "bool":
                leaf = leaf != 0
            elif isinstance(leaf, np.ndarray):
                leaf = np.ascontiguousarray(leaf).view(dtype)
            else:
                leaf = lax.bitcast_convert_type(leaf, dtype)
            leaves.append(leaf.reshape(packed.shape[0], *shape))
        return jax.tree.unflatten(self.tree, leaves)


class PackedReport(NamedTuple):
    """A report [B, _] of a step on its way to the host, as one array."""

    array: Any  # [B, W]
    packing: Packing


def pack_report(report: Any) -> Int[Array, "B W"]:
    """Packs a report whose leaves all have 32 bits or are bools; inside of a jitted function."""
    columns = []
    for leaf in jax.tree.leaves(report):
        if leaf.dtype != jnp.bool_:
            leaf = lax.bitcast_convert_type(leaf, jnp.int32)
        columns.append(leaf.astype(jnp.int32).reshape(leaf.shape[0], -1))
    return jnp.concatenate(columns, axis=1)


def report_packing(report: Any) -> Packing:
    """The packing of what `pack_report` takes; arrays may be shapes."""
    leaves, structure = jax.tree.flatten(report)
    return Packing(structure, tuple((leaf.shape[1:], str(leaf.dtype)) for leaf in leaves))


def _field(leaf: Any, num_rows: int) -> tuple[tuple[int, ...], str] | None:
    is_row_wise = leaf.ndim > 0 and leaf.shape[0] == num_rows and leaf.dtype.itemsize == 4
    is_row_wise = is_row_wise and isinstance(leaf, np.ndarray)
    return (leaf.shape[1:], str(leaf.dtype)) if is_row_wise else None
