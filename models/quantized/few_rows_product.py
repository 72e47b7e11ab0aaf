"""The product of few rows with a kernel in four bits, on NVIDIA GPUs, in CUDA C++.

Where a program has few rows, what it does for each word of codes decides how fast it is, and
`few_rows_product.cu` does least; it can gate its results as well. It is compiled at first use by
NVRTC, which JAX's wheels for CUDA bring, and the call of it (`few_rows_product.cc`) by the compiler
of the machine; where one is missing, `tiled_product` multiplies.
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Int16, Int32

from folojax.models.machine import compiler as native
from folojax.models.machine import cuda

_SOURCE = Path(__file__).with_name("few_rows_product.cc")
_NAME = "folojax_few_rows_product"
_LOG = logging.getLogger("folojax")

MOST_ROWS = 8
"""Rows that it is compiled for: of a decode step's sizes the next has 32 (docs/gpu.md)."""


@functools.cache
def has_product() -> bool:
    """Whether programs on this machine's GPUs may call it; if not, a warning is logged."""
    problem = _opened()
    if problem is not None:
        _LOG.warning("few rows are multiplied with int4 kernels by Triton, slower: %s", problem)
    return problem is None


def _opened() -> str | None:
    """Makes the handler known to XLA; None, or why it cannot be."""
    try:
        ctypes.CDLL(cuda.DRIVER)
    except OSError:
        return f"there is no NVIDIA driver ({cuda.DRIVER})"
    nvrtc = cuda.find_nvrtc()
    if nvrtc is None:
        return cuda.WITHOUT_NVRTC
    problem = native.register(_SOURCE, _NAME, "FewRowsProduct", platform="CUDA")
    if problem is not None:
        return problem
    why = ctypes.create_string_buffer(256)
    text = _SOURCE.with_suffix(".cu").read_bytes()
    is_closed = native.load(_SOURCE).open_product(str(nvrtc).encode(), text, why, len(why))
    return why.value.decode() if is_closed else None


def multiply_few_rows(
    x: BFloat16[Array, "N I"],
    words: Int16[Array, "B O 32"],
    pairs: Int32[Array, "G O"],
    dtype: DTypeLike,
    is_gated: bool = False,
) -> Float[Array, "N W"]:
    """The product, summed in float32, in `dtype`; N is at most `MOST_ROWS`.

    Weights are not rounded to bfloat16, as those of `tiled_product` are.

    Args:
        x: The rows.
        words: Of a `TiledKernel`.
        pairs: Of it, too.
        dtype: Of the result.
        is_gated: Whether outputs are gates and ups, side by side, and the result is silu(gate) * up
            of both as they are rounded to bfloat16: W is then O / 2.
    """
    written = jnp.bfloat16 if jnp.dtype(dtype) == jnp.bfloat16 else jnp.float32
    width = words.shape[1] // 2 if is_gated else words.shape[1]
    result: Any = jax.ShapeDtypeStruct((x.shape[0], width), written)
    call = jax.ffi.ffi_call(_NAME, result, vmap_method="sequential")
    product: Array = call(x, words, pairs, is_gated=is_gated)
    return product.astype(dtype)
