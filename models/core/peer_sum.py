"""The sum over the GPUs of one machine of what each has computed, as one kernel on each of them.

XLA leaves sums over devices to NCCL, which takes 20 microseconds for the smallest and is recorded
anew into the graph of each step. Of what a decode step sums, half a megabyte at most, each device
may as well read the others' part by itself: `peer_sum.cc`, compiled at first use by the compiler of
the machine and by NVRTC, which JAX's wheels for CUDA bring. Where there is neither, or where the
devices cannot read each other's memory, NCCL does it.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folojax.models.machine import compiler as native
from folojax.models.machine import cuda

_SOURCE = Path(__file__).with_name("peer_sum.cc")
_NAME = "folojax_peer_sum"
_LOG = logging.getLogger("folojax")
_MOST_BYTES = 2**20  # more take NCCL's ring no longer


def open_peers(devices: Sequence[jax.Device]) -> int:
    """Lets programs over these GPUs sum by the kernel.

    Returns:
        The devices, a bit each by their number in this process; 0: they sum by NCCL. The reason is
        logged.
    """
    if any(one not in jax.local_devices() for one in devices):
        return 0
    group = sum(1 << one.local_hardware_id for one in devices)
    problem = _opened(group)
    if problem is not None:
        _LOG.warning("devices sum by NCCL, slower: %s", problem)
        return 0
    return group


@functools.cache
def _opened(group: int) -> str | None:
    """Opens a group; None, or why it cannot be."""
    problem = native.register(_SOURCE, _NAME, "PeerSum", platform="CUDA")
    if problem is not None:
        return problem
    nvrtc = cuda.find_nvrtc()
    if nvrtc is None:
        return cuda.WITHOUT_NVRTC
    why = ctypes.create_string_buffer(256)
    library = native.load(_SOURCE)
    is_closed = library.open_peers(ctypes.c_uint32(group), str(nvrtc).encode(), why, len(why))
    return why.value.decode() if is_closed else None


def is_taken(x: Any, group: int) -> bool:
    """Whether the kernel sums this: few numbers of bfloat16."""
    size = x.size * x.dtype.itemsize
    return group > 0 and x.dtype == jnp.bfloat16 and size <= _MOST_BYTES and size % 16 == 0


def sum_over_peers(x: jax.Array, group: int) -> jax.Array:
    """The sum of every device's `x`, added in float32 in the order of the devices' numbers."""
    result: Any = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call(_NAME, result)(x, devices=np.uint32(group))
