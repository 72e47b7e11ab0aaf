"""The adapters that are on the device: a slot for each in stacks of one shape.

    known, on the host or where a trainer has them     a b c d e f g
    on the device, in slots                            b e a          least recently used goes first

Slots are written by programs that do not depend on the adapter: none is compiled when one comes.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from folojax.backend.devices import Devices, device_bytes, fetch
from folojax.models.core.adapted import ADAPTED, Stack, adapt, part_widths
from folojax.models.core.config import ModelConfig
from folojax.models.core.low_rank import Adapter, LowRank
from folojax.models.core.recurrent_shards import cut_recurrent
from folojax.models.core.shards import kv_copies, stack_specs, whole_shapes


def stack_shapes(
    params: Any, config: ModelConfig, slots: int, rank: int, dtype: Any, devices: Devices
) -> Any:
    """Shapes of the stacks for a model's parameters, which may be shapes, as they lie."""
    shape_of: Any = jax.ShapeDtypeStruct

    def shape(name: str, kernel: Any) -> Stack:
        of_a, of_b = (
            map(devices.over, stack_specs(name)) if devices.count > 1 else [devices.whole] * 2
        )
        width_out, width_in = kernel.shape[-2:]
        widths = [
            _spread(name, place, np.zeros((1, width)), config, devices.count).shape[1]
            for place, width in enumerate(part_widths(name, config, width_out))
        ]
        return Stack(
            shape_of((len(widths), slots, rank, width_in), dtype, sharding=of_a),
            tuple(shape_of((slots, rank, width), dtype, sharding=of_b) for width in widths),
        )

    return {
        layer: {name: shape(name, block[name]) for name in sorted(ADAPTED & block.keys())}
        for layer, block in whole_shapes(params, config).items()
        if isinstance(block, Mapping)
    }


def _spread(name: str, part: int, b: Any, config: ModelConfig, count: int) -> Any:
    """A low-rank update's outputs [r, _] of a part of a kernel, in the order of the devices.

    They are contiguous but for keys and values that several devices have, and for what lies by
    heads in one part of a recurrent layer's kernel.
    """
    sizes = config.recurrent
    if name in ("qkv", "qk") and part > 0:
        count_heads = config.heads_in(name)[part]
        heads = b.reshape(len(b), count_heads, -1)
        return np.repeat(heads, kv_copies(count_heads, count), axis=1).reshape(len(b), -1)
    if name == "in_proj" and part == 0 and sizes and not sizes.is_by_key_head:
        whole = "conv" if sizes.kind == "delta" else "in_proj"
        return cut_recurrent(whole, b.T, sizes, count).reshape(-1, len(b)).T
    return b


def stack_bytes(shapes: Any) -> int:
    """What stacks of these shapes take of each device."""
    return sum(map(device_bytes, jax.tree.leaves(shapes)))


class AdapterSlots:
    """The adapters that an engine knows, and the stacks of those that are on its device.

    Attributes:
        count: L.
        rank: R.
    """

    def __init__(self, shapes: Any, devices: Devices, config: ModelConfig) -> None:
        """Allocates the stacks; `shapes` are of `stack_shapes`."""
        first = next(iter(next(iter(shapes.values())).values())).a
        _, self.count, self.rank, _ = first.shape
        self._known: dict[str, Adapter] = {}
        self._slots: dict[str, int] = {}  # the least recently used first
        self._zeros = {name: _nothing(block) for name, block in shapes.items()}
        self._shardings = jax.tree.map(lambda one: one.sharding, shapes)
        self._num_devices, self._config = devices.count, config
        self._stacks = devices.make(
            lambda: jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes),
            self._shardings,
        )
        self._adapted: tuple[Any, Any] | None = None  # what it was made of, and what became of it
        self._write(0, {})  # compiles it

    def put(self, name: str, adapter: Adapter) -> None:
        """Takes in an adapter, or another one in place of one of that name."""
        self._known[name] = adapter
        if name in self._slots:
            self._write(self._slots[name], adapter)

    def remove(self, name: str) -> None:
        """Forgets an adapter that no row uses."""
        del self._known[name]
        self._slots.pop(name, None)

    def slot_of(self, name: str, in_use: Collection[str | None]) -> int:
        """The slot of an adapter, which is brought to the device if it is not there.

        Args:
            name: Of a known one.
            in_use: Names of those that rows of the batch have; fewer others than slots.
        """
        slot = self._slots.pop(name, None)
        if slot is None:
            free = set(range(self.count)) - set(self._slots.values())
            if free:
                slot = min(free)
            else:
                oldest = next(one for one in self._slots if one not in in_use)
                slot = self._slots.pop(oldest)
            self._write(slot, self._known[name])
        self._slots[name] = slot
        return slot

    def adapted(self, params: Any) -> Any:
        """A model's parameters with the stacks beside them; copies no array."""
        if self._adapted is None or self._adapted[0] is not params:
            self._adapted = params, adapt(params, self._stacks)
        return self._adapted[1]

    def _write(self, slot: int, adapter: Adapter) -> None:
        where = np.int32(slot)
        self._adapted = None
        for layer, block in self._stacks.items():
            new = dict(self._zeros[layer])
            for name, parts in adapter.get(layer, {}).items():
                new[name] = self._padded(name, parts, new[name])
            is_cut = self._num_devices > 1
            lies = tuple(jax.tree.leaves(self._shardings[layer])) if is_cut else None
            self._stacks[layer] = _write_block(block, where, new, lies)

    def _padded(self, name: str, parts: tuple[LowRank | None, ...], zeros: Stack) -> Stack:
        """Updates of a kernel as a slot has them: of full rank, scaled, of the model's dtype."""
        a: Any = zeros.a.copy()
        b: Any = tuple(one.copy() for one in zeros.b)
        for part, update in enumerate(parts):
            if update is not None:
                rank = update.a.shape[0]
                given_a, given_b = fetch((update.a, update.b))
                a[part, 0, :rank] = given_a
                scaled = np.asarray(given_b, np.float32).T * np.float32(update.scale)
                b[part][0, :rank] = _spread(name, part, scaled, self._config, self._num_devices)
        return Stack(a, b)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="shardings")
def _write_block(stacks: Any, slot: Array, new: Any, shardings: tuple[Any, ...] | None) -> Any:
    """DONATES `stacks`; they lie as before, over several devices by `shardings`."""
    written = {
        name: Stack(
            stack.a.at[:, slot].set(new[name].a[:, 0]),
            tuple(old.at[slot].set(one[0]) for old, one in zip(stack.b, new[name].b, strict=True)),
        )
        for name, stack in stacks.items()
    }
    if shardings is None:
        return written
    leaves, tree = jax.tree.flatten(written)
    kept = map(jax.lax.with_sharding_constraint, leaves, shardings)
    return jax.tree.unflatten(tree, kept)


def _nothing(block: Mapping[str, Stack]) -> dict[str, Stack]:
    """The stacks of a layer with one slot, and nothing in it; on the host."""
    zeros: Any = np.zeros
    return {
        name: Stack(
            zeros((stack.a.shape[0], 1, *stack.a.shape[2:]), stack.a.dtype),
            tuple(zeros((1, *one.shape[1:]), one.dtype) for one in stack.b),
        )
        for name, stack in block.items()
    }
