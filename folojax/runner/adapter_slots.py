"""The adapters that are on the device: a slot for each in stacks of one shape.

    known, on the host or where a trainer has them     a b c d e f g
    on the device, in slots                            b e a          least recently used goes first

Slots are written by programs that do not depend on the adapter: none is compiled when one comes.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

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
        self._shardings = jax.tree.map(lambda one: one.sharding, shapes)
        self._devices, self._config = devices, config
        self._stacks = devices.make(
            lambda: jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes),
            self._shardings,
        )
        self._adapted: tuple[Any, Any] | None = None  # what it was made of, and what became of it
        self._write(0, {})  # compiles it

    def put(self, name: str, adapter: Adapter) -> None:
        """Takes in an adapter, or another one in place of one of that name.

        It is brought to the device at once if it has a slot, or there is one that no adapter has.
        Where that fails, such as for arrays that are deleted, it has no slot and is not taken in.
        """
        slot = self._slots.pop(name, None)
        if slot is None and len(self._slots) < self.count:
            slot = self._free_slot()
        if slot is not None:
            self._write(slot, adapter)
            self._slots[name] = slot
        self._known[name] = adapter

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
            if len(self._slots) < self.count:
                slot = self._free_slot()
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

    def _free_slot(self) -> int:
        return min(set(range(self.count)) - set(self._slots.values()))

    def _write(self, slot: int, adapter: Adapter) -> None:
        where = np.int32(slot)
        self._adapted = None
        for layer, block in self._stacks.items():
            own = adapter.get(layer, {})
            new = {name: self._given(name, own.get(name), one) for name, one in block.items()}
            is_cut = self._devices.count > 1
            lies = tuple(jax.tree.leaves(self._shardings[layer])) if is_cut else None
            self._stacks[layer] = _write_block(block, where, new, lies)

    def _given(self, name: str, parts: tuple[LowRank | None, ...] | None, stack: Stack) -> "_Given":
        """Updates of a kernel as programs take them: of full rank, in float32."""
        count, (_, _, rank, width) = len(stack.b), stack.a.shape
        none: LowRank = LowRank(_zeros((rank, width)), None, 0.0)
        found = [none if one is None else one for one in parts or [None] * count]
        a_of = {id(one.a): self._on_device(one.a, 0) for one in found}  # parts may have the same
        b = []
        for place, (update, own) in enumerate(zip(found, stack.b, strict=True)):
            given = _zeros((own.shape[2], rank)) if update.b is None else update.b
            if self._devices.count > 1 and update.b is not None:
                cut = fetch(given).T
                given = _spread(name, place, cut, self._config, self._devices.count).T
            b.append(self._on_device(given, 1))
        scales = np.array([one.scale for one in found], np.float32)
        return _Given(tuple(a_of[id(one.a)] for one in found), tuple(b), scales)

    def _on_device(self, given: Any, axis: int) -> Any:
        """An array in float32, with zeros behind its rank; what is on the device stays there."""
        is_whole = given.shape[axis] == self.rank
        if self._devices.count == 1 and is_whole and _is_at(given, self._devices.first):
            return jax.device_put(given, self._devices.whole)
        host = np.asarray(fetch(given), np.float32)
        if not is_whole:
            missing = [
                (0, self.rank - host.shape[axis] if place == axis else 0) for place in (0, 1)
            ]
            host = np.pad(host, missing)
        elif isinstance(given, np.ndarray) and given.flags.writeable:
            host = host.copy()  # it may be the caller's, who may change it while it is under way
        return host if self._devices.count > 1 else jax.device_put(host, self._devices.whole)


class _Given(NamedTuple):
    """The updates of one kernel on their way to a slot, part by part."""

    a: tuple[Any, ...]  # [R, I]
    b: tuple[Any, ...]  # [_, R]
    scales: np.ndarray  # [P]


@functools.partial(jax.jit, donate_argnums=0, static_argnames="shardings")
def _write_block(
    stacks: Any, slot: Array, new: Any, shardings: tuple[Any, ...] | None
) -> dict[str, Stack]:
    """DONATES `stacks`; they lie as before, over several devices by `shardings`."""

    def write(stack: Stack, given: _Given) -> Stack:
        a = jnp.stack(given.a).astype(stack.a.dtype)
        scaled = zip(given.b, given.scales, strict=True)
        b = [(one.T * scale).astype(stack.a.dtype) for one, scale in scaled]
        pairs = zip(stack.b, b, strict=True)
        return Stack(stack.a.at[:, slot].set(a), tuple(old.at[slot].set(one) for old, one in pairs))

    written = {name: write(stack, new[name]) for name, stack in stacks.items()}
    if shardings is None:
        return written
    leaves, tree = jax.tree.flatten(written)
    kept = map(jax.lax.with_sharding_constraint, leaves, shardings)
    return jax.tree.unflatten(tree, kept)


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, int]) -> np.ndarray:
    """An update of nothing, which nobody writes to."""
    zeros = np.zeros(shape, np.float32)
    zeros.flags.writeable = False
    return zeros


def _is_at(given: Any, device: jax.Device) -> bool:
    """Whether an array can be taken from where it is."""
    is_own = isinstance(given, jax.Array) and given.devices() == {device}
    return is_own and given.dtype == jnp.float32
