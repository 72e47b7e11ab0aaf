"""Kernels in C++ that programs of XLA call, compiled on the machine that runs them.

JAX brings the headers (`jax.ffi`); what is needed beside is a C++ compiler. The library is kept in
the user's cache, under a name that says all that it depends on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib

from folojax.models.artefacts import build_once, cache_root

GROUP_PRODUCT = "folojax_group_product"
"""The custom call of `group_product.cc`, once `has_group_product` has said that it is there."""

_SOURCE = Path(__file__).with_name("group_product.cc")
_FLAGS = ("-std=c++17", "-O2", "-mavx2", "-mfma", "-mf16c", "-shared", "-fPIC")
_COMPILER_TIMEOUT_S = 120


@functools.cache
def has_group_product() -> bool:
    """Whether programs may call GROUP_PRODUCT; it is compiled if nobody has done so before.

    If not, a RuntimeWarning says why, once.
    """
    try:
        library = _load()
        if not library.has_instructions():
            raise OSError("this processor lacks AVX2, FMA or F16C")
    except OSError as error:
        warnings.warn(
            f'products of kernels with quantization="int4" are left to XLA, which is many times '
            f"slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    jax.ffi.register_ffi_target(
        GROUP_PRODUCT, jax.ffi.pycapsule(library.GroupProduct), platform="cpu"
    )
    return True


def _load() -> ctypes.CDLL:
    path = build_library()
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # Damaged, or made by a system that shares this cache.
        shutil.rmtree(path.parent, ignore_errors=True)
        return ctypes.CDLL(str(build_library()))


def build_library() -> Path:
    """The compiled library of this machine and these versions.

    Raises:
        OSError: there is no compiler, or it does not take the source.
    """
    machine = platform.machine()
    if os.name != "posix" or machine.lower() not in ("x86_64", "amd64"):
        raise OSError(f"ours is for x86-64 and POSIX, and this is {platform.system()} on {machine}")
    compiler = (os.environ.get("CXX") or "c++").split()
    command = [*compiler, *_FLAGS, "-isystem", jax.ffi.include_dir()]
    versions = (jaxlib.__version__, *platform.libc_ver())
    parts = [*command, *versions, _SOURCE.read_text(encoding="utf-8")]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    directory = cache_root() / "native" / digest
    name = _SOURCE.with_suffix(".so").name
    return build_once(directory, lambda target: _compile(command, target / name)) / name


def _compile(command: Sequence[str], target: Path) -> None:
    how = "install g++ or clang++, or set CXX to such a compiler"
    try:
        subprocess.run(
            [*command, str(_SOURCE), "-o", str(target)],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILER_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        problem = next((line for line in lines if "error" in line), f"status {error.returncode}")
        raise OSError(f"{command[0]} failed ({problem}); {how}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} took longer than {_COMPILER_TIMEOUT_S} s; {how}") from error
    except OSError as error:
        raise OSError(f"{command[0]} cannot be run ({error.strerror}); {how}") from error
