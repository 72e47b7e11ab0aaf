"""Which devices an engine runs on, and whether its model can be cut for them."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from folojax.backend.devices import Devices, default_device
from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama
from folojax.models.core.shards import is_cut, part_shape, parts_of, problems_of
from folojax.models.quantized.by_outputs import misfit
from folojax.models.quantized.quantize import is_quantized


def choose_devices(
    params: Any, count: int, num_engines: int, mesh: Mesh | None
) -> tuple[Devices, ...]:
    """The devices of each of so many engines; arguments and errors as of `_choose_for_one`.

    Of several engines the first has the devices that the parameters lie over, the others those
    behind; of a mesh each has as many, in its order. Whatever lies elsewhere is to be copied.
    """
    if num_engines == 1:
        return (_choose_for_one(params, count, mesh),)
    if mesh is not None:
        given = tuple(mesh.devices.flat)
        if len(given) % num_engines or count not in (1, len(given) // num_engines):
            raise ValueError(
                f"data_parallel_size is {num_engines}, tensor_parallel_size is {count}, and mesh "
                f"has {len(given)} devices: give a mesh of so many engines times so many devices"
            )
        count = len(given) // num_engines
    else:
        shardings = [one.sharding for one in jax.tree.leaves(params) if isinstance(one, jax.Array)]
        over = [tuple(one.mesh.devices.flat) for one in shardings if hasattr(one, "mesh")]
        held = over or [tuple(one.device_set) for one in shardings] or [(default_device(),)]
        given = (*held[0], *jax.local_devices(backend=held[0][0].platform))
        given = tuple(dict.fromkeys(given))[: num_engines * count]
    if len(given) < num_engines * count:
        raise ValueError(
            f"data_parallel_size is {num_engines}, with {count} devices for each engine, and there "
            f"are {given}: lower it"
        )
    if any(one.process_index != jax.process_index() for one in given):
        raise ValueError(
            f"data_parallel_size is {num_engines}, and {given} are of several processes: its "
            "engines are in one; of several processes each makes an LLM of its own"
        )
    _check_parts(params, count)
    return tuple(Devices(given[i : i + count]) for i in range(0, len(given), count))


def _choose_for_one(params: Any, count: int, mesh: Mesh | None) -> Devices:
    """The devices of an engine.

    Args:
        params: That it is given, or None.
        count: How many are wanted; 1: as many as the mesh has.
        mesh: All of whose devices it takes, or None: of several, those that the parameters lie
            over, or else the first ones.

    Raises:
        ValueError: there are not so many, or the parameters lie on others.
    """
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    over = [one.sharding for one in arrays if len(one.devices()) == count > 1]
    if mesh is not None:
        found = tuple(mesh.devices.flat)
        if count not in (1, len(found)):
            raise ValueError(
                f"tensor_parallel_size is {count}, and mesh has {len(found)} devices: give one of "
                "them, or a mesh of so many"
            )
    elif over and isinstance(over[0], NamedSharding):
        found = tuple(over[0].mesh.devices.flat)
    elif count > 1:
        found = tuple(jax.local_devices()[:count])
        if len(found) < count:
            raise ValueError(f"tensor_parallel_size is {count}, and there are {found}: lower it")
    elif arrays:
        found = (min(arrays[0].devices(), key=lambda one: one.id),)
    else:
        found = (default_device(),)
    if all(one.process_index != jax.process_index() for one in found):
        raise ValueError(
            f"none of {found} is of this process, {jax.process_index()}: of an engine over several "
            "processes each has devices"
        )
    devices = Devices(found)
    devices.check(params)
    _check_parts(params, devices.count)
    return devices


def _check_parts(params: Any, count: int) -> None:
    if parts_of(params) not in (1, count):
        raise ValueError(
            f"params are those of an engine on {parts_of(params)} devices, and this one has "
            f"{count}: give folojax.join_params(params, module.config)"
        )


def check_cut(model: Llama, devices: Devices, params: Any) -> None:
    """Raises a ValueError if a model, with such parameters, cannot be cut for so many devices."""
    count = devices.count
    problems = problems_of(model.config, count)
    if count > 1 and not problems:
        problems = _misfits(params, model.config, count)
    if problems:
        raise ValueError(f"tensor_parallel_size is {devices.count}: " + "; ".join(problems))


def _misfits(params: Any, config: ModelConfig, count: int) -> list[str]:
    """Which quantised kernels cannot be cut for so many devices."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    kernels = [(path[-1].key, leaf) for path, leaf in flat if is_quantized(leaf)]
    found: dict[str, None] = {}
    for name, kernel in kernels:
        if not is_cut(name, kernel):
            shape = part_shape(name, kernel, config, count)
            needed = misfit(kernel, shape)
            if needed is not None:
                told = f"{name} would be {list(shape)} on each, and must be {needed}"
                found[told] = None
    return list(found)
