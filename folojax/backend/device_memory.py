"""How much memory the device of an engine has, and how much of it others hold."""

import ctypes
import os
from pathlib import Path

import jax

from folojax.backend.devices import DEFAULT_DEVICE, Devices
from folojax.compile.memory_plan import DeviceMemory

# Sizes of a container's memory, versions 2 and 1; absent or "max" where there is no limit.
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def device_memory(own_bytes: int = 0, *devices: Devices) -> DeviceMemory | None:
    """The memory of a device that engines run on, of several the least; None: nobody tells.

    Of a GPU it is what JAX may have: XLA_PYTHON_CLIENT_MEM_FRACTION of the card, 0.75 by default,
    and less where other processes hold so much of the card that this is no longer there. Several
    devices of one CPU share its memory.

    Args:
        own_bytes: Of arrays on each device that the engine counts as its own.
        *devices: Of each engine; none: JAX's default device.
    """
    each = devices or (DEFAULT_DEVICE,)
    all_devices = [one for some in each for one in (some.given or (some.first,))]
    # What other processes have of theirs they tell nobody.
    own = [one for one in all_devices if one.process_index == jax.process_index()]
    found = [_memory_of(device, own_bytes, len(own)) for device in own]
    known = [one for one in found if one is not None]
    return min(known, key=lambda one: one.limit_bytes - one.used_bytes, default=None)


def _memory_of(device: jax.Device, own_bytes: int, count: int) -> DeviceMemory | None:
    """Of one of so many devices."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        limit, pool = stats["bytes_limit"], stats.get("pool_bytes", 0)
        free = _free_bytes(device) if device.platform == "gpu" else None
        if free is not None and pool:
            limit = min(limit, pool + free)
        used = stats.get("bytes_in_use", 0) - own_bytes
        return DeviceMemory(limit_bytes=limit, used_bytes=max(used, 0))
    if device.platform != "cpu" or not hasattr(os, "sysconf"):
        return None
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in map(Path, _CGROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdecimal():
            limit = min(limit, int(text))
    return DeviceMemory(limit_bytes=limit // count)


def _free_bytes(device: jax.Device) -> int | None:
    """Of an NVIDIA card, what no process has; None if its driver does not tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    ordinal, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    number = getattr(device, "local_hardware_id", 0)
    if driver.cuDeviceGet(ctypes.byref(ordinal), number):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal):
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context):
            return None
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        return None if failed else free.value
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(ordinal)
