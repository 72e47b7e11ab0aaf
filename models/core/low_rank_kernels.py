"""What adapters add to a product, as two kernels on an NVIDIA GPU.

    reduce   x [N, I] ── a of the row's slot, inputs in cuts ──> inner [N, P * C * R]
    expand   inner, summed over the cuts ── b of the row's slot ──> added to the product [N, O]

XLA makes four to six kernels of it for each product, which take much longer than the bytes would.
A program of the first reads of the adapters only those that its rows have. Inputs are cut by their
number alone and cuts are added in one order, which no number of rows changes, so what a row gets
depends on no other row. Of many rows `inner` is one large product with all adapters, which XLA does
well; and rows beside each other are mostly of one prompt, so that the second kernel multiplies once
for each slot that some of its rows have, and not with all of them side by side.

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
_LEAST_STEPS, _MOST_CUTS = 2, 16
_MOST_INNER = 256  # numbers that a program which expands reads of a row
_TOGETHER = 128  # numbers of `inner` that are multiplied at once
_ENOUGH = 64  # programs that expand the same rows, if these are few
# What a program that expands has of the result, at most, and by how many warps, as measured on an
# H200. Of few rows nothing depends on their number, so that no bit does.
_OUTPUTS, _ROWS, _WARPS = 128, 32, 4


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
    is_gated: bool = False,
    is_ordered: bool = False,
) -> Float[Array, "N _"]:
    """`out` and the updates of `x` by the adapters in the rows' slots, in `dtype`.

    Rows have none from slot L on. If gated, the parts are gate and up, and it is silu(gate) * up of
    both, rounded before. If ordered, many rows are computed as few are.
    """
    num_rows, slots, outputs = x.shape[0], a.shape[1], out.shape[1] // (1 + is_gated)
    slot = slot.astype(jnp.int32)
    is_few = is_ordered or num_rows <= _FEW_ROWS
    inner = (_few if is_few else _many)(x.astype(a.dtype), slot, a)
    tile = min(_OUTPUTS, _divisor(b))
    while is_few and tile > _LEAST and outputs // tile < _ENOUGH:
        tile //= 2
    kernel = _expand_gated if is_gated else _expand
    shape = jax.ShapeDtypeStruct((num_rows, outputs), dtype)
    return pl.pallas_call(
        functools.partial(kernel, tile=tile, rows=_ROWS, slots=slots, is_mixed=is_few),
        grid=(outputs // tile, pl.cdiv(num_rows, _ROWS)),
        out_shape=shape,
        input_output_aliases={0: 0} if out.dtype == dtype and not is_gated else {},
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=2),
        name="low_rank_gated" if is_gated else "low_rank_expand",
    )(out, slot, inner, *b)


def _few(x: Any, slot: Any, a: Any) -> Any:
    """What `a` makes of few rows: `inner`, [N, P * C * R]."""
    parts, slots, rank, width = a.shape
    num_rows = x.shape[0]
    rows = min(64, max(_LEAST, _power(num_rows)))
    num_steps = pl.cdiv(width, _INPUTS)
    cuts = min(_MOST_CUTS, _last_power(num_steps // _LEAST_STEPS), _last_power(_MOST_INNER // rank))
    return pl.pallas_call(
        functools.partial(_reduce, rows=rows, cuts=cuts, steps=pl.cdiv(num_steps, cuts)),
        grid=(parts * slots, cuts, pl.cdiv(num_rows, rows)),
        out_shape=jax.ShapeDtypeStruct((num_rows, parts * cuts * rank), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        name="low_rank_reduce",
    )(x, slot, a)


def _many(x: Any, slot: Any, a: Any) -> Any:
    """The same of many, in one cut."""
    parts, slots, rank, width = a.shape
    every = _contract(x, a.reshape(-1, width), 1).reshape(-1, parts, slots, rank)
    is_own = slot[:, None] == jnp.arange(slots)[None, :]
    return jnp.where(is_own[:, None, :, None], every, 0.0).sum(axis=2).reshape(-1, parts * rank)


def _reduce(
    x_ref: Any, slot_ref: Any, a_ref: Any, inner_ref: Any, *, rows: int, cuts: int, steps: int
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
        place = inner_ref.at[row[:, None], ((part * cuts + cut) * rank + column)[None, :]]
        triton.store(place, total, mask=is_own[:, None] & (column < rank)[None, :])


def _expand(
    base_ref: Any, slot_ref: Any, inner_ref: Any, *refs: Any, tile: int, rows: int, **how: Any
) -> None:
    """Some outputs, which one part has, of some rows."""
    *b_refs, out_ref = refs
    updated: Any = functools.partial(_updated, **how)
    block, row = pl.program_id(0), pl.program_id(1) * rows + jnp.arange(rows)

    def add_part(part: int, first: int) -> None:
        own = block * tile - first + jnp.arange(tile)
        total = updated(base_ref, slot_ref, inner_ref, b_refs, part, first, own, row)
        is_row = jnp.broadcast_to((row < base_ref.shape[0])[:, None], total.shape)
        place = out_ref.at[row[:, None], (first + own)[None, :]]
        triton.store(place, total.astype(out_ref.dtype), mask=is_row)

    first = 0
    for part, one in enumerate(b_refs):
        last = first + one.shape[2]
        is_part = (block >= first // tile) & (block < last // tile)
        pl.when(is_part)(functools.partial(add_part, part, first))
        first = last


def _expand_gated(
    base_ref: Any, slot_ref: Any, inner_ref: Any, *refs: Any, tile: int, rows: int, **how: Any
) -> None:
    """Some numbers of gate and up, which are rounded, and what becomes of both, of some rows."""
    *b_refs, out_ref = refs
    updated: Any = functools.partial(_updated, **how)
    row = pl.program_id(1) * rows + jnp.arange(rows)
    own = pl.program_id(0) * tile + jnp.arange(tile)
    gate, up = (
        updated(base_ref, slot_ref, inner_ref, b_refs, part, first, own, row)
        .astype(out_ref.dtype)
        .astype(jnp.float32)
        for part, first in enumerate((0, out_ref.shape[1]))
    )
    out = (jax.nn.silu(gate) * up).astype(out_ref.dtype)
    is_row = jnp.broadcast_to((row < base_ref.shape[0])[:, None], out.shape)
    triton.store(out_ref.at[row[:, None], own[None, :]], out, mask=is_row)


def _updated(
    base_ref: Any,
    slot_ref: Any,
    inner_ref: Any,
    b_refs: Any,
    part: int,
    first: int,
    own: Any,
    row: Any,
    slots: int,
    is_mixed: bool,
) -> Any:
    """Numbers of a product with their updates, in float32.

    Args:
        base_ref: The product.
        slot_ref: Of every row.
        inner_ref: As it was reduced.
        b_refs: Of each part.
        part: Which has the numbers.
        first: Output of the part.
        own: Outputs, counted from that one.
        row: Of the numbers.
        slots: L.
        is_mixed: Whether each row may have another slot than the one before; else few do.
    """
    (num_rows, width), rank = inner_ref.shape, b_refs[0].shape[1]
    (rows,), (tile,), cuts = row.shape, own.shape, width // (len(b_refs) * rank)
    slot = _loaded(slot_ref, row, num_rows, slots)  # one behind the last: no adapter
    if not is_mixed:
        return _updated_in_turn(
            base_ref, inner_ref, b_refs[part], part * rank, first + own, own, row, slot, slots
        )
    # Some slots beside each other are one product, of which a row has its own columns alone.
    together = max(_LEAST, min(_TOGETHER, _power(slots * rank)), rank) // rank
    number = jnp.arange(together * rank)

    def some_of_b(start: int) -> Any:
        column = start * rank + number
        return triton.load(
            b_refs[part].at[(column // rank)[:, None], (column % rank)[:, None], own[None, :]],
            mask=jnp.broadcast_to((column < slots * rank)[:, None], (column.size, tile)),
            other=0.0,
        )

    # What is read is asked for first: Triton keeps the order of loads.
    b = some_of_b(0)
    is_row = jnp.broadcast_to((row < num_rows)[:, None], (rows, tile))
    place = base_ref.at[row[:, None], (first + own)[None, :]]
    total = triton.load(place, mask=is_row, other=0.0).astype(jnp.float32)
    column = part * cuts * rank + jnp.arange(cuts * rank)
    has_one = jnp.broadcast_to((slot < slots)[:, None], (rows, column.size))
    every = triton.load(inner_ref.at[row[:, None], column[None, :]], mask=has_one, other=0.0)
    mine = every.reshape(rows, cuts, rank).sum(axis=1)  # one load: some are slower than all
    for start in range(0, slots, together):
        b = some_of_b(start) if start else b
        is_own = slot[:, None] == (start + jnp.arange(together))[None, :]
        inner = jnp.where(is_own[:, :, None], mine[:, None, :], 0.0)
        total += _contract(inner.reshape(rows, number.size).astype(b.dtype), b, 0)
    return total


def _updated_in_turn(
    base_ref: Any,
    inner_ref: Any,
    b_ref: Any,
    start: int,
    output: Any,
    own: Any,
    row: Any,
    slot: Any,
    slots: int,
) -> Any:
    """The same of rows of which many have the same slot: a product for each that there is."""
    (_, rank, _), (rows,), (tile,) = b_ref.shape, row.shape, own.shape
    column = jnp.arange(max(rank, _LEAST))
    is_row = (row < base_ref.shape[0])[:, None]
    base = triton.load(
        base_ref.at[row[:, None], output[None, :]],
        mask=jnp.broadcast_to(is_row, (rows, tile)),
        other=0.0,
    )
    mine = triton.load(
        inner_ref.at[row[:, None], (start + column)[None, :]],
        mask=(slot < slots)[:, None] & (column < rank)[None, :],
        other=0.0,
    )

    def add(one: Any, total: Any) -> Any:
        b = triton.load(
            b_ref.at[one, column[:, None], own[None, :]],
            mask=jnp.broadcast_to((column < rank)[:, None], (column.size, tile)),
            other=0.0,
        )
        inner = jnp.where((slot == one)[:, None], mine, 0.0).astype(b.dtype)
        return total + _contract(inner, b, 0)

    last = jnp.max(jnp.where(slot < slots, slot, -1))
    return jax.lax.fori_loop(jnp.min(slot), last + 1, add, base.astype(jnp.float32))


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


def _last_power(number: int) -> int:
    """The largest power of two that is no larger, and at least 1."""
    return 1 << max(number, 1).bit_length() - 1
