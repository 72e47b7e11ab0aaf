"""Where the arrays of an engine lie: on one device, or over a mesh of several.

    parameters      as the table of `folojax.models.core.shards` says
    pages, states   by heads of keys and values
    all else        whole, on each device

An engine runs where they lie, whatever mesh or default device the caller has set.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from folojax.kv.cache import KVCache
from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama
from folojax.models.core.peer_sum import open_peers
from folojax.models.core.recurrence import RecurrentState
from folojax.models.core.shards import (
    AXIS,
    STATE_SPECS,
    cut,
    join,
    join_params,
    part_of,
    specs_of,
)
from folojax.models.quantized.quantize import is_quantized
from folojax.steps.mail import open_mail

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where the arrays of an engine lie.

    `given` has them in their order; (): JAX's default device.
    """

    given: tuple[jax.Device, ...] = ()

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.given) or 1

    @property
    def first(self) -> jax.Device:
        """The only one, or the first of a mesh."""
        return self.given[0] if self.given else default_device()

    @property
    def whole(self) -> Sharding:
        """That of what every device has in full."""
        return self.over(PartitionSpec()) if self.count > 1 else SingleDeviceSharding(self.first)

    @property
    def is_local(self) -> bool:
        """Whether all are this process's."""
        return all(one.process_index == jax.process_index() for one in self.given)

    @property
    def least_memory(self) -> int:
        """Bytes that JAX may have of each, as far as this process is told; 0: of none."""
        every, index = self.given or (self.first,), jax.process_index()
        own = [one for one in every if one.process_index == index]
        limits = ((one.memory_stats() or {}).get("bytes_limit", 0) for one in own)
        # In MiB: what processes tell each other has 32 bits.
        return self.agree(min(limits, default=0) >> 20) << 20

    @property
    def first_gpu(self) -> int | None:
        """The number of the first, if it is a GPU."""
        return self.first.local_hardware_id if self.first.platform == "gpu" else None

    def open_mail(self) -> str | None:
        """Lets programs on the devices be told masks while they run; None, or why not."""
        if not self.is_local:
            return "several processes share the devices"
        if self.first.platform not in ("cpu", "gpu"):
            return f"programs on {self.first.platform} wait for nobody"
        is_gpu = self.first.platform == "gpu"
        given = self.given or (self.first,)
        return open_mail(tuple(one.local_hardware_id for one in given) if is_gpu else None)

    def agree(self, number: int) -> int:
        """The least of what the processes of the devices have each found, in all of them."""
        if self.is_local:
            return number
        return int(np.min(process_allgather(np.int64(number))))

    def part(self, model: Llama) -> Llama:
        """The module that each device runs."""
        if self.count == 1:
            return model
        peers = open_peers(self.given) if self.first.platform == "gpu" else 0
        return model.clone(config=part_of(model.config, self.count, peers))

    def place(self, arrays: _T) -> _T:
        """Commits arrays to every device; one that is there already is shared, not copied.

        To jit, committed arrays and others are different inputs: were some of either kind,
        parameters that come from elsewhere would need executables of their own.
        """
        return jax.tree.map(lambda leaf: self.put(leaf, self.whole), arrays)

    def put(self, leaf: Any, sharding: Sharding) -> jax.Array:
        """An array with a sharding; of several processes each puts its own parts there."""
        if sharding.is_fully_addressable or not is_readable(leaf):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    def make(self, function: Callable[[], _T], shardings: Any = None) -> _T:
        """Commits what a function makes of nothing, where it is made; None: where `shapes` lie."""
        if self.count == 1:
            with jax.default_device(self.first):
                return self.place(function())
        lies = shardings or self._shardings(jax.eval_shape(function))
        return jax.jit(function, out_shardings=lies)()

    def shapes(self, shapes: Any) -> Any:
        """Shapes of arrays that lie where those of the engine do; other than parameters."""
        return jax.tree.map(
            lambda sharding, some: jax.tree.map(lambda leaf: _shape(leaf, sharding), some),
            self._shardings(shapes),
            shapes,
        )

    def param_shapes(self, params: Any, config: ModelConfig) -> Any:
        """Shapes of parameters as they lie here; they may be shapes."""
        if self.count == 1:
            return self.shapes(params)

        def placed(path: Any, leaf: Any) -> Any:
            name = path[-1].key
            shape = jax.tree.map(lambda one: _shape(one, None), leaf)
            form = _form(name, shape, config, self.count)
            return jax.tree.map(_shape, form, self._param(name, form, config))

        return jax.tree_util.tree_map_with_path(placed, params, is_leaf=is_quantized)

    def place_param(self, name: str, leaf: Any, config: ModelConfig) -> Any:
        """A parameter of that name in its layer or model, as it lies here; of NumPy or JAX."""
        if self.count == 1:
            return self.place(leaf)
        leaf = cut(name, leaf, config, self.count)
        return jax.tree.map(self.put, leaf, self._param(name, leaf, config))

    def place_params(self, params: Any, config: ModelConfig) -> Any:
        """Parameters as they lie here.

        Those that do already are taken as they are. Of the others, those that lie over the same
        devices in some other way are moved, layer by layer, by one jitted function: what it needs
        beside its results is a layer's.
        """
        if self.count == 1:
            return jax.tree.map(self._shared, params)
        blocks = {name: one for name, one in params.items() if isinstance(one, dict)}
        outer = {name: one for name, one in params.items() if name not in blocks}
        placed = {name: self._place_block(one, config) for name, one in blocks.items()}
        return placed | self._place_block(outer, config)

    def adopt(self, params: _T, config: ModelConfig) -> _T:
        """Parameters of which no array lies elsewhere: those that did are copied.

        No device gets the whole of what is cut, if that divides as it lies.
        """

        def copied(spec: PartitionSpec, leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array) or self._may_take(leaf):
                return leaf
            if self.count == 1:
                return self.place(leaf)
            is_even = leaf.ndim >= len(spec) and not any(
                size % self.count for size, axis in zip(leaf.shape, spec, strict=False) if axis
            )
            return jax.device_put(leaf, self.over(spec) if is_even else self.whole)

        def of_param(path: Any, param: Any) -> Any:
            leaves, tree = jax.tree.flatten(param)
            specs = specs_of(str(getattr(path[-1], "key", "")), param, config)
            return jax.tree.unflatten(tree, map(copied, specs, leaves))

        return jax.tree_util.tree_map_with_path(of_param, params, is_leaf=is_quantized)

    def _place_block(self, block: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
        """The parameters of a layer, or those outside of the layers."""
        forms = self.param_shapes(block, config)
        moved = {
            name: jax.tree.map(_without_axis_types, leaf)
            for name, leaf in block.items()
            if all(map(self._is_over, jax.tree.leaves(leaf)))
            and not all(map(lies_as, jax.tree.leaves(leaf), jax.tree.leaves(forms[name])))
        }
        if moved:
            forms = {name: forms[name] for name in moved}
            block = block | _mover(self.count, tuple(forms.items()), config)(moved)
        return {name: self.place_param(name, leaf, config) for name, leaf in block.items()}

    def join_param(self, name: str, leaf: Any, config: ModelConfig) -> Any:
        """A parameter as the module has it; of NumPy or JAX."""
        return leaf if self.count == 1 else join(name, leaf, config, self.count)

    def to_host(self, params: Any, config: ModelConfig) -> Any:
        """Parameters as the module has them; those of several devices come to the host for it."""
        return join_params(fetch(params) if self.count > 1 else params, config)

    def check(self, params: Any) -> None:
        """Raises a ValueError unless the JAX arrays among parameters lie where the engine runs."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        others = [
            (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.sharding)
            for path, leaf in leaves
            if isinstance(leaf, jax.Array) and not self._may_take(leaf)
        ]
        if not others:
            return
        name, sharding = others[0]
        told = f"{len(others)} arrays of params do not lie on "
        if self.count > 1:
            told += f"the devices {list(self.given)}: {name} has {sharding}. An engine on several "
            told += "devices takes arrays from those: move them there, or give it their mesh="
        else:
            told += f"{self.first!r} alone: {name} has {sharding}. An engine on one device runs "
            told += "where its params are and copies none of them: put all on one, as "
            told += "jax.device_put(params, device) does, or give LLM(mesh=) the mesh they lie over"
        raise ValueError(told)

    def _shared(self, leaf: Any) -> jax.Array:
        """A parameter on the device; it is committed to it if the caller's array was.

        A trainer has arrays beside them that are not, such as those of an optimizer: its step would
        be compiled once for these and once for what it returns.
        """
        with jax.default_device(self.first):
            array = jnp.asarray(leaf, leaf.dtype)  # of no weak type, another input to jit
        return self.place(array) if array.committed else array

    def _may_take(self, leaf: jax.Array) -> bool:
        if self.count == 1:
            return leaf.sharding.is_equivalent_to(self.whole, leaf.ndim)
        return leaf.sharding.device_set <= set(self.given)

    def _is_over(self, leaf: Any) -> bool:
        """Whether an array lies over all devices, in their order, as what is jitted for these."""
        if not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding):
            return False
        return tuple(leaf.sharding.mesh.devices.flat) == self.given

    def _param(self, name: str, leaf: Any, config: ModelConfig) -> Any:
        """How a parameter lies, array by array; it is in the form of `cut`."""
        lies = map(self.over, specs_of(name, leaf, config))
        return jax.tree.unflatten(jax.tree.structure(leaf), lies)

    def over(self, spec: PartitionSpec) -> NamedSharding:
        """Over the mesh of several."""
        return NamedSharding(Mesh(np.array(self.given), (AXIS,)), spec)

    def _shardings(self, tree: Any) -> Any:
        """One for every array of a tree, and for a cache one for each layer's."""

        def sharding(node: Any) -> Any:
            if self.count == 1 or not isinstance(node, KVCache):
                return self.whole
            before = 2 if node.format.order == "heads" else 3
            pages = self.over(PartitionSpec(*[None] * before, AXIS))
            state: Any = tuple(map(self.over, STATE_SPECS))
            # Layers without attention have pages of nothing, of which XLA knows no parts.
            return node.with_pages(
                [pages if one.size else self.whole for one in node.pages]
            ).with_states([RecurrentState(*state)] * len(node.states))

        return jax.tree.map(sharding, tree, is_leaf=lambda node: isinstance(node, KVCache))


DEFAULT_DEVICE = Devices()


def is_readable(leaf: Any) -> bool:
    """Whether this process can read the whole of an array without the others."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def fetch(tree: _T) -> _T:
    """Arrays on the host, in every process; where others have parts of one, all have to ask."""

    def get(leaf: Any) -> Any:
        return leaf if is_readable(leaf) else process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(get, tree))


def default_device() -> jax.Device:
    """Where JAX puts what nobody places."""
    (device,) = jax.device_put(np.zeros(())).devices()
    return device


def lies_as(leaf: Any, form: Any) -> bool:
    """Whether an array has the shape of another, and lies as that does."""
    is_same = isinstance(leaf, jax.Array) and leaf.shape == form.shape
    return is_same and leaf.sharding.is_equivalent_to(form.sharding, leaf.ndim)


def device_bytes(leaf: Any) -> int:
    """Bytes of an array or of its shape that one device has."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * int(leaf.dtype.itemsize)


def _shape(leaf: Any, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _without_axis_types(leaf: jax.Array) -> jax.Array:
    """The same array, of whose mesh no axis is explicit: such a mesh restricts what is computed."""
    assert isinstance(leaf.sharding, NamedSharding), f"an array is {leaf.sharding}"
    mesh = leaf.sharding.mesh
    plain = NamedSharding(Mesh(mesh.devices, mesh.axis_names), leaf.sharding.spec)
    return jax.device_put(leaf, plain)


@functools.lru_cache(maxsize=1024)
def _form(name: str, leaf: Any, config: ModelConfig, count: int) -> Any:
    return jax.eval_shape(functools.partial(cut, name, config=config, count=count), leaf)


@functools.lru_cache(maxsize=16)
def _mover(count: int, forms: tuple[tuple[str, Any], ...], config: ModelConfig) -> Any:
    def move(leaves: dict[str, Any]) -> dict[str, Any]:
        return {name: cut(name, leaf, config, count) for name, leaf in leaves.items()}

    return jax.jit(move, out_shardings=jax.tree.map(lambda one: one.sharding, dict(forms)))
