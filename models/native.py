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
import shlex
import subprocess
import warnings
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
        library = ctypes.CDLL(str(build_library()))
        if not library.has_instructions():
            raise OSError("this processor lacks AVX2, FMA or F16C")
    except OSError as error:
        warnings.warn(
            f"products of four-bit kernels are computed by XLA, many times slower: {error}. With "
            "g++ or clang++ installed, or CXX naming such a compiler, they are compiled for AVX2.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    jax.ffi.register_ffi_target(
        GROUP_PRODUCT, jax.ffi.pycapsule(library.GroupProduct), platform="cpu"
    )
    return True


def build_library() -> Path:
    """The compiled library of this machine and these versions.

    Raises:
        OSError: there is no compiler, or it does not take the source.
    """
    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64"):
        raise OSError(f"they are for x86-64, and this is {machine}")
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    command = [*compiler, *_FLAGS, "-isystem", jax.ffi.include_dir()]
    parts = [*command, jaxlib.__version__, _SOURCE.read_text(encoding="utf-8")]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def build(directory: Path) -> None:
        target = directory / _SOURCE.with_suffix(".so").name
        try:
            subprocess.run(
                [*command, str(_SOURCE), "-o", str(target)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILER_TIMEOUT_S,
            )
        except subprocess.CalledProcessError as error:
            problem = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
            raise OSError(f"{shlex.join(compiler)} failed: {problem[0]}") from error
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{shlex.join(compiler)} took too long") from error

    directory = build_once(cache_root() / "native" / digest, build)
    return directory / _SOURCE.with_suffix(".so").name
