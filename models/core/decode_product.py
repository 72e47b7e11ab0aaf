"""The product of a decode step's rows with a kernel in half precision, on Hopper, in CUDA C++.

XLA's products of few rows read a kernel in 1.2 to 1.9 times what its bytes take, and where outputs
are few, sum parts of the inputs in a kernel of their own (docs/gpu.md). `decode_product.cu` is one
kernel, which can gate its results as well. It is compiled at first use by NVRTC, which JAX's wheels
for CUDA bring, and kept in the user's cache; the call of it (`decode_product.cc`) is compiled by
the compiler of the machine. Where one is missing, XLA multiplies.

Axes: N rows, I inputs, O outputs.
"""

import ctypes
import functools
import hashlib
import itertools
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from folojax.models.machine import compiler as native
from folojax.models.machine import cuda
from folojax.models.machine.artefacts import build_once, cache_root, file_digest

_SOURCE = Path(__file__).with_name("decode_product.cc")
_NAME = "folojax_decode_product"
_LOG = logging.getLogger("folojax")

_LEAST_ROWS, _MOST_ROWS = 2, 256  # of a single row XLA's product is faster
_FEW_ROWS, _STEP_ROWS = 8, 32  # kernels are for as few rows, and for multiples of so many
_LEAST_WEIGHTS = 1 << 20  # of a kernel
_DTYPES = ("bfloat16", "float16")
_GROUPS = (1, 2, 3, 4)
_INPUTS = 64  # of a step of a block
_LINE = 2 * _INPUTS  # bytes

# Of an H200, found by all cuts of eight shapes and six numbers of rows: what these say is the
# fastest cut took at most 4 % longer than the fastest. Microseconds, or a microsecond's of each
# processor.
_SLOTS = {1: 132, 2: 132, 4: 96, 8: 64}  # blocks at a time, by parts: clusters lie in one region
_STARTS = {1: 3.0, 2: 4.0, 4: 5.0, 8: 6.0}
_MEMORY_BYTES, _CACHE_BYTES, _PRODUCTS = 36e3, 95e3, 2.5e6
_SHARED_BYTES, _REGISTERS = 232448, 65536


class Cut(NamedTuple):
    """How a product is dealt out to blocks."""

    groups: int  # of 64 outputs that a block has
    parts: int  # of the inputs, each a block's


@functools.cache
def has_product(dtype: str) -> bool:
    """Whether programs on this machine's GPUs may call it with arrays of a dtype.

    On a GPU of the generation that may not, a warning is logged.
    """
    try:
        ctypes.CDLL(cuda.DRIVER)
        library = native.load(_SOURCE)
    except OSError:
        return False
    is_hopper, why = ctypes.c_int(), ctypes.create_string_buffer(256)
    if library.is_hopper(ctypes.byref(is_hopper), why, len(why)) or not is_hopper.value:
        return False
    problem = _opened(library, dtype)
    if problem is not None:
        _LOG.warning("rows of decode steps are multiplied by XLA, slower: %s", problem)
    return problem is None


def _opened(library: Any, dtype: str) -> str | None:
    """Compiles the kernels, unless that was done before; None, or why they cannot be called."""
    nvrtc = cuda.find_nvrtc()
    if nvrtc is None:
        return cuda.WITHOUT_NVRTC
    problem = native.register(_SOURCE, _NAME, "DecodeProduct", platform="CUDA")
    if problem is not None:
        return problem
    try:
        directory = compile_kernels(nvrtc, dtype)
    except OSError as error:
        return str(error)
    library.open_products(str(directory).encode(), dtype == "bfloat16")
    return None


def compile_kernels(nvrtc: Path, dtype: str) -> Path:
    """The directory of a dtype's kernels, compiled by the NVRTC at a path unless they are there.

    Raises:
        OSError: the source does not compile, or the user's cache cannot be written to.
    """
    library, text = native.load(_SOURCE), _SOURCE.with_suffix(".cu").read_bytes()
    parts = (text, file_digest(_SOURCE).encode(), str(nvrtc.resolve()).encode(), dtype.encode())
    digest = hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]
    rows = _FEW_ROWS, *range(_STEP_ROWS, _MOST_ROWS + 1, _STEP_ROWS)
    sizes = itertools.product(rows, _GROUPS)

    def build(target: Path) -> None:
        def compile_one(rows: int, groups: int) -> None:
            why = ctypes.create_string_buffer(4096)
            given = (str(nvrtc).encode(), text, rows, groups, dtype == "bfloat16")
            if library.compile_product(*given, str(target).encode(), why, len(why)):
                raise OSError(why.value.decode(errors="replace"))

        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(compile_one, *size) for size in sizes if _fits(*size)]:
                done.result()

    return build_once(cache_root() / "kernels" / digest, build)


