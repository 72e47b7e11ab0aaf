"""Attention of single tokens to pages where these lie, in pieces of fixed size: NVIDIA GPUs.

A row's pages are cut by position into pieces of the same number of pages, wherever they lie and
whatever the other rows are. A piece is read by one program for all queries of a kv head, which are
rows of one product (G = 1 to 16 of them; a product has at least 16 rows). A second kernel joins the
pieces of a row by the logarithms of their sums. So a long row is read by many processors, and what
a row gets does not depend on its company.

Axes: R rows, H query heads, K kv heads, G = H / K, D head dimension, S tokens of a page, P pages of
the pool, N pages of a row, C pieces of a row.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from folojax.attention.row_layout import finite_in_kernel
from folojax.kv.placement import Placement
from folojax.models.core.triton import triton

_PIECE_TOKENS = 512
_MOST_PIECES = 64  # of a row: longer rows have larger pieces
_LEAST_GROUP, _MOST_GROUP = 16, 64  # rows of a product
_HOPPER = 9.0
_LOG2_E = math.log2(math.e)


def is_taken(head_dim: int, groups: int, page_size: int, capability: float) -> bool:
    """Whether the kernel takes heads of these sizes on a device of that capability.

    Products have sides that are powers of two from 16 on, and two pages of a head must fit into a
    processor's own memory.
    """
    is_product = all(size >= 16 and size & (size - 1) == 0 for size in (head_dim, page_size))
    most = 2**14 if capability >= _HOPPER else 2**13
    fits = head_dim * page_size <= most and groups <= _MOST_GROUP
    return triton is not None and is_product and fits


def attend_single(
    query: Float[Array, "R H D"],
    key: Float[Array, "R K D"],
    value: Float[Array, "R K D"],
    pages: Num[Array, "P 2 S K D"],
    placement: Placement,
    window: int | None,
    scale: float,
) -> tuple[Num[Array, "P 2 S K D"], Float[Array, "R H D"]]:
    """Stores a token of each row, and its attention to the row, or to the last `window` tokens.

    Args:
        query: In the dtype of the pages, like key and value.
        key: Stored as `folojax.kv.cache.write` does, like the value.
        value: Likewise.
        pages: Keys may be NaN behind a row's end; values are finite.
        placement: Of rows of one token. One without is padding: it gets zeros.
        window: Of the layer.
        scale: Of the scores.
    """
    rows, heads, dim = query.shape
    _, _, size, kv_heads, _ = pages.shape
    groups = heads // kv_heads
    table = placement.page_table.astype(jnp.int32)
    end = jnp.where(placement.length > 0, placement.first + 1, 0).astype(jnp.int32)
    piece = max(1, _PIECE_TOKENS // size, -(-table.shape[1] // _MOST_PIECES))
    pieces = -(-table.shape[1] // piece)
    # Keys and values of a page follow each other.
    halves = pages.reshape(-1, size, kv_heads, dim)
    static: dict[str, Any] = {"window": window, "size": size, "piece": piece}
    halves, partial, mass = pl.pallas_call(
        functools.partial(_read_piece, scale=scale * _LOG2_E, groups=groups, **static),
        grid=(kv_heads, pieces, rows),
        out_shape=[
            jax.ShapeDtypeStruct(halves.shape, halves.dtype),
            jax.ShapeDtypeStruct((rows, pieces, heads, dim), jnp.float32),
            jax.ShapeDtypeStruct((rows, pieces, heads), jnp.float32),
        ],
        input_output_aliases={3: 0},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="read_pieces",
    )(query, key, value, halves, table, end)
    together = math.gcd(16, heads)
    out = pl.pallas_call(
        functools.partial(_join_pieces, together=together, **static),
        grid=(rows, heads // together),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=4),
        name="join_pieces",
    )(partial, mass, end)
    return halves.reshape(pages.shape), out


def _seen(end: Any, window: int | None, size: int) -> tuple[Any, Any]:
    """The first position that is seen, and the page of the last one, the row's own token."""
    first = jnp.maximum(end - window, 0) if window is not None else jnp.zeros_like(end)
    return first, jnp.maximum(end - 1, 0) // size


