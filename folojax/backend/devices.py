"""Which device an engine runs on: that of its parameters, whatever mesh the caller has."""

from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding


def default_device() -> jax.Device:
    """Where JAX puts what nobody places."""
    (device,) = jax.device_put(np.zeros(())).devices()
    return device


def device_of(params: Any) -> jax.Device:
    """The one device that parameters lie on; the default one, if none of them is a JAX array.

    Raises:
        ValueError: they are sharded, or lie on several devices.
    """
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    device = min(arrays[0].devices(), key=lambda one: one.id) if arrays else default_device()
    check_devices(params, device)
    return device


def check_devices(params: Any, device: jax.Device) -> None:
    """Raises a ValueError unless all JAX arrays lie on a device whole, and need not be copied."""
    wanted = SingleDeviceSharding(device)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    others = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.sharding)
        for path, leaf in leaves
        if isinstance(leaf, jax.Array) and not leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    ]
    if others:
        name, sharding = others[0]
        raise ValueError(
            f"{len(others)} arrays of params do not lie on {device!r} alone: {name} has "
            f"{sharding}. This engine runs on one device, where its params are, and copies none of "
            "them: put all on one, as jax.device_put(params, device) does"
        )
