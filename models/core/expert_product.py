"""Rows that are sorted by expert times the kernels of their experts: one kernel on NVIDIA GPUs.

XLA multiplies every row with the kernels of all experts there, and zeros for those that are not its
own. Here runs of rows are cut into tiles, none of which has rows of two experts, so a kernel is
read where it has rows, once for every tile of them:

    rows    a a a a a | b | d d d        tiles of 4    a a a a | a . . . | b . . . | d d d .

How many tiles there may be is known from the shapes; those that are not needed have no rows.

Axes: M rows, X experts, I and O a kernel's sides, T tiles.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from folojax.models.core.row_kernels import kernel_or
from folojax.models.machine.triton import triton

_LEAST_ROWS, _MOST_ROWS = 16, 128  # of a tile
_OUTPUTS, _INPUTS = 128, 64  # of a product
_ALIGNED = 16  # inputs of which rows and kernels have a multiple


def by_expert(
    rows: Float[Array, "M I"], kernels: Float[Array, "X I O"], sizes: Int[Array, " X"]
) -> Float[Array, "M O"]:
    """Each run of rows, of these sizes, times the kernel of its expert, in float32."""
    is_half = rows.dtype == kernels.dtype and jnp.dtype(rows.dtype).itemsize == 2
    if triton is None or not is_half or rows.shape[1] % _ALIGNED:
        return _plain(rows, kernels, sizes)
    product: Float[Array, "M O"] = kernel_or(multiply_tiles, _plain)(rows, kernels, sizes)
    return product


def _plain(rows: Any, kernels: Any, sizes: Any) -> Any:
    return jax.lax.ragged_dot(rows, kernels, sizes, preferred_element_type=jnp.float32)


def multiply_tiles(
    rows: Float[Array, "M I"], kernels: Float[Array, "X I O"], sizes: Int[Array, " X"]
) -> Float[Array, "M O"]:
    """The kernel itself, in half precision."""
    num_rows, width_in = rows.shape
    count, _, width_out = kernels.shape
    # Tiles as high as a run of average length; half of the runs need two.
    average = max(1, num_rows // count)
    height = min(max(1 << (average - 1).bit_length(), _LEAST_ROWS), _MOST_ROWS)
    num_tiles = num_rows // height + min(count, num_rows)
    expert, first, end = _tiles(sizes.astype(jnp.int32), height, num_tiles)
    return pl.pallas_call(
        functools.partial(_multiply, height=height, width_in=width_in),
        grid=(pl.cdiv(width_out, _OUTPUTS), num_tiles),
        out_shape=jax.ShapeDtypeStruct((num_rows, width_out), jnp.float32),
        compiler_params=triton.CompilerParams(
            num_warps=8 if height == _MOST_ROWS else 4, num_stages=4 if height <= 32 else 3
        ),
        name="multiply_by_expert",
    )(rows, kernels, expert, first, end)


def _tiles(
    sizes: Int[Array, " X"], height: int, num_tiles: int
) -> tuple[Int[Array, " T"], Int[Array, " T"], Int[Array, " T"]]:
    """Of each tile its expert, its first row, and the row where the expert's end."""
    ends, counts = jnp.cumsum(sizes), (sizes + height - 1) // height
    last = jnp.cumsum(counts)
    tile = jnp.arange(num_tiles)
    is_before = last[None, :] <= tile[:, None]
    expert = jnp.minimum(is_before.sum(axis=1), len(sizes) - 1)
    first = (ends - sizes)[expert] + (tile - (last - counts)[expert]) * height
    end = jnp.where(tile < last[-1], ends[expert], 0)
    return expert, first, end


def _multiply(
    rows_ref: Any,
    kernels_ref: Any,
    expert_ref: Any,
    first_ref: Any,
    end_ref: Any,
    out_ref: Any,
    *,
    height: int,
    width_in: int,
) -> None:
    """Some outputs of a tile."""
    block, tile = pl.program_id(0), pl.program_id(1)
    first, end = triton.load(first_ref.at[tile]), triton.load(end_ref.at[tile])

    @pl.when(first < end)
    def _() -> None:
        expert = triton.load(expert_ref.at[tile])
        row, output = first + jnp.arange(height), block * _OUTPUTS + jnp.arange(_OUTPUTS)
        is_row, is_output = row < end, output < out_ref.shape[1]
        of_rows = jnp.broadcast_to(is_row[:, None], (height, _INPUTS))
        of_kernel = jnp.broadcast_to(is_output[None, :], (_INPUTS, _OUTPUTS))
        is_even = width_in % _INPUTS == 0

        def add(step: Any, total: Any) -> Any:
            number = step * _INPUTS + jnp.arange(_INPUTS)
            is_input = number < width_in  # all are, but of the last step
            here = of_rows if is_even else of_rows & is_input[None, :]
            left = triton.load(rows_ref.at[row[:, None], number[None, :]], mask=here, other=0.0)
            here = of_kernel if is_even else of_kernel & is_input[:, None]
            right = triton.load(
                kernels_ref.at[expert, number[:, None], output[None, :]], mask=here, other=0.0
            )
            dims = (((1,), (0,)), ((), ()))
            part = jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
            return total + part

        nothing = jnp.zeros((height, _OUTPUTS), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(width_in, _INPUTS), add, nothing)
        mask = is_row[:, None] & is_output[None, :]
        triton.store(out_ref.at[row[:, None], output[None, :]], total, mask=mask)
