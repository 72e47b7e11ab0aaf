"""Kernels in eight bits: a quarter of float32's memory, and products of integers.

A kernel [O, I] becomes int8 values and one float32 scale for each output. `project` multiplies with
it as W8A8: each row of the input is scaled to int8 as it comes, the product is summed in int32,
exactly, and both scales are applied to the sum. A row's result has the same bits whatever the rows
beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8

from folojax.models.row_sums import sum_products

# XLA makes of a division by a constant what this says.
_STEP = np.float32(1 / 127)

# Experts are multiplied by `lax.ragged_dot`, and a router's scores decide between experts.
_KERNELS = frozenset({"qkv", "o", "gate_up", "up", "down", "embed", "lm_head"})


_MOST_SUMMED_ROWS = 8
"""Rows up to which XLA on CPU is faster with a loop over the kernel than with a product."""

_KERNEL_FIRST_ROWS = (16, 32)


class Int8Kernel(NamedTuple):
    """A kernel in a parameter tree, in place of the array: values times scale, output by output."""

    values: Int8[Array, "O I"]
    scale: Float32[Array, " O"]


@jax.jit
def quantize_kernel(kernel: Float[Array, "O I"]) -> Int8Kernel:
    """The nearest kernel in eight bits; every output's largest weight becomes 127 or -127."""
    values, scale = _round(kernel.astype(jnp.float32))
    return Int8Kernel(values, scale[:, 0])


def is_quantizable(name: str) -> bool:
    """Whether a parameter of that name in its block, or of the model, is kept in eight bits."""
    return name in _KERNELS


def quantize_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a model with the kernels of its linear layers and its embeddings in eight bits.

    Norms, biases, learned positions, routers and experts stay as they are, and so do kernels that
    are in eight bits already.

    Args:
        params: As `init_params` and `load_params` give them.
    """

    def convert(name: str, leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            return quantize_params(leaf)
        is_kernel = is_quantizable(name) and not isinstance(leaf, Int8Kernel)
        return quantize_kernel(leaf) if is_kernel else leaf

    return {name: convert(name, leaf) for name, leaf in params.items()}


def is_int8_kernel(node: Any) -> bool:
    """For `is_leaf` of `jax.tree.map`."""
    return isinstance(node, Int8Kernel)


def has_int8_kernels(params: Any) -> bool:
    """Whether any kernel is in eight bits."""
    return any(map(is_int8_kernel, jax.tree.leaves(params, is_leaf=is_int8_kernel)))


@jax.custom_jvp
def project_int8(x: Float[Array, "N I"], kernel: Int8Kernel) -> Float[Array, "N O"]:
    """A linear layer in float32: `x`, rounded to eight bits row by row, times the kernel.

    It has no derivative: to ask for one is a TypeError.
    """
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


@project_int8.defjvp
def _has_no_derivative(primals: Any, tangents: Any) -> Any:
    # Without this rule there would be one, of the scales alone: finite and wrong.
    raise TypeError(
        "kernels in eight bits cannot be differentiated through: take the float parameters that "
        "they were made from"
    )


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