def cut_for(x: Float[Array, "N I"], kernel: Float[Array, "O I"]) -> Cut | None:
    """The `cut_of` a product; None also where arrays or the machine are not for it."""
    if x.dtype != kernel.dtype or str(x.dtype) not in _DTYPES:
        return None
    cut = cut_of(x.shape[0], *kernel.shape[::-1])
    return cut if cut is not None and has_product(str(x.dtype)) else None


def product(
    x: Float[Array, "N I"],
    kernel: Float[Array, "O I"],
    dtype: DTypeLike,
    cut: Cut,
    is_gated: bool = False,
) -> Float[Array, "N W"]:
    """`x` times the transposed kernel, both in the same half precision, summed in float32.

    Args:
        x: The rows, up to 256.
        kernel: With a multiple of 8 inputs and of 16 outputs.
        dtype: Of the result: that of `x`, or float32.
        cut: As `cut_of` has it.
        is_gated: Whether the kernel's outputs are gates and ups, side by side, and the result is
            silu(gate) * up of both as they are rounded to the dtype of `x`: W is then O / 2.
    """
    width = kernel.shape[0] // 2 if is_gated else kernel.shape[0]
    result: Any = jax.ShapeDtypeStruct((x.shape[0], width), dtype)
    call = jax.ffi.ffi_call(_NAME, result, vmap_method="sequential")
    groups, parts = (np.int32(number) for number in cut)
    return call(x, kernel, groups=groups, parts=parts, is_gated=is_gated)


def cut_of(num_rows: int, inputs: int, outputs: int) -> Cut | None:
    """The fastest way to deal a product out; None where XLA's is as fast, or ours is not for it.

    XLA's is as fast where all processors together have not all outputs at a time, for then its
    larger blocks read less.
    """
    is_size = _LEAST_ROWS <= num_rows <= _MOST_ROWS and inputs * outputs >= _LEAST_WEIGHTS
    if not is_size or inputs % 8 or outputs % 16:
        return None
    rows = _FEW_ROWS if num_rows <= _FEW_ROWS else math.ceil(num_rows / _STEP_ROWS) * _STEP_ROWS
    cuts = [Cut(*one) for one in itertools.product(_GROUPS, _SLOTS) if _fits(rows, one[0])]
    best = min(cuts, key=lambda cut: _time(rows, inputs, outputs, cut))
    return best if _turns(outputs, best) <= _together(rows, best.groups) else None


def _fits(rows: int, groups: int) -> bool:
    """Whether there are registers for the sums."""
    return _threads(groups) * _registers(rows) <= _REGISTERS


def _threads(groups: int) -> int:
    return 128 * (groups + 1)


def _registers(rows: int) -> int:
    """Of a thread, as NVRTC allots them."""
    return max(40, rows // 2 + 26)


def _turns(outputs: int, cut: Cut) -> float:
    """How many blocks each processor has."""
    return math.ceil(outputs / (64 * cut.groups)) * cut.parts / _SLOTS[cut.parts]


def _together(rows: int, groups: int) -> int:
    """Blocks that a processor has at a time."""
    stage = (64 * groups + rows) * _LINE
    shared = max(min(8, 220 * 1024 // stage) * stage, rows * (64 * groups + 4) * 4) + 2048
    by_registers = _REGISTERS // (_threads(groups) * _registers(rows))
    return max(1, min(2, _SHARED_BYTES // shared, by_registers))


def _time(rows: int, inputs: int, outputs: int, cut: Cut) -> float:
    """Microseconds, roughly."""
    lines = 64 * cut.groups
    step = max(
        lines * _LINE / _MEMORY_BYTES,
        (lines + rows) * _LINE / _CACHE_BYTES,
        lines * rows * _INPUTS / _PRODUCTS,
    )
    steps = math.ceil(math.ceil(inputs / _INPUTS) / cut.parts)
    turns, together = max(1.0, _turns(outputs, cut)), _together(rows, cut.groups)
    if turns > together:  # else what a processor has side by side counts in full
        turns = math.ceil(turns / together) * together
    return _STARTS[cut.parts] + turns * steps * step
