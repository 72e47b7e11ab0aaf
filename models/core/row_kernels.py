"""Pieces of a layer as one kernel each on NVIDIA GPUs, where XLA makes more or slower ones.

    add_norm      stream + update, and its norm                  XLA: a sum and a norm
    norm_rotate   norm and rotation of every head's q and k      XLA: two norms and a rotation
    gated_silu    silu(gate) * up                                XLA: a kernel half as fast

A decode step has some ten small kernels a layer beside its products and attention, each of which
takes two to four microseconds however few rows there are. Elsewhere, in float32, and for gradients
the same is computed as XLA does it; both round at the same places, and the sum of squares may be
added in another order.

Axes: N tokens, E width of the stream, H query heads, K key heads, D head dimension.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from folojax.models.machine.triton import triton

_MOST_GATED = 2048  # numbers of a row that a program computes


def is_taken(dtype: Any, head_dim: int | None = None) -> bool:
    """Whether there are kernels: in half precision, and of heads whose halves are powers of two."""
    is_size = head_dim is None or _is_power(head_dim)
    return triton is not None and jnp.dtype(dtype).itemsize == 2 and is_size


def kernel_or(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel where a program is lowered for CUDA, elsewhere the plain function.

    Derivatives are those of the plain function.
    """

    @jax.custom_jvp
    def call(*args: Any) -> Any:
        return jax.lax.platform_dependent(*args, cuda=kernel, default=plain)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(plain, primals, tangents)

    return call


def add_norm(
    stream: Float[Array, "N E"], update: Float[Array, "N E"], weight: Float[Array, " E"], eps: float
) -> tuple[Float[Array, "N E"], Float[Array, "N E"]]:
    """The sum, and its norm by root mean square times a weight, as one kernel."""
    num_rows, width = stream.shape
    return pl.pallas_call(
        functools.partial(_add_norm, eps=eps, width=width),
        grid=(num_rows,),
        out_shape=[jax.ShapeDtypeStruct(stream.shape, stream.dtype)] * 2,
        compiler_params=triton.CompilerParams(num_warps=4 if width <= 2048 else 8),
        name="add_norm",
    )(stream, update, weight)


def _add_norm(
    stream_ref: Any,
    update_ref: Any,
    weight_ref: Any,
    sum_ref: Any,
    out_ref: Any,
    *,
    eps: float,
    width: int,
) -> None:
    """One row."""
    row, block = pl.program_id(0), _power(width)
    options: dict[str, Any] = {}
    if block != width:
        options = {"mask": jnp.arange(block) < width}
    zeros: dict[str, Any] = {"other": 0.0} if options else {}
    place = row, pl.ds(0, block)
    stream = triton.load(stream_ref.at[place], **options, **zeros)
    update = triton.load(update_ref.at[place], **options, **zeros)
    weight = triton.load(weight_ref.at[pl.ds(0, block)], **options, **zeros)
    total = (stream.astype(jnp.float32) + update.astype(jnp.float32)).astype(stream.dtype)
    wide = total.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(wide * wide) / width + eps)
    triton.store(sum_ref.at[place], total, **options)
    triton.store(out_ref.at[place], _weighed(wide * scale, weight), **options)


