"""The product of a decode step's rows with a kernel, on Hopper, in CUDA C++.

XLA's products of few rows take 1.2 to 1.9 times as long as their bytes, and where outputs are few,
sum parts of the inputs in a kernel of their own (docs/gpu.md). `decode_product.cu` is one kernel,
for weights in half precision, in float8, and in four bits, and can gate its results. It is compiled
at first use by NVRTC, which JAX's wheels for CUDA bring, and kept in the user's cache; the call of
it (`decode_product.cc`) is compiled by the compiler of the machine. Where one is missing, products
are those of other accelerators.

Axes: N rows, I inputs, O outputs.
"""

import ctypes
import functools
import hashlib
import itertools
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from folojax.models.machine import compiler as native
from folojax.models.machine import cuda
from folojax.models.machine.artefacts import build_once, cache_root, file_digest

_SOURCE = Path(__file__).with_name("decode_product.cc")
_NAME = "folojax_decode_product"
_LOG = logging.getLogger("folojax")
_LOCK = threading.Lock()
_HOPPER, _MAJOR = 9, 75  # the generation, and what the driver calls it

Bits = Literal[4, 8, 16]
"""Of a weight: codes of a `TiledKernel`, float8_e4m3fn, or the half precision of the rows."""

_FEW_ROWS, _STEP_ROWS = 8, 32  # kernels are for as few rows, and for multiples of so many
_LEAST_WEIGHTS = 1 << 20  # of a kernel
_GROUPS = (1, 2, 3, 4)


class _Kind(NamedTuple):
    """What weights of so many bits are, and how fast a processor of an H200 is with them."""

    dtypes: tuple[str, ...]  # of the rows
    least_rows: int  # of fewer another product is faster,
    most_rows: int  # and of more
    inputs: int  # of a step
    line: int  # bytes of a step of an output
    registers: int  # of a thread, beside its sums
    is_whole: bool
    """Whether another product is faster where processors have not all outputs at a time."""
    memory_bytes: float  # of weights that it reads in a microsecond
    products: float  # that it adds up in a microsecond
    step: float  # microseconds that a step takes at least


# Found by all cuts of four or eight shapes and six numbers of rows: what these say is the fastest
# cut took at most 5 % longer than the fastest.
_KINDS: dict[Bits, _Kind] = {
    16: _Kind(
        dtypes=("bfloat16", "float16"),
        least_rows=2,
        most_rows=256,
        inputs=64,
        line=128,
        registers=26,
        is_whole=True,
        memory_bytes=36e3,
        products=1.5e6,
        step=0.2,
    ),
    8: _Kind(
        dtypes=("bfloat16",),
        least_rows=9,
        most_rows=128,
        inputs=128,
        line=128,
        registers=64,
        is_whole=True,
        memory_bytes=30e3,
        products=2e6,
        step=0.4,
    ),
    4: _Kind(
        dtypes=("bfloat16",),
        least_rows=9,
        most_rows=256,
        inputs=128,
        line=80,
        registers=64,
        is_whole=False,
        memory_bytes=36e3,
        products=2e6,
        step=0.5,
    ),
}
_CACHE_BYTES = 60e3  # as memory_bytes, of what is read at all
_SLOTS = {1: 132, 2: 132, 4: 96, 8: 64}  # blocks at a time, by parts: clusters lie in one region
_STARTS = {1: 3.0, 2: 4.0, 4: 5.0, 8: 6.0}  # microseconds
_SHARED_BYTES, _REGISTERS = 232448, 65536  # of a processor


class Cut(NamedTuple):
    """How a product is dealt out to blocks."""

    groups: int  # of 64 outputs that a block has
    parts: int  # of the inputs, each a block's


def has_product(dtype: str, bits: Bits = 16) -> bool:
    """Whether programs on this machine's GPUs may call it with rows of a dtype.

    If they are all of the generation, and it cannot be compiled, a warning is logged.
    """
    with _LOCK:  # programs are traced by several threads
        return _is_opened(dtype, bits)


