"""Pure functions that decoder families share; every one works on a flat token axis.

Axes: N tokens, D head dimension, R = D/2 rotated pairs, F mlp width, I and O a product's sides.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from folojax.models.config import LinearRope, Llama3Rope, ModelConfig


def rms_norm(
    x: Float[Array, "*batch W"], weight: Float[Array, " W"], eps: float
) -> Float[Array, "*batch W"]:
    """Root-mean-square norm over the last axis, in float32, returned in the dtype of `x`.

    The normed value is rounded to the dtype before the weight multiplies it, as in transformers'
    LlamaRMSNorm: the other order gives other bits in bfloat16.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def project(x: Float[Array, "N I"], kernel: Float[Array, "I O"]) -> Float[Array, "N O"]:
    """Matrix product with a float32 result, whatever the operands' dtype.

    Callers cast: on CPU a product asked for in bfloat16 is several times slower than a float32
    one that is cast afterwards.
    """
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def project_transposed(x: Float[Array, "N I"], rows: Float[Array, "O I"]) -> Float[Array, "N O"]:
    """`project` with a kernel that lies as [out, in], such as a tied embedding.

    Contracts the kernel's last axis where it lies: for `rows.T`, XLA on CPU copies a bfloat16
    kernel in full every call, which makes the product six times slower.
    """
    return jax.lax.dot_general(
        x, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def swiglu(gate_up: Float[Array, "N FF"]) -> Float[Array, "N F"]:
    """silu(gate) * up, for gate and up side by side in the last axis: FF is 2F."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def rotary_frequencies(config: ModelConfig) -> Float[np.ndarray, " R"]:
    """Radians per position of each pair of head dimensions, float32.

    Source: ROPE_INIT_FUNCTIONS in transformers' modeling_rope_utils.py, same order of operations.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(config.rope_theta), exponents)
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearRope(factor=factor):
            return frequencies / np.float32(factor)
        case Llama3Rope() as scaling:
            return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(
    frequencies: Float[np.ndarray, " R"], scaling: Llama3Rope
) -> Float[np.ndarray, " R"]:
    """Divides the frequencies that turn less than `low_freq_factor` times in the old context.

    Those that turn more than `high_freq_factor` times stay; between the two a ramp mixes both.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return (1 - keep) * frequencies / np.float32(scaling.factor) + keep * frequencies


def rotary_tables(
    positions: Int[Array, " N"], config: ModelConfig
) -> tuple[Float[Array, "N 1 R"], Float[Array, "N 1 R"]]:
    """Cosine and sine of every token's rotation, float32; made once a call, not once a layer."""
    frequencies = jnp.asarray(rotary_frequencies(config))
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[None, None, :]
    tables = jnp.concatenate((jnp.cos(angles), jnp.sin(angles)), axis=-1)
    # XLA on CPU would compute them again in every layer, for every head and page that reads them,
    # and drops barriers. It does not fuse through a product; that with the identity is exact.
    identity = np.eye(tables.shape[-1], dtype=np.float32)
    tables = jnp.dot(tables, identity, precision=jax.lax.Precision.HIGHEST)
    cos, sin = jnp.split(tables, 2, axis=-1)
    return cos, sin


def rotate(
    x: Float[Array, "N heads D"], cos: Float[Array, "N 1 R"], sin: Float[Array, "N 1 R"]
) -> Float[Array, "N heads D"]:
    """Applies the rotary embedding in float32; dimension d turns with d + D/2 (`rotate_half`)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x.dtype)
