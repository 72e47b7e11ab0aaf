"""Kernels in float8: half of bfloat16's memory, and products in float8 where a GPU has them.

A kernel [O, I] becomes values of float8_e4m3fn and one float32 scale for each output. Of few rows
the inputs stay as they are and the product is as fast as its bytes are read; of more rows each is
rounded to float8 with a scale of its own, summed in float32, and both scales are applied to the
sum. XLA multiplies: on NVIDIA GPUs from Ada and Hopper on with cuBLASLt's call for float8; but on
Hopper the rows of decode steps are not rounded and go through `decode_product`. On CPU the values
are widened for any number of rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from folojax.models.machine import decode_product
from folojax.models.quantized.row_rounding import round_rows

_LARGEST = 448.0
"""Of float8_e4m3fn."""

_MULTIPLE = 16
"""Of which both sides of a product in float8 are."""

_FEW_ROWS = 8

MOST_WIDE_ROWS = 32
"""Rows up to which what is read of the kernel decides."""


class Float8Kernel(NamedTuple):
    """A kernel in a parameter tree, in place of the array: values times scale, output by output."""

    values: Float[Array, "O I"]  # float8_e4m3fn
    scale: Float32[Array, " O"]

    @property
    def shape(self) -> tuple[int, ...]:
        """O and I."""
        return self.values.shape


def fits_float8(shape: tuple[int, ...]) -> bool:
    """Whether products in float8 take a kernel of this shape."""
    return len(shape) == 2 and shape[0] % _MULTIPLE == 0 and shape[1] % _MULTIPLE == 0


@jax.jit
def quantize_float8(kernel: Float[Array, "O I"]) -> Float8Kernel:
    """The nearest kernel in float8; of each output the largest weight becomes 448 or -448."""
    values, scale = round_rows(kernel.astype(jnp.float32), jnp.float8_e4m3fn, _LARGEST)
    return Float8Kernel(values, scale[:, 0])


def project_float8(
    x: Float[Array, "N I"], kernel: Float8Kernel, dtype: DTypeLike, is_gated: bool = False
) -> Float[Array, "N W"]:
    """A linear layer, in `dtype`; gated, if `can_gate_float8`, as `project_tiles` has it."""

    def wide(x: Array, kernel: Float8Kernel, multiply: Any = multiply_wide) -> Array:
        both = multiply(x, *kernel)
        return decode_product.gate(both.astype(x.dtype), dtype) if is_gated else both.astype(dtype)

    def best(x: Array, kernel: Float8Kernel) -> Array:
        is_wide = x.shape[0] <= MOST_WIDE_ROWS or is_gated
        return wide(x, kernel, multiply_few) if is_wide else multiply_narrow(x, kernel, dtype)

    cut = decode_product.cut_for(x, kernel.shape[0], bits=8)

    def own(x: Array, kernel: Float8Kernel) -> Array:
        if cut is None:
            return best(x, kernel)
        written = jnp.bfloat16 if jnp.dtype(dtype) == jnp.bfloat16 else jnp.float32
        return decode_product.product(x, tuple(kernel), written, cut, is_gated).astype(dtype)

    return jax.lax.platform_dependent(x, kernel, cpu=wide, cuda=own, default=best)


def can_gate_float8(x: Float[Array, "N I"], kernel: Float8Kernel) -> bool:
    """Whether the kernel that multiplies such rows on NVIDIA GPUs gates them as well."""
    return decode_product.cut_for(x, kernel.shape[0], bits=8) is not None


def multiply_wide(
    x: Float[Array, "N I"], values: Array, scale: Float32[Array, " O"]
) -> Float[Array, "N O"]:
    """The product with values of eight bits that are widened on the way, in float32."""
    return contract(x, values.astype(x.dtype), jnp.float32) * scale[None, :]


def multiply_few(
    x: Float[Array, "N I"], values: Array, scale: Float32[Array, " O"]
) -> Float[Array, "N O"]:
    """The same on an accelerator: a single row as eight, for which XLA takes less time.

    On an H200 the products of a layer of 8B in float8 take 28, 15, 9 and 7 us of eight rows, of one
    36, 18, 12 and 8.
    """
    rows = jnp.broadcast_to(x, (_FEW_ROWS, x.shape[1])) if x.shape[0] == 1 else x
    return multiply_wide(rows, values, scale)[: x.shape[0]]


def multiply_narrow(
    x: Float[Array, "N I"], kernel: Float8Kernel, dtype: DTypeLike
) -> Float[Array, "N O"]:
    """The product of inputs that are rounded to float8, row by row."""
    values, scale = round_rows(x, jnp.float8_e4m3fn, _LARGEST)
    # Written in the dtype of the result, which halves what there is to write.
    written = jnp.bfloat16 if jnp.dtype(dtype) == jnp.bfloat16 else jnp.float32
    sums = contract(values, kernel.values, written).astype(jnp.float32)
    return (sums * scale * kernel.scale[None, :]).astype(dtype)


def contract(left: Array, right: Array, dtype: DTypeLike) -> Array:
    """The product over the last axes."""
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=dtype)


def take_float8(kernel: Float8Kernel, index: Int[Array, " N"]) -> Float[Array, "N I"]:
    """Rows of an embedding in float32; an index outside reads the nearest row."""
    values = jnp.take(kernel.values, index, axis=0, mode="clip")
    return values.astype(jnp.float32) * jnp.take(kernel.scale, index, mode="clip")[:, None]
