"""Rows of inputs in eight bits, each with a scale of its own: as one kernel on NVIDIA GPUs.

XLA makes two of it, one that looks for the largest number of a row and one that rounds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from folojax.models.machine.triton import triton

_MOST_WIDTH = 2**15


def round_rows(
    x: Float[Array, "N I"], dtype: DTypeLike, largest: float
) -> tuple[Num[Array, "N I"], Float[Array, "N 1"]]:
    """Numbers of up to `largest` in `dtype`, and what they count in; rows of zeros count in ones.

    NaN and infinity go into the scale, so that they are in all that is made of their row.
    """
    plain = functools.partial(_round_plain, dtype=dtype, largest=largest)
    if triton is None or x.dtype.itemsize != 2 or x.shape[1] > _MOST_WIDTH:
        return plain(x)
    kernel = functools.partial(round_in_one, dtype=dtype, largest=largest)
    return jax.lax.platform_dependent(x, cuda=kernel, default=plain)


def _round_plain(x: Array, *, dtype: DTypeLike, largest: float) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scale = jnp.where(most == 0, 1.0, most / largest)
    return _narrow(wide / scale, dtype, largest), scale


def _narrow(x: Any, dtype: DTypeLike, largest: float) -> Any:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.floor(x + 0.5).astype(dtype)
    # A quotient may be a bit more than the largest number, and the next one is NaN.
    return jnp.clip(x, -largest, largest).astype(dtype)


# Jitted, so that a model's layers trace and lower it once.
@functools.partial(jax.jit, static_argnames=("dtype", "largest"))
def round_in_one(x: Array, *, dtype: DTypeLike, largest: float) -> tuple[Array, Array]:
    """The kernel."""
    num_rows, width = x.shape
    values, scale = pl.pallas_call(
        functools.partial(_round_row, width=width, largest=largest),
        grid=(num_rows,),
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, dtype),
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4 if width <= 4096 else 8),
        name="round_rows",
    )(x)
    return values, scale[:, None]


def _round_row(x_ref: Any, out_ref: Any, scale_ref: Any, *, width: int, largest: float) -> None:
    """One row."""
    row, block = pl.program_id(0), 1 << (width - 1).bit_length()
    options: dict[str, Any] = {}
    if block != width:
        options = {"mask": jnp.arange(block) < width}
    zeros: dict[str, Any] = {"other": 0.0} if options else {}
    place = row, pl.ds(0, block)
    wide = triton.load(x_ref.at[place], **options, **zeros).astype(jnp.float32)
    most = jnp.max(jnp.abs(wide))
    scale = jnp.where(most == 0, 1.0, most / largest)
    triton.store(scale_ref.at[row], scale)
    triton.store(out_ref.at[place], _narrow(wide / scale, out_ref.dtype, largest), **options)
