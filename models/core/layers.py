"""Pure functions that decoder families share; every one works on a flat token axis.

Axes: N tokens, W width, D head dimension, R rotated pairs (D/2 mostly), F mlp width.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from folojax.models.core import row_kernels
from folojax.models.core.config import ModelConfig
from folojax.models.core.rope import plain_rates
from folojax.models.core.shards import own_rows, sum_parts
from folojax.models.quantized.quantize import QuantizedKernel, take_quantized


def norm(
    x: Float[Array, "*batch W"],
    weight: Float[Array, " W"],
    bias: Float[Array, " W"] | None,
    config: ModelConfig,
    num_parts: int = 1,
) -> Float[Array, "*batch W"]:
    """The norm of a model's kind over the last axis, in float32, returned in the dtype of `x`.

    With `num_parts` that axis is one device's part of a longer one, which so many neighbours share.

    "rms" rounds the normed value before the weight multiplies it, as transformers' LlamaRMSNorm:
    the other order gives other bits in bfloat16. The others round once; only LayerNorm has a bias.
    """
    wide = x.astype(jnp.float32)
    if config.norm.startswith("layer"):
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    if num_parts > 1:
        mean_square = sum_parts(mean_square, config, num_parts) / num_parts
    normed = wide * jax.lax.rsqrt(mean_square + config.rms_norm_eps)
    ones = (1,) * (x.ndim - 1)
    factor = weight.reshape(*ones, -1)
    if config.norm == "rms":
        return normed.astype(x.dtype) * factor
    factor = factor.astype(jnp.float32)
    if config.norm in ("rms_offset", "layer_offset"):
        factor = 1.0 + factor
    scaled = normed * factor
    if bias is not None:
        scaled = scaled + bias.astype(jnp.float32).reshape(*ones, -1)
    return scaled.astype(x.dtype)


def add_and_norm(
    stream: Float[Array, "N W"],
    update: Float[Array, "N W"],
    weight: Float[Array, " W"],
    bias: Float[Array, " W"] | None,
    config: ModelConfig,
) -> tuple[Float[Array, "N W"], Float[Array, "N W"]]:
    """The sum of stream and update, and its `norm`.

    One kernel on NVIDIA GPUs, for norms of kind "rms" in half precision.
    """
    if config.norm == "rms" and row_kernels.is_taken(stream.dtype):
        return _add_in_one(stream, update, weight, config=config)
    return _add_and_norm(stream, update, weight, bias, config=config)


def _add_and_norm(
    stream: Array, update: Array, weight: Array, bias: Array | None = None, *, config: ModelConfig
) -> Any:
    total = stream + update
    return total, norm(total, weight, bias, config)


# Jitted, so that a model's layers trace and lower their kernels once.
@functools.partial(jax.jit, static_argnames="config")
def _add_in_one(*args: Array, config: ModelConfig) -> Any:
    kernel = functools.partial(row_kernels.add_norm, eps=config.rms_norm_eps)
    plain = functools.partial(_add_and_norm, config=config)
    return row_kernels.kernel_or(kernel, plain)(*args)


def embed_rows(
    table: Float[Array, "_ E"] | QuantizedKernel,
    index: Int[Array, " N"],
    vocab_size: int,
    config: ModelConfig,
) -> Float[Array, "N E"]:
    """Rows of an embedding, float32 if it is quantised; an index outside reads the nearest one.

    Args:
        table: The embedding, or a device's part of it.
        index: Of the rows.
        vocab_size: How many the whole of it has.
        config: Of the model.
    """
    is_own = None
    if config.num_shards > 1:
        index, is_own = own_rows(index, vocab_size, config.num_shards)
    if isinstance(table, QuantizedKernel):
        rows = take_quantized(table, index)
    else:
        rows = jnp.take(table, index, axis=0, mode="clip")
    return rows if is_own is None else sum_parts(jnp.where(is_own[:, None], rows, 0), config)


def scaled(x: Float[Array, "N W"], factor: float) -> Float[Array, "N W"]:
    """Times a number, in float32; `x` itself if it is 1."""
    return x if factor == 1.0 else x.astype(jnp.float32) * factor


def scaled_parts(
    x: Float[Array, "N W"], widths: Sequence[int], factors: Sequence[float]
) -> Float[Array, "N W"]:
    """Parts that lie side by side, each times a number of its own."""
    factor = np.repeat(np.asarray(factors, np.float32), widths)
    return (x.astype(jnp.float32) * factor[None, :]).astype(x.dtype)


def cut_gates(
    gate_up: Float[Array, "N FF"], cutoff: float, config: ModelConfig
) -> Float[Array, "N FF"]:
    """Gates and ups in which gates begin so many standard deviations above their mean.

    Both are of the gates of all devices, of which there may be a part here.
    """
    gate, up = jnp.split(gate_up, 2, axis=-1)
    wide = gate.astype(jnp.float32)

    def mean_of(x: Float[Array, "N F"]) -> Float[Array, "N 1"]:
        return sum_parts(jnp.mean(x, axis=-1, keepdims=True), config) / config.num_shards

    mean = mean_of(wide)
    spread = jnp.sqrt(mean_of(jnp.square(wide - mean)))
    above = jax.nn.relu(wide - (mean + cutoff * spread))
    return jnp.concatenate((above.astype(gate.dtype), up), axis=-1)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Squeezes values smoothly into (-cap, cap)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rotary_tables(
    positions: Int[Array, " N"], config: ModelConfig, is_local: bool = False
) -> tuple[Float[Array, "N 1 R"], Float[Array, "N 1 R"]]:
    """Cosine and sine of every token's rotation, float32; made once a call, not once a layer.

    Args:
        positions: Of the tokens.
        config: Of the model.
        is_local: For the layers with a window, where these turn at a rate of their own.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    dim = config.rotary_dim or config.full_head_dim or config.head_dim
    if is_local and config.local_rope_theta is not None:
        theta, scaling, dim = config.local_rope_theta, None, config.rotary_dim or config.head_dim
    rates, factor = plain_rates(dim, theta), 1.0
    if scaling is not None:
        rates, factor = np.asarray(scaling.rates, np.float32), scaling.attention_factor
    angles = positions.astype(jnp.float32)[:, None, None] * jnp.asarray(rates)[None, None, :]
    tables = jnp.concatenate((jnp.cos(angles), jnp.sin(angles)), axis=-1) * factor
    # XLA on CPU would compute them again in every layer, for every head and page that reads them,
    # and drops barriers. It does not fuse through a product; that with the identity is exact.
    identity = np.eye(tables.shape[-1], dtype=np.float32)
    tables = jnp.dot(tables, identity, precision=jax.lax.Precision.HIGHEST)
    cos, sin = jnp.split(tables, 2, axis=-1)
    return cos, sin