@functools.cache
def _is_opened(dtype: str, bits: Bits) -> bool:
    if not _is_hopper():
        return False
    try:
        problem = _opened(dtype, bits)
    except OSError as error:
        problem = str(error)
    if problem is not None:
        _LOG.warning("rows of decode steps are multiplied by slower kernels: %s", problem)
    return problem is None


def _is_hopper() -> bool:
    """Whether there are GPUs, all of them of that generation, as the driver tells."""
    try:
        driver = ctypes.CDLL(cuda.DRIVER)
    except OSError:
        return False
    count, major = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return False
    of_each = []
    for device in range(count.value):
        if driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device):
            return False
        of_each.append(major.value)
    return set(of_each) == {_HOPPER}


def _opened(dtype: str, bits: Bits) -> str | None:
    """Compiles the kernels, unless that was done before; None, or why they cannot be called.

    Raises:
        OSError: as `compile_kernels` has it.
    """
    nvrtc = cuda.find_nvrtc()
    if nvrtc is None:
        return cuda.WITHOUT_NVRTC
    problem = register()
    if problem is not None:
        return problem
    directory = compile_kernels(nvrtc, dtype, bits)
    native.load(_SOURCE).open_products(str(directory).encode(), bits, dtype == "bfloat16")
    return None


def register() -> str | None:
    """Makes the call of it known to XLA; None, or why it cannot be."""
    return native.register(_SOURCE, _NAME, "DecodeProduct", platform="CUDA")


def compile_kernels(nvrtc: Path, dtype: str, bits: Bits) -> Path:
    """The directory of a kind's kernels, compiled by the NVRTC at a path unless they are there.

    Raises:
        OSError: the source does not compile, or the user's cache cannot be written to.
    """
    library, text = native.load(_SOURCE), _SOURCE.with_suffix(".cu").read_bytes()
    rows = _FEW_ROWS, *range(_STEP_ROWS, _KINDS[bits].most_rows + 1, _STEP_ROWS)
    sizes = [size for size in itertools.product(rows, _GROUPS) if _fits(*size, bits)]
    sources = [file_digest(file) for file in (_SOURCE, Path(cuda.__file__).with_suffix(".h"))]
    parts = (*sources, nvrtc.resolve(), nvrtc.stat().st_size, dtype, bits, sizes)
    digest = hashlib.sha256(b"\n".join([text, *(str(part).encode() for part in parts)]))

    def build(target: Path) -> None:
        def compile_one(rows: int, groups: int) -> None:
            why = ctypes.create_string_buffer(4096)
            given = (str(nvrtc).encode(), text, bits, rows, groups, dtype == "bfloat16")
            if library.compile_product(*given, str(target).encode(), why, ctypes.c_size_t(4096)):
                raise OSError(why.value.decode(errors="replace"))

        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(compile_one, *size) for size in sizes]:
                done.result()

    return build_once(cache_root() / "kernels" / digest.hexdigest()[:16], build)


def product(
    x: Float[Array, "N I"],
    kernel: tuple[Array, ...],
    dtype: DTypeLike,
    cut: Cut,
    is_gated: bool = False,
) -> Float[Array, "N W"]:
    """`x` times the transposed kernel, summed in float32.

    Args:
        x: The rows, up to 256.
        kernel: One array [O, I] in the half precision of `x`, values in float8 [O, I] and scales
            [O] in float32, or words and pairs of a `TiledKernel`. O is a multiple of 16.
        dtype: Of the result: that of `x`, or float32.
        cut: As `cut_of` has it.
        is_gated: Whether the kernel's outputs are gates and ups, side by side, and the result is
            silu(gate) * up of both as they are rounded to the dtype of `x`: W is then O / 2.
    """
    outputs = kernel[0].shape[1 if len(kernel[0].shape) == 3 else 0]
    width = outputs // 2 if is_gated else outputs
    result: Any = jax.ShapeDtypeStruct((x.shape[0], width), dtype)
    call = jax.ffi.ffi_call(_NAME, result, vmap_method="sequential")
    groups, parts = (np.int32(number) for number in cut)
    return call(x, *kernel, groups=groups, parts=parts, is_gated=is_gated)