def norm_rotate(
    qkv: Float[Array, "N heads D"],
    query_weight: Float[Array, " D"],
    key_weight: Float[Array, " D"],
    cos: Float[Array, "N 1 R"],
    sin: Float[Array, "N 1 R"],
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Float[Array, "N H D"], Float[Array, "N K D"], Float[Array, "N K D"]]:
    """Queries and keys of `qkv`, normed and rotated, and values as they are, as one kernel."""
    num_rows, _, head_dim = qkv.shape
    together = most_together(8, num_heads, num_kv_heads)
    return pl.pallas_call(
        functools.partial(_norm_rotate, eps=eps, num_heads=num_heads, together=together),
        grid=(num_rows, (num_heads + 2 * num_kv_heads) // together),
        out_shape=[
            jax.ShapeDtypeStruct((num_rows, count, head_dim), qkv.dtype)
            for count in (num_heads, num_kv_heads, num_kv_heads)
        ],
        compiler_params=triton.CompilerParams(num_warps=2),
        name="norm_rotate",
    )(qkv, query_weight, key_weight, cos[:, 0], sin[:, 0])


def _norm_rotate(
    qkv_ref: Any,
    query_weight_ref: Any,
    key_weight_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    *,
    eps: float,
    num_heads: int,
    together: int,
) -> None:
    """Some heads of one token: all queries, all keys, or all values."""
    row, block = pl.program_id(0), pl.program_id(1)
    first_key, first_value = num_heads // together, (num_heads + key_ref.shape[1]) // together
    half = qkv_ref.shape[-1] // 2
    sides = pl.ds(0, half), pl.ds(half, half)
    cos, sin = (triton.load(ref.at[row, sides[0]])[None, :] for ref in (cos_ref, sin_ref))

    def heads(weight_ref: Any, out_ref: Any, first: Any) -> None:
        given = pl.ds(block * together, together)
        loaded = [triton.load(qkv_ref.at[row, given, side]) for side in sides]
        wide = [one.astype(jnp.float32) for one in loaded]
        squares = sum(jnp.sum(one * one, axis=1) for one in wide)
        scale = jax.lax.rsqrt(squares / (2 * half) + eps)[:, None]
        weights = [triton.load(weight_ref.at[side])[None, :] for side in sides]
        left, right = (
            _weighed(one * scale, weight).astype(jnp.float32)
            for one, weight in zip(wide, weights, strict=True)
        )
        turned = left * cos - right * sin, right * cos + left * sin
        for side, one in zip(sides, turned, strict=True):
            place = row, pl.ds(first, together), side
            triton.store(out_ref.at[place], one.astype(loaded[0].dtype))

    @pl.when(block < first_key)
    def _() -> None:
        heads(query_weight_ref, query_ref, block * together)

    @pl.when((block >= first_key) & (block < first_value))
    def _() -> None:
        heads(key_weight_ref, key_ref, (block - first_key) * together)

    @pl.when(block >= first_value)
    def _() -> None:
        # Else the next kernel that takes them would have them copied out of `qkv`.
        for side in sides:
            given = triton.load(qkv_ref.at[row, pl.ds(block * together, together), side])
            own = pl.ds((block - first_value) * together, together)
            triton.store(value_ref.at[row, own, side], given)


def gated_silu(gate_up: Float[Array, "N FF"]) -> Float[Array, "N F"]:
    """silu(gate) * up, for gate and up side by side in the last axis, rounded once."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    block = min(_MOST_GATED, _power(width))
    return pl.pallas_call(
        functools.partial(_gated_silu, block=block, width=width),
        grid=(num_rows, pl.cdiv(width, block)),
        out_shape=jax.ShapeDtypeStruct((num_rows, width), gate_up.dtype),
        compiler_params=triton.CompilerParams(num_warps=4),
        name="gated_silu",
    )(gate_up)


def _gated_silu(gate_up_ref: Any, out_ref: Any, *, block: int, width: int) -> None:
    """Some numbers of one row."""
    row, first = pl.program_id(0), pl.program_id(1) * block
    options: dict[str, Any] = {}
    if width % block:
        options = {"mask": first + jnp.arange(block) < width}
    zeros: dict[str, Any] = {"other": 0.0} if options else {}
    gate, up = (
        triton.load(gate_up_ref.at[row, pl.ds(first + skip, block)], **options, **zeros)
        for skip in (0, width)
    )
    out = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    triton.store(out_ref.at[row, pl.ds(first, block)], out.astype(gate.dtype), **options)


def _weighed(normed: Any, weight: Any) -> Any:
    """Rounded before the weight and after it, as `rms_norm` does."""
    rounded = normed.astype(weight.dtype).astype(jnp.float32)
    return (rounded * weight.astype(jnp.float32)).astype(weight.dtype)


def most_together(most: int, *counts: int) -> int:
    """The largest power of two up to `most` that divides all counts."""
    return math.gcd(most, *counts)


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _is_power(size: int) -> bool:
    return size == _power(size)
