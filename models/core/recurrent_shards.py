"""Recurrent layers over several devices: heads of values, and the heads of keys that go with them.

Where there are fewer heads of keys than devices, neighbours have the same ones. Short convolutions
have no heads: their channels are cut.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from folojax.models.core.recurrent import Recurrent


def part_of_recurrent(sizes: Recurrent, count: int) -> Recurrent:
    """What one of `count` devices has of recurrent layers."""
    if not sizes.has_memory:
        return dataclasses.replace(sizes, value_dim=sizes.value_dim // count)
    return dataclasses.replace(
        sizes,
        num_key_heads=max(sizes.num_key_heads // count, 1),
        num_value_heads=sizes.num_value_heads // count,
        key_copies=max(count // sizes.num_key_heads, 1),
    )


def _recurrent_rows(name: str, sizes: Recurrent) -> tuple[list[int], list[int]]:
    """What lies by heads in a kernel of a recurrent layer: rows of each, and which are of keys."""
    keys, values, heads = sizes.num_keys, sizes.num_values, sizes.num_value_heads
    is_space, is_mixed = sizes.kind == "space", name.startswith("conv")
    if not sizes.has_memory:
        return [values] * (1 if is_mixed else 3), []
    if is_space and is_mixed:
        return [values, keys, keys], [1, 2]
    if is_space:
        return [values, values, keys, keys, heads], [2, 3]
    if is_mixed:
        return [keys, keys, values], [0, 1]
    if name == "ba_proj":
        return [heads] if sizes.is_by_key_head else [heads, heads], []
    if sizes.is_by_key_head:
        return [2 * (keys + values)], []
    return [keys, keys, values, values], [0, 1]


def cut_recurrent(name: str, leaf: Any, sizes: Recurrent, count: int) -> Any:
    """A kernel of a recurrent layer in parts, [n, rows, ...]."""
    xp: Any = np if isinstance(leaf, np.ndarray) else jnp
    rows, of_keys = _recurrent_rows(name, sizes)
    copies = part_of_recurrent(sizes, count).key_copies
    parts = xp.split(leaf, np.cumsum(rows[:-1]).tolist())
    for place in of_keys:
        heads = parts[place].reshape(sizes.num_key_heads, -1)
        parts[place] = xp.repeat(heads, copies, axis=0)
    return xp.concatenate([one.reshape(count, -1, *leaf.shape[1:]) for one in parts], axis=1)


def join_recurrent(name: str, leaf: Any, sizes: Recurrent, count: int) -> Any:
    """The inverse of `cut_recurrent`."""
    xp: Any = np if isinstance(leaf, np.ndarray) else jnp
    part = part_of_recurrent(sizes, count)
    rows, of_keys = _recurrent_rows(name, part)
    parts = xp.split(leaf, np.cumsum(rows[:-1]).tolist(), axis=1)
    for place in of_keys:
        parts[place] = parts[place][:: part.key_copies]
    return xp.concatenate([one.reshape(-1, *leaf.shape[2:]) for one in parts])