def _product(left: Any, right: Any, axis: int) -> Any:
    """The product of matrices over the last axis of one and `axis` of the other, in float32."""
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _read_piece(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    halves_ref: Any,
    table_ref: Any,
    end_ref: Any,
    stored_ref: Any,
    out_ref: Any,
    mass_ref: Any,
    *,
    scale: float,
    groups: int,
    window: int | None,
    size: int,
    piece: int,
) -> None:
    """The pages of one piece of a row, for the queries of one kv head.

    The piece that the row's own token belongs to takes it as it comes, and stores it.
    """
    head, number, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dim = query_ref.shape[-1]
    end = triton.load(end_ref.at[row])
    first, own_page = _seen(end, window, size)
    cached = end - 1  # positions before the row's own token
    lower = jnp.maximum(number * piece, first // size)
    upper = jnp.minimum(number * piece + piece, (cached + size - 1) // size)
    has_own = (end > 0) & (own_page // piece == number)

    @pl.when((lower < upper) | has_own)
    def _() -> None:
        group, whole = jnp.arange(max(_LEAST_GROUP, 1 << (groups - 1).bit_length())), pl.ds(0, dim)
        is_head, heads = group < groups, head * groups + group
        is_number = jnp.broadcast_to(is_head[:, None], (group.size, dim))
        of_heads = heads[:, None], jnp.arange(dim)[None, :]
        query = triton.load(query_ref.at[row, *of_heads], mask=is_number, other=0.0)
        own_key, own_value = finite_in_kernel(
            triton.load(key_ref.at[row, head, whole]), triton.load(value_ref.at[row, head, whole])
        )

        @pl.when(has_own)
        def _() -> None:
            half, offset = 2 * triton.load(table_ref.at[row, own_page]), cached % size
            is_kept = (half >= 0) & (half < halves_ref.shape[0])
            mask = jnp.broadcast_to(is_kept, (dim,))
            for skip, one in enumerate((own_key, own_value)):
                triton.store(stored_ref.at[half + skip, offset, head, whole], one, mask=mask)

        def read(place: Any, sums: Any) -> Any:
            out, most, total = sums
            half = 2 * triton.load(table_ref.at[row, place])
            key = triton.load(halves_ref.at[half, pl.ds(0, size), head, whole])
            scores = _product(query, key, 1) * scale
            position = place * size + jnp.arange(size)
            is_seen = (position < cached) & (position >= first)
            scores = jnp.where(is_seen[None, :], scores, -jnp.inf)
            # Finite: a page has a position that is seen, or the own token was there before.
            now = jnp.maximum(most, jnp.max(scores, axis=1))
            kept, weights = jnp.exp2(most - now), jnp.exp2(scores - now[:, None])
            value = triton.load(halves_ref.at[half + 1, pl.ds(0, size), head, whole])
            part = _product(weights.astype(value.dtype), value, 0)
            return (
                out * kept[:, None] + part,
                now,
                total * kept + jnp.sum(weights, axis=1),
            )

        nothing = jnp.zeros(group.shape, jnp.float32)
        wide = own_key.astype(jnp.float32)[None, :] * query.astype(jnp.float32)
        score = jnp.where(has_own, jnp.sum(wide, axis=1) * scale, nothing - jnp.inf)
        weight = jnp.where(has_own, nothing + 1.0, nothing)
        own = weight[:, None] * own_value.astype(jnp.float32)[None, :]
        out, most, total = jax.lax.fori_loop(lower, upper, read, (own, score, weight))
        triton.store(out_ref.at[row, number, *of_heads], out / total[:, None], mask=is_number)
        triton.store(mass_ref.at[row, number, heads], most + jnp.log2(total), mask=is_head)


def _join_pieces(
    partial_ref: Any,
    mass_ref: Any,
    end_ref: Any,
    out_ref: Any,
    *,
    window: int | None,
    size: int,
    piece: int,
    together: int,
) -> None:
    """Some heads of one row."""
    row, dim = pl.program_id(0), out_ref.shape[-1]
    heads, whole = pl.ds(pl.program_id(1) * together, together), pl.ds(0, dim)
    end = triton.load(end_ref.at[row])
    first, own_page = _seen(end, window, size)

    def add(number: Any, sums: Any) -> Any:
        out, most, total = sums
        mass = triton.load(mass_ref.at[row, number, heads])
        part = triton.load(partial_ref.at[row, number, heads, whole])
        now = jnp.maximum(most, mass)
        kept, weight = jnp.exp2(most - now), jnp.exp2(mass - now)
        return out * kept[:, None] + part * weight[:, None], now, total * kept + weight

    nothing = jnp.zeros((together,), jnp.float32)
    start = jnp.zeros((together, dim), jnp.float32), nothing - jnp.inf, nothing
    lower, upper = first // size // piece, jnp.where(end > 0, own_page // piece + 1, 0)
    out, _, total = jax.lax.fori_loop(lower, upper, add, start)
    out = out / jnp.where(total > 0, total, 1.0)[:, None]
    triton.store(out_ref.at[row, heads, whole], out.astype(out_ref.dtype))