def gate(both: Float[Array, "N O"], dtype: DTypeLike) -> Float[Array, "N W"]:
    """silu(gate) * up of a product that was not gated, as XLA computes it, in `dtype`."""
    gates, ups = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gates) * ups).astype(dtype)


def cut_for(x: Float[Array, "N I"], outputs: int, bits: Bits = 16) -> Cut | None:
    """The `cut_of` a product; None also where rows or the machine are not for it."""
    if str(x.dtype) not in _KINDS[bits].dtypes:
        return None
    cut = cut_of(x.shape[0], x.shape[1], outputs, bits)
    return cut if cut is not None and has_product(str(x.dtype), bits) else None


def cut_of(num_rows: int, inputs: int, outputs: int, bits: Bits = 16) -> Cut | None:
    """The fastest way to deal a product out; None where another product is as fast.

    XLA's is as fast where all processors together have not all outputs at a time, for then its
    larger blocks read less.
    """
    kind = _KINDS[bits]
    is_size = kind.least_rows <= num_rows <= kind.most_rows and inputs * outputs >= _LEAST_WEIGHTS
    if not is_size or inputs * bits % 128 or outputs % 16:
        return None
    rows = _FEW_ROWS if num_rows <= _FEW_ROWS else math.ceil(num_rows / _STEP_ROWS) * _STEP_ROWS
    of_rows = [g for g in _GROUPS if _fits(rows, g, bits)]
    cuts = [Cut(*one) for one in itertools.product(of_rows, _SLOTS)]
    best = min(cuts, key=lambda cut: _time(rows, inputs, outputs, cut, kind))
    is_whole = _turns(outputs, best) <= _together(rows, best.groups, kind)
    return best if is_whole or not kind.is_whole else None


def _fits(rows: int, groups: int, bits: Bits) -> bool:
    """Whether there are registers, which NVRTC allots in eights."""
    of_thread = _REGISTERS // _threads(groups) // 8 * 8
    return _registers(rows, _KINDS[bits]) <= min(of_thread, 255)


def _threads(groups: int) -> int:
    return 128 * (groups + 1)


def _registers(rows: int, kind: _Kind) -> int:
    """Of a thread."""
    return max(40, rows // 2 + kind.registers)


def _turns(outputs: int, cut: Cut) -> float:
    """How many blocks each processor has."""
    return math.ceil(outputs / (64 * cut.groups)) * cut.parts / _SLOTS[cut.parts]


def _together(rows: int, groups: int, kind: _Kind) -> int:
    """Blocks that a processor has at a time."""
    stage = 64 * groups * kind.line + 2 * kind.inputs * rows
    shared = max(min(8, 220 * 1024 // stage) * stage, rows * (64 * groups + 4) * 4) + 2048
    by_registers = _REGISTERS // (_threads(groups) * _registers(rows, kind))
    return max(1, min(2, _SHARED_BYTES // shared, by_registers))


def _time(rows: int, inputs: int, outputs: int, cut: Cut, kind: _Kind) -> float:
    """Microseconds, roughly."""
    lines = 64 * cut.groups
    read = lines * kind.line
    step = max(
        read / kind.memory_bytes,
        (read + 2 * kind.inputs * rows) / _CACHE_BYTES,
        lines * rows * kind.inputs / kind.products,
    )
    steps = math.ceil(math.ceil(inputs / kind.inputs) / cut.parts)
    turns, together = _turns(outputs, cut), _together(rows, cut.groups, kind)
    # What a processor has side by side shares its speed, and hides how long a step takes at least.
    side_by_side, waves = min(max(1.0, turns), together), max(1, math.ceil(turns / together))
    if waves > 1:
        side_by_side = together
    return _STARTS[cut.parts] + waves * steps * max(side_by_side * step, kind.step)
