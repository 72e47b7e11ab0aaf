"""The logarithm of a row's mass in an order of its own, however many rows there are: NVIDIA GPUs.

Blocks of the vocabulary are summed by a program each, and their sums by one for each row (Triton
through Pallas). What XLA makes of such a sum depends on the shape, and on what stands around it.

Axes: B rows, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from folojax.models.machine.triton import triton

_BLOCK = 4096
_NOTHING = -1e30  # the largest of no logits: finite, so that it can be subtracted from itself


def log_mass_in_order(logits: Float[Array, "B V"]) -> Float[Array, " B"]:
    """As `folojax.sampling.sampler.log_sum_exp`."""
    rows, size = logits.shape
    blocks = pl.cdiv(size, _BLOCK)
    of_blocks = jax.ShapeDtypeStruct((rows, blocks), jnp.float32)
    tops, sums = pl.pallas_call(
        functools.partial(_sum_block, size=size),
        grid=(blocks, rows),
        out_shape=[of_blocks, of_blocks],
        compiler_params=triton.CompilerParams(num_warps=4),
        name="mass_of_blocks",
    )(logits)
    return pl.pallas_call(
        functools.partial(_join_blocks, blocks=blocks),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows,), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=1),
        name="mass_of_rows",
    )(tops, sums)


def _sum_block(logits_ref: Any, top_ref: Any, sum_ref: Any, *, size: int) -> None:
    """The largest logit of a block of one row, and the sum of exponentials relative to it."""
    block, row = pl.program_id(0), pl.program_id(1)
    index = block * _BLOCK + jnp.arange(_BLOCK)
    logits = triton.load(logits_ref.at[row, index], mask=index < size, other=-jnp.inf)
    top = jnp.maximum(jnp.max(logits), _NOTHING)
    triton.store(top_ref.at[row, block], top)
    triton.store(sum_ref.at[row, block], jnp.sum(jnp.exp(logits - top)))


def _join_blocks(top_ref: Any, sum_ref: Any, out_ref: Any, *, blocks: int) -> None:
    """One row."""
    row, index = pl.program_id(0), jnp.arange(max(16, 1 << (blocks - 1).bit_length()))
    tops = triton.load(top_ref.at[row, index], mask=index < blocks, other=_NOTHING)
    sums = triton.load(sum_ref.at[row, index], mask=index < blocks, other=0.0)
    top = jnp.max(tops)
    triton.store(out_ref.at[row], top + jnp.log(jnp.sum(sums * jnp.exp(tops - top))))
