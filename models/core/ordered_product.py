"""Products of matrices in which every number is a sum in one order, however many rows there are.

    out[n, o] = (segment 0) + (segment 1) + ...      segments of the inner axis, each from zero,
                                                     sixteen terms after the other

How many segments there are depends on the kernel's shape alone. A tensor core takes sixteen terms
of the inner axis at once, the same whatever tile a number lies in, so rows may be computed in tiles
of any size. Outputs are the long side of a tile and rows the short one: few rows waste little, and
a product that is bound by reading its kernel reads it once. With few rows each segment is a program
of its own, so that all processors read, and their sums are added afterwards; with many rows a
program computes its segments one after the other.

NVIDIA GPUs of the Hopper generation, in half precision (Triton through Pallas).

Axes: N rows, I inputs, O outputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from folojax.models.machine.triton import triton

_BLOCK = 64  # inputs that a segment is a multiple of
_LEAST_BLOCKS = 4  # of a segment
_OUTPUTS = 64  # of the smallest tile
_PROCESSORS = 132  # of an H200; another card has the same segments
_ENOUGH = 132  # programs; with fewer, segments are programs of their own
_MOST_SEGMENTS = 8
_DIMS = (((1,), (1,)), ((), ()))  # the last axis of both


class _Tile(NamedTuple):
    """What a program computes at a time, and how; nothing of it decides a bit."""

    outputs: int
    rows: int
    inputs: int
    warps: int
    stages: int
    together: int = 1  # tiles of outputs for which the same rows are read from a cache


def product(
    x: Float[Array, "N I"], kernel: Float[Array, "O I"], dtype: DTypeLike
) -> Float[Array, "N O"]:
    """`x` times the transposed kernel, both in the same half precision, rounded once to `dtype`."""
    (num_rows, inputs), outputs = x.shape, kernel.shape[0]
    segments = num_segments(outputs, inputs)
    tile = _tile(num_rows, inputs, segments)
    row_tiles, output_tiles = pl.cdiv(num_rows, tile.rows), pl.cdiv(outputs, tile.outputs)
    is_split = row_tiles * output_tiles < _ENOUGH
    parts = segments if is_split else 1
    out = pl.pallas_call(
        functools.partial(
            _multiply, tile=tile, parts=parts, segments=segments // parts, row_tiles=row_tiles
        ),
        grid=(parts * row_tiles * output_tiles,),
        out_shape=jax.ShapeDtypeStruct(
            (parts, num_rows, outputs), jnp.float32 if parts > 1 else dtype
        ),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name="ordered_product",
    )(x, kernel)
    return functools.reduce(jnp.add, list(out)).astype(dtype)


def num_segments(outputs: int, inputs: int) -> int:
    """Into how many segments the inner axis is cut: until a few rows occupy all processors."""
    blocks, tiles, count = -(-inputs // _BLOCK), -(-outputs // _OUTPUTS), 1
    while (
        count < _MOST_SEGMENTS
        and blocks % (2 * count) == 0
        and blocks // (2 * count) >= _LEAST_BLOCKS
        and 2 * count * tiles <= _PROCESSORS
    ):
        count *= 2
    return count


def _tile(num_rows: int, inputs: int, segments: int) -> _Tile:
    """Measured on an H200 (docs/gpu.md)."""
    if num_rows <= 64:
        rows = max(16, 1 << (num_rows - 1).bit_length())
        is_wide = inputs % (2 * _BLOCK * segments) == 0
        return _Tile(64, rows, *((128, 4, 4) if is_wide else (64, 4, 6)))
    if num_rows <= 128:
        return _Tile(64, 128, 64, 4, 6)
    if num_rows <= 256:
        return _Tile(128, 128, 64, 8, 5, 8)
    if segments == 1:
        return _Tile(128, 256, 64, 8, 3, 8)
    return _Tile(128, 128, 64, 8, 4, 8)  # the sums of two segments fill the registers


def _multiply(
    x_ref: Any,
    kernel_ref: Any,
    out_ref: Any,
    *,
    tile: _Tile,
    parts: int,
    segments: int,
    row_tiles: int,
) -> None:
    """One tile of one part: of the sum of so many segments."""
    (num_rows, inputs), outputs = x_ref.shape, kernel_ref.shape[0]
    output_tiles = pl.cdiv(outputs, tile.outputs)
    program = pl.program_id(0)
    part, place = program // (row_tiles * output_tiles), program % (row_tiles * output_tiles)
    # A band of tiles of outputs for all rows, before the next band.
    band = place // (tile.together * row_tiles)
    width = jnp.minimum(tile.together, output_tiles - band * tile.together)
    inside = place % (tile.together * row_tiles)
    output = (band * tile.together + inside % width) * tile.outputs + jnp.arange(tile.outputs)
    row = (inside // width) * tile.rows + jnp.arange(tile.rows)
    read_output, read_row = jnp.minimum(output, outputs - 1), jnp.minimum(row, num_rows - 1)
    length = pl.cdiv(inputs, tile.inputs) // (parts * segments)

    def segment(number: Any) -> Any:
        def add(index: Any, total: Any) -> Any:
            column = (number * length + index) * tile.inputs + jnp.arange(tile.inputs)
            options: dict[str, Any] = {}
            if inputs % tile.inputs:
                options = {"mask": (column < inputs)[None, :], "other": 0.0}
            left = triton.load(kernel_ref.at[read_output[:, None], column[None, :]], **options)
            right = triton.load(x_ref.at[read_row[:, None], column[None, :]], **options)
            return total + jax.lax.dot_general(
                left, right, _DIMS, preferred_element_type=jnp.float32
            )

        nothing = jnp.zeros((tile.outputs, tile.rows), jnp.float32)
        return jax.lax.fori_loop(0, length, add, nothing)

    total = segment(part * segments)
    for number in range(1, segments):
        total = total + segment(part * segments + number)
    mask = (row < num_rows)[:, None] & (output < outputs)[None, :]
    where = part, row[:, None], output[None, :]
    triton.store(out_ref.at[where], total.T.astype(out_ref.dtype), mask=mask)
