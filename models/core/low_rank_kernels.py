"""What adapters add to a product, as two kernels on an NVIDIA GPU.

    reduce   x [N, I] ── a of the row's slot, inputs in cuts ──> inner [C, N, P * R]
    expand   inner, summed over the cuts ── b of the row's slot ──> added to the product [N, O]

XLA makes four to six kernels of it for each product, which take much longer than the bytes would.
A program of the first reads of the adapters only those that its rows have. Inputs are cut by their
number alone and cuts are added in one order, so what a row gets depends on no other row. Of many
rows `inner` is one large product with all adapters, which XLA does well.

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

_FEW_ROWS = 256
"""With more, `inner` is a product of XLA's."""

_LEAST = 16  # the smallest side of a product of Triton
_INPUTS = 256  # of a step of a program
_LEAST_STEPS, _MOST_CUTS = 2, 8
_TOGETHER = 128  # numbers of `inner` that are multiplied at once
_MOST_OUTPUTS, _LEAST_OUTPUTS, _ENOUGH = 128, 32, 132  # of a program, and programs: H200's units


def is_taken(a: Any, b: tuple[Any, ...]) -> bool:
    """Whether there are kernels for adapters of these shapes: in bfloat16 or float16."""
    rank, half = a.shape[2], jnp.dtype(a.dtype).itemsize == 2
    return triton is not None and half and rank == _power(rank) and _divisor(b) >= _LEAST


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
    num_rows, slots = x.shape[0], a.shape[1]
    slot = slot.astype(jnp.int32)
    inner = (_few if num_rows <= _FEW_ROWS else _many)(x.astype(a.dtype), slot, a)
    rows = min(64, max(_LEAST, _power(num_rows)))
    tile = min(_MOST_OUTPUTS, _divisor(b))
    grid_rows = pl.cdiv(num_rows, rows)
    while tile > _LEAST_OUTPUTS and grid_rows * (out.shape[1] // tile) < _ENOUGH:
        tile //= 2
    return pl.pallas_call(
        functools.partial(_expand, rows=rows, tile=tile, slots=slots),
        grid=(out.shape[1] // tile, grid_rows),
        out_shape=jax.ShapeDtypeStruct(out.shape, dtype),
        input_output_aliases={0: 0} if out.dtype == dtype else {},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="low_rank_expand",
    )(out, slot, inner, *b)


def _few(x: Any, slot: Any, a: Any) -> Any:
    """What `a` makes of few rows: `inner`, [C, N, P * R]."""
    parts, slots, rank, width = a.shape
    num_rows = x.shape[0]
    rows = min(64, max(_LEAST, _power(num_rows)))
    steps = max(_LEAST_STEPS, pl.cdiv(width, _MOST_CUTS * _INPUTS))
    cuts = pl.cdiv(width, steps * _INPUTS)
    return pl.pallas_call(
        functools.partial(_reduce, rows=rows, steps=steps),
        grid=(parts * slots, cuts, pl.cdiv(num_rows, rows)),
        out_shape=jax.ShapeDtypeStruct((cuts, num_rows, parts * rank), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        name="low_rank_reduce",
    )(x, slot, a)


def _many(x: Any, slot: Any, a: Any) -> Any:
    """The same of many, in one cut."""
    parts, slots, rank, width = a.shape
    every = _contract(x, a.reshape(-1, width), 1).reshape(-1, parts, slots, rank)
    is_own = slot[:, None] == jnp.arange(slots)[None, :]
    return jnp.where(is_own[:, None, :, None], every, 0.0).sum(axis=2).reshape(1, -1, parts * rank)


def _reduce(
    x_ref: Any, slot_ref: Any, a_ref: Any, inner_ref: Any, *, rows: int, steps: int
) -> None:
    """One slot's `a` of one part, one cut of the inputs, some rows."""
    (num_rows, width), (_, slots, rank, _) = x_ref.shape, a_ref.shape
    part, own = pl.program_id(0) // slots, pl.program_id(0) % slots
    cut = pl.program_id(1)
    row, column = pl.program_id(2) * rows + jnp.arange(rows), jnp.arange(max(rank, _LEAST))
    is_own = _loaded(slot_ref, row, num_rows, slots) == own

    @pl.when(_any(is_own))
    def store() -> None:
        total = jnp.zeros((rows, column.size), jnp.float32)
        for step in range(steps):  # unrolled, so that all loads are on their way at once
            given = (cut * steps + step) * _INPUTS + jnp.arange(_INPUTS)
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
    slots: int,
) -> None:
    """Some outputs, which one part has, of some rows."""
    *b_refs, out_ref = refs
    (cuts, num_rows, _), rank = inner_ref.shape, b_refs[0].shape[1]
    block, row = pl.program_id(0), pl.program_id(1) * rows + jnp.arange(rows)
    slot = _loaded(slot_ref, row, num_rows, slots)  # one behind the last: no adapter
    # Some slots beside each other are one product, of which a row has its own columns alone.
    together = max(_LEAST, min(_TOGETHER, _power(slots * rank)), rank) // rank

    def add_part(part: int, first: int) -> None:
        own, number = block * tile - first + jnp.arange(tile), jnp.arange(together * rank)

        def some_of_b(start: int) -> Any:
            column = start * rank + number
            return triton.load(
                b_refs[part].at[(column // rank)[:, None], (column % rank)[:, None], own[None, :]],
                mask=jnp.broadcast_to((column < slots * rank)[:, None], (column.size, tile)),
                other=0.0,
            )

        # What is read is asked for first: Triton keeps the order of loads.
        b = some_of_b(0)
        at = row[:, None], (first + own)[None, :]
        is_row = jnp.broadcast_to((row < num_rows)[:, None], (rows, tile))
        total = triton.load(base_ref.at[at], mask=is_row, other=0.0).astype(jnp.float32)
        mine = jnp.zeros((rows, rank), jnp.float32)
        for cut in range(cuts):
            place = cut, row[:, None], (part * rank + jnp.arange(rank))[None, :]
            has_one = jnp.broadcast_to((slot < slots)[:, None], mine.shape)
            mine += triton.load(inner_ref.at[place], mask=has_one, other=0.0)
        for start in range(0, slots, together):
            b = some_of_b(start) if start else b
            is_own = slot[:, None] == (start + jnp.arange(together))[None, :]
            inner = jnp.where(is_own[:, :, None], mine[:, None, :], 0.0)
            total += _contract(inner.reshape(rows, number.size).astype(b.dtype), b, 0)
        triton.store(out_ref.at[at], total.astype(out_ref.dtype), mask=is_row)

    first = 0
    for part, one in enumerate(b_refs):
        last = first + one.shape[2]
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


def _divisor(b: tuple[Any, ...]) -> int:
    """The largest power of two that divides the outputs of every part."""
    return min(one.shape[2] & -one.shape[2] for one in b)


def _power(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(number - 1, 0).bit_length()
