"""Compiled executables are kept on disk, so that the second start of a program is fast."""

import hashlib
import platform
from pathlib import Path
from typing import Any

import jax

from folojax.models.machine.artefacts import cache_root


def enable_compilation_cache() -> None:
    """Switches JAX's persistent cache on, in a folder of this kind of machine.

    A cache directory that the program (or JAX_COMPILATION_CACHE_DIR) has set already is kept.
    """
    config: Any = jax.config  # its options are attributes that no type checker sees
    if config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla" / _machine()))
    # The engine's executables are many and small: by default JAX would keep none of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _machine() -> str:
    """A name for what compiled code depends on: versions, device, and the CPU's instructions."""
    parts = [jax.__version__, jax.devices()[0].device_kind, platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        parts += sorted({line for line in lines if line.startswith(("flags", "model name"))})
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return f"jax-{jax.__version__}-{jax.default_backend()}-{digest}"
