"""Kernels in eight bits: a quarter of float32's memory, and products of integers.

A kernel [O, I] becomes int8 values and one float32 scale for each output. `project` multiplies with
it as W8A8: each row of the input is scaled to int8 as it comes, the product is summed in int32,
exactly, and both scales are applied to the sum. A row's result has the same bits whatever the rows
beside it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int8

from folojax.models.machine.row_sums import sum_products
from folojax.models.quantized.float8_kernels import MOST_WIDE_ROWS, multiply_few
from folojax.models.quantized.row_rounding import round_rows

# XLA makes of a division by a constant what this says.
_STEP = np.float32(1 / 127)

_MOST_SUMMED_ROWS = 8
"""Rows up to which XLA on CPU is faster with a loop over the kernel than with a product."""

_KERNEL_FIRST_ROWS = (16, 32)


class Int8Kernel(NamedTuple):
    """A kernel in a parameter tree, in place of the array: values times scale, output by output."""

    values: Int8[Array, "O I"]
    scale: Float32[Array, " O"]

    @property
    def shape(self) -> tuple[int, ...]:
        """O and I."""
        return self.values.shape


@jax.jit
def quantize_int8(kernel: Float[Array, "O I"]) -> Int8Kernel:
    """The nearest kernel in eight bits; of each output the largest weight becomes 127 or -127."""
    values, scale = _round(kernel.astype(jnp.float32))
    return Int8Kernel(values, scale[:, 0])


def project_int8(
    x: Float[Array, "N I"], kernel: Int8Kernel, dtype: DTypeLike = jnp.float32
) -> Float[Array, "N O"]:
    """A linear layer, in `dtype`: `x`, rounded to eight bits row by row, times the kernel.

    On accelerators few rows are not rounded: there the kernel's bytes decide.
    """

    def best(x: Array, kernel: Int8Kernel) -> Array:
        if x.shape[0] <= MOST_WIDE_ROWS:
            return multiply_few(x, *kernel).astype(dtype)
        values, scale = round_rows(x, jnp.int8, 127.0)
        sums = _multiply(values, kernel.values).astype(jnp.float32)
        return (sums * scale * kernel.scale[None, :]).astype(dtype)

    def on_cpu(x: Array, kernel: Int8Kernel) -> Array:
        return _multiply_on_cpu(x, kernel).astype(dtype)

    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=best)


def _multiply_on_cpu(x: Float[Array, "N I"], kernel: Int8Kernel) -> Float[Array, "N O"]:
    values, scale = _round(x.astype(jnp.float32))
    num_rows = x.shape[0]
    if num_rows <= _MOST_SUMMED_ROWS:
        sums = sum_products(_widen(values), kernel.values)
    elif num_rows in _KERNEL_FIRST_ROWS:
        # A tenth faster on CPU. The barrier, or XLA makes of it the other order again.
        sums = jax.lax.optimization_barrier(_multiply(kernel.values, values)).T
    else:
        sums = _multiply(values, kernel.values)
    return sums.astype(jnp.float32) * scale * kernel.scale[None, :]


def _multiply(left: Int8[Array, "A I"], right: Int8[Array, "B I"]) -> Int[Array, "A B"]:
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.int32)


def _widen(values: Int8[Array, "N I"]) -> Int[Array, "N I"]:
    """The same numbers in int32, computed once.

    XLA on CPU would round them again for every output, and drops barriers before it fuses. It does
    not fuse through a product, and that with the identity is exact.
    """
    size = math.gcd(values.shape[1], 8)
    blocks = _multiply(values.reshape(-1, size), jnp.eye(size, dtype=jnp.int8))
    return blocks.reshape(values.shape)


def take_int8(kernel: Int8Kernel, index: Int[Array, " N"]) -> Float[Array, "N I"]:
    """Rows of an embedding in float32; an index outside reads the nearest row."""
    values = jnp.take(kernel.values, index, axis=0, mode="clip")
    return values.astype(jnp.float32) * jnp.take(kernel.scale, index, mode="clip")[:, None]


def _round(x: Float[Array, "N I"]) -> tuple[Int8[Array, "N I"], Float[Array, "N 1"]]:
    """Rows as integers of -127 to 127, and what these count in; rows of zeros count in ones.

    NaN and infinity go into the scale, so that they are in all that is made of their row.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest * _STEP)
    return jnp.round(x / scale).astype(jnp.int8), scale
