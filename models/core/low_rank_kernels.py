"""What adapters add to a product of few rows, as two kernels on an NVIDIA GPU.

    reduce   x [N, I] ── a of the row's slot, inputs in cuts ──> inner [C, N, P * R]
    expand   inner, summed over the cuts ── b of the row's slot ──> added to the product [N, O]

XLA makes four to six kernels of it for each product, which take much longer than the bytes would.
A program reads of the adapters only those that its rows have. Inputs are cut by their number alone
and cuts are added in one order, so what a row gets depends on no other row.

Axes: N rows, I and O a kernel's sides, P parts, L slots, R rank, C cuts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from folojax.models.machine.triton import triton

MOST_ROWS = 256
"""With more, XLA's products are of a size that pays."""

_LEAST = 16  # the smallest side of a product of Triton
_INPUTS = 128  # of a step of a program
_STEPS = 4  # of a cut
_TOGETHER = 128  # numbers of `inner` that are multiplied at once


def is_taken(a: Any, b: tuple[Any, ...], num_rows: int) -> bool:
    """Whether there are kernels for adapters of these shapes: in bfloat16 or float16."""
    rank, half = a.shape[2], jnp.dtype(a.dtype).itemsize == 2
    is_size = rank == _power(rank) and _tile(b) >= _LEAST and num_rows <= MOST_ROWS
    return triton is not None and half and is_size


def add_by_kernels(
    x: Float[Array, "N I"],
    out: Float[Array, "N O"],
    slot: Int[Array, " N"],
    a: Float[Array, "P L R I"],
    *b: Float[Array, "L R _"],
    dtype: DTypeLike,
) -> Float[Array, "N O"]:
    """`out` and the updates of `x` by the adapters in the rows' slots, in `dtype`.

    Rows have none from slot L on.
    """
    parts, slots, rank, width = a.shape
    num_rows = x.shape[0]
    rows = min(64, max(_LEAST, _power(num_rows)))
    cuts = pl.cdiv(width, _STEPS * _INPUTS)
    grid_rows = pl.cdiv(num_rows, rows)
    slot = slot.astype(jnp.int32)
    inner = pl.pallas_call(
        functools.partial(_reduce, rows=rows),
        grid=(parts * slots, cuts, grid_rows),
        out_shape=jax.ShapeDtypeStruct((cuts, num_rows, parts * rank), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        name="low_rank_reduce",
    )(x.astype(a.dtype), slot, a)
    tile = _tile(b)
    return pl.pallas_call(
        functools.partial(_expand, rows=rows, tile=tile, parts=parts),
        grid=(out.shape[1] // tile, grid_rows),
        out_shape=jax.ShapeDtypeStruct(out.shape, dtype),
        input_output_aliases={0: 0} if out.dtype == dtype else {},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="low_rank_expand",
    )(out, slot, inner, *b)


def _reduce(x_ref: Any, slot_ref: Any, a_ref: Any, inner_ref: Any, *, rows: int) -> None:
    """One slot's `a` of one part, one cut of the inputs, some rows."""
    (num_rows, width), (_, slots, rank, _) = x_ref.shape, a_ref.shape
    part, own = pl.program_id(0) // slots, pl.program_id(0) % slots
    cut = pl.program_id(1)
    row, column = pl.program_id(2) * rows + jnp.arange(rows), jnp.arange(max(rank, _LEAST))
    is_own = _loaded(slot_ref, row, num_rows, slots) == own

    @pl.when(_any(is_own))
    def store() -> None:
        total = jnp.zeros((rows, column.size), jnp.float32)
        for step in range(_STEPS):  # unrolled, so that all loads are on their way at once
            given = (cut * _STEPS + step) * _INPUTS + jnp.arange(_INPUTS)
            is_there = (given < width)[None, :]
            x = triton.load(
                x_ref.at[row[:, None], given[None, :]], mask=is_own[:, None] & is_there, other=0.0
            )
            a = triton.load(
                a_ref.at[part, own, column[:, None], given[None, :]],
                mask=(column < rank)[:, None] & is_there,
                other=0.0,
            )
            total += _contract(x, a, 1)
        place = inner_ref.at[cut, row[:, None], (part * rank + column)[None, :]]
        triton.store(place, total, mask=is_own[:, None] & (column < rank)[None, :])


def _expand(
    base_ref: Any,
    slot_ref: Any,
    inner_ref: Any,
    *refs: Any,
    rows: int,
    tile: int,
    parts: int,
) -> None:
    """Some outputs, which one part has, of some rows."""
    *b_refs, out_ref = refs
    (cuts, num_rows, _), (slots, rank, _) = inner_ref.shape, b_refs[0].shape
    block, row = pl.program_id(0), pl.program_id(1) * rows + jnp.arange(rows)
    slot = _loaded(slot_ref, row, num_rows, slots)
    # Some slots beside each other are one product, of which a row has its own columns alone.
    step = max(_LEAST, min(_TOGETHER, _power(slots * rank)))

    def add_part(part: int, first: int) -> None:
        own = block * tile - first + jnp.arange(tile)
        total = jnp.zeros((rows, tile), jnp.float32)
        for start in range(0, slots * rank, step):
            column = start + jnp.arange(step)
            is_there = column < slots * rank  # rows without an adapter have a slot behind the last
            is_own = (slot[:, None] == (column // rank)[None, :]) & is_there[None, :]
            inner = jnp.zeros((rows, step), jnp.float32)
            for cut in range(cuts):
                place = cut, row[:, None], (part * rank + column % rank)[None, :]
                inner += triton.load(inner_ref.at[place], mask=is_own, other=0.0)
            b = triton.load(
                b_refs[part].at[(column // rank)[:, None], (column % rank)[:, None], own[None, :]],
                mask=jnp.broadcast_to(is_there[:, None], (step, tile)),
                other=0.0,
            )
            total += _contract(inner.astype(b.dtype), b, 0)
        at = row[:, None], (first + own)[None, :]
        is_row = jnp.broadcast_to((row < num_rows)[:, None], total.shape)
        base = triton.load(base_ref.at[at], mask=is_row, other=0.0)
        added = base.astype(jnp.float32) + total
        triton.store(out_ref.at[at], added.astype(out_ref.dtype), mask=is_row)

    first = 0
    for part in range(parts):
        last = first + b_refs[part].shape[2]
        is_part = (block >= first // tile) & (block < last // tile)
        pl.when(is_part)(functools.partial(add_part, part, first))
        first = last


def _loaded(slot_ref: Any, row: Any, num_rows: int, slots: int) -> Any:
    """The slots of rows; L of those that are not there."""
    return triton.load(slot_ref.at[row], mask=row < num_rows, other=slots)


def _any(flags: Any) -> Any:
    """As `jnp.any`, which Triton has no word for."""
    return jnp.max(flags.astype(jnp.int32)) > 0


def _contract(left: Any, right: Any, axis: int) -> Any:
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _tile(b: tuple[Any, ...]) -> int:
    """Outputs of a program: a power of two that divides those of every part."""
    return min(128, *(one.shape[2] & -one.shape[2] for one in b))


def _power(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(number - 1, 0).bit_length()
