"""Kernels in C++ that programs of XLA call, compiled on the machine that runs them.

JAX brings the headers (`jax.ffi`); what is needed beside is a C++ compiler. The library is kept in
the user's cache, under a name that says all that it depends on.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib

from folojax.models.machine.artefacts import build_once, cache_root

_HEADERS = tuple(Path(__file__).with_name(name) for name in ("native.h", "cuda.h"))
_FLAGS = ("-std=c++17", "-O2", "-mavx2", "-mfma", "-mf16c", "-shared", "-fPIC")
_COMPILER_TIMEOUT_S = 120


@functools.cache
def register(source: Path, name: str, handler: str, platform: str = "cpu") -> str | None:
    """Lets programs call a handler of a C++ source, by the name of a custom call.

    `platform` says which programs, as `jax.ffi.register_ffi_target` has it. The source is compiled
    if nobody has done so before. Returns None, or why programs have to do without.
    """
    try:
        library = load(source)
        if not library.has_instructions():
            raise OSError("this processor lacks AVX2, FMA or F16C")
    except OSError as error:
        return str(error)
    target = jax.ffi.pycapsule(getattr(library, handler))
    jax.ffi.register_ffi_target(name, target, platform=platform)
    return None


def load(source: Path) -> ctypes.CDLL:
    """The library of a source, compiled if nobody has done so before.

    Raises:
        OSError: there is no compiler, or it does not take the source.
    """
    path = build_library(source)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # Damaged, or made by a system that shares this cache.
        shutil.rmtree(path.parent, ignore_errors=True)
        return ctypes.CDLL(str(build_library(source)))


def build_library(source: Path) -> Path:
    """The compiled library of a source, for this machine and these versions.

    Raises:
        OSError: there is no compiler, or it does not take the source.
    """
    machine = platform.machine()
    if os.name != "posix" or machine.lower() not in ("x86_64", "amd64"):
        raise OSError(f"ours is for x86-64 and POSIX, and this is {platform.system()} on {machine}")
    compiler = (os.environ.get("CXX") or "c++").split()
    includes = ("-I", str(_HEADERS[0].parent), "-isystem", jax.ffi.include_dir())
    command = [*compiler, *_FLAGS, *includes, str(source)]
    versions = (jaxlib.__version__, *platform.libc_ver())
    texts = [file.read_text(encoding="utf-8") for file in (source, *_HEADERS)]
    parts = [*command, *versions, *texts]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    directory = cache_root() / "native" / digest
    name = source.with_suffix(".so").name
    return build_once(directory, lambda target: _compile(command, target / name)) / name


def _compile(command: Sequence[str], target: Path) -> None:
    how = "install g++ or clang++, or set CXX to such a compiler"
    try:
        subprocess.run(
            [*command, "-o", str(target)],
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