def rotate(
    x: Float[Array, "N heads D"],
    cos: Float[Array, "N 1 R"],
    sin: Float[Array, "N 1 R"],
    *,
    is_interleaved: bool = False,
) -> Float[Array, "N heads D"]:
    """Applies the rotary embedding in float32; dimension r turns with r + R (`rotate_half`).

    Dimensions from 2R on stay as they are. If interleaved, 2r turns with 2r + 1, and they come out
    as r and r + R: products of queries and keys are the same in any order of dimensions.
    """
    pairs = cos.shape[-1]
    turning, still = x[..., : 2 * pairs], x[..., 2 * pairs :]
    wide = turning.astype(jnp.float32)
    pair = (wide[..., 0::2], wide[..., 1::2]) if is_interleaved else jnp.split(wide, 2, axis=-1)
    first, second = pair
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return jnp.concatenate((turned.astype(x.dtype), still), axis=-1)


def norm_and_rotate(
    qkv: Float[Array, "N heads D"],
    query_weight: Float[Array, " D"],
    key_weight: Float[Array, " D"],
    cos: Float[Array, "N 1 R"],
    sin: Float[Array, "N 1 R"],
    config: ModelConfig,
) -> tuple[Float[Array, "N H D"], Float[Array, "N K D"], Float[Array, "N K D"]]:
    """Queries, keys and values of a product, the former normed (kind "rms") and rotated.

    One kernel on NVIDIA GPUs in half precision.

    Args:
        qkv: H heads of queries, K of keys, K of values.
        query_weight: Of the norm of queries.
        key_weight: Of the norm of keys.
        cos: As in `rotate`; 2R is D.
        sin: Likewise.
        config: Of the model.
    """
    is_taken = row_kernels.is_taken(qkv.dtype, config.head_dim)
    call = _rotate_in_one if is_taken else _norm_and_rotate
    return call(qkv, query_weight, key_weight, cos, sin, config=config)


def _norm_and_rotate(
    qkv: Array, query_weight: Array, key_weight: Array, *rotary: Array, config: ModelConfig
) -> Any:
    heads, last = config.num_heads, config.num_heads + config.num_kv_heads
    query = norm(qkv[:, :heads], query_weight, None, config)
    key = norm(qkv[:, heads:last], key_weight, None, config)
    return rotate(query, *rotary), rotate(key, *rotary), qkv[:, last:]


@functools.partial(jax.jit, static_argnames="config")
def _rotate_in_one(*args: Array, config: ModelConfig) -> Any:
    sizes: dict[str, Any] = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    kernel = functools.partial(row_kernels.norm_rotate, eps=config.rms_norm_eps, **sizes)
    plain = functools.partial(_norm_and_rotate, config=config)
    return row_kernels.kernel_or(kernel, plain)(*args)
