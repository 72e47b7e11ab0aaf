"""Attention of single tokens to pages where these lie: NVIDIA GPUs.

A row's pages are cut by position into pieces of the same number of pages, wherever they lie and
whatever the other rows are, and dealt out to C programs, one piece to each in turn. A program reads
its pieces for all queries of a kv head, which are rows of one product (G of them; a product has at
least 16 rows). A second kernel joins what the programs of a row found, by the
logarithms of their sums. So a long row is read by many processors, a batch starts no more programs
than it can use however long rows may become, and what a row gets depends on no other row.

Axes: R rows, H query heads, K kv heads, G = H / K, D head dimension, S tokens of a page, P pages of
the pool, N pages of a row, C programs of a row and kv head.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from folojax.attention.row_layout import finite_in_kernel
from folojax.kv.placement import Placement
from folojax.models.machine.triton import triton

_PIECE_TOKENS = 512
_PROGRAMS = 8192  # of a batch; one that has nothing to read costs half a nanosecond
_LEAST_PROGRAMS, _MOST_PROGRAMS = 4, 64  # of a row and kv head
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
    piece = max(1, _PIECE_TOKENS // size)
    programs = _PROGRAMS // max(1, rows * kv_heads)
    programs = min(max(programs, _LEAST_PROGRAMS), _MOST_PROGRAMS, -(-table.shape[1] // piece))
    # Keys and values of a page follow each other.
    halves = pages.reshape(-1, size, kv_heads, dim)
    static: dict[str, Any] = {"window": window, "size": size, "piece": piece, "programs": programs}
    halves, partial, mass = pl.pallas_call(
        functools.partial(_read_piece, scale=scale * _LOG2_E, groups=groups, **static),
        grid=(kv_heads, programs, rows),
        out_shape=[
            jax.ShapeDtypeStruct(halves.shape, halves.dtype),
            jax.ShapeDtypeStruct((rows, programs, heads, dim), jnp.float32),
            jax.ShapeDtypeStruct((rows, programs, heads), jnp.float32),
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


class _Share(NamedTuple):
    """What a program reads of its row: its pages from the one numbered `lower` to before `upper`.

    It numbers its own pages: `page_of` says which of the row's a number means.
    """

    cached: Any  # tokens of the row that lie in pages; its own comes next
    first: Any  # the first position that the row sees
    lower: Any
    upper: Any
    own_page: Any  # of the row's own token
    has_own: Any  # whether that is this program's

    @property
    def is_empty(self) -> Any:
        """Whether there is nothing for the program."""
        return (self.lower >= self.upper) & ~self.has_own


def _share(
    end: Any, number: Any, *, window: int | None, size: int, piece: int, programs: int
) -> _Share:
    """That of a program, of `programs`, of a row that sees `end` positions."""
    first = jnp.maximum(end - window, 0) if window is not None else jnp.zeros_like(end)
    cached, own_page = end - 1, jnp.maximum(end - 1, 0) // size

    def count(pages: Any) -> Any:
        """How many of the row's first pages are the program's."""
        rounds, rest = pages // (piece * programs), pages % (piece * programs)
        return rounds * piece + jnp.clip(rest - number * piece, 0, piece)

    lower, upper = count(first // size), count((cached + size - 1) // size)
    has_own = (end > 0) & (own_page // piece % programs == number)
    return _Share(cached, first, lower, upper, own_page, has_own)


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
    programs: int,
) -> None:
    """A program's pages of a row, for the queries of one kv head.

    The one that the row's own token belongs to takes it as it comes, and stores it.
    """
    head, number, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dim = query_ref.shape[-1]
    end = triton.load(end_ref.at[row])
    share = _share(end, number, window=window, size=size, piece=piece, programs=programs)

    @pl.when(~share.is_empty)
    def _() -> None:
        group, whole = jnp.arange(max(_LEAST_GROUP, 1 << (groups - 1).bit_length())), pl.ds(0, dim)
        is_head, heads = group < groups, head * groups + group
        is_number = jnp.broadcast_to(is_head[:, None], (group.size, dim))
        of_heads = heads[:, None], jnp.arange(dim)[None, :]
        query = triton.load(query_ref.at[row, *of_heads], mask=is_number, other=0.0)
        own_key, own_value = finite_in_kernel(
            triton.load(key_ref.at[row, head, whole]), triton.load(value_ref.at[row, head, whole])
        )

        @pl.when(share.has_own)
        def _() -> None:
            half, offset = 2 * triton.load(table_ref.at[row, share.own_page]), share.cached % size
            is_kept = (half >= 0) & (half < halves_ref.shape[0])
            mask = jnp.broadcast_to(is_kept, (dim,))
            for skip, one in enumerate((own_key, own_value)):
                triton.store(stored_ref.at[half + skip, offset, head, whole], one, mask=mask)

        def read(index: Any, sums: Any) -> Any:
            out, most, total = sums
            place = (index // piece * programs + number) * piece + index % piece
            half = 2 * triton.load(table_ref.at[row, place])
            key = triton.load(halves_ref.at[half, pl.ds(0, size), head, whole])
            scores = _product(query, key, 1) * scale
            position = place * size + jnp.arange(size)
            is_seen = (position < share.cached) & (position >= share.first)
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
        score = jnp.where(share.has_own, jnp.sum(wide, axis=1) * scale, nothing - jnp.inf)
        weight = jnp.where(share.has_own, nothing + 1.0, nothing)
        own = weight[:, None] * own_value.astype(jnp.float32)[None, :]
        out, most, total = jax.lax.fori_loop(share.lower, share.upper, read, (own, score, weight))
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
    programs: int,
    together: int,
) -> None:
    """Some heads of one row."""
    row, dim = pl.program_id(0), out_ref.shape[-1]
    heads, whole = pl.ds(pl.program_id(1) * together, together), pl.ds(0, dim)
    end = triton.load(end_ref.at[row])
    static: dict[str, Any] = {"window": window, "size": size, "piece": piece, "programs": programs}

    def add(number: Any, sums: Any) -> Any:
        out, most, total = sums
        is_there = ~_share(end, number, **static).is_empty
        mask = jnp.broadcast_to(is_there, (together,))
        mass = triton.load(mass_ref.at[row, number, heads], mask=mask, other=-jnp.inf)
        mask = jnp.broadcast_to(is_there, (together, dim))
        part = triton.load(partial_ref.at[row, number, heads, whole], mask=mask, other=0.0)
        now = jnp.maximum(most, mass)
        kept, weight = jnp.exp2(most - now), jnp.exp2(mass - now)
        return out * kept[:, None] + part * weight[:, None], now, total * kept + weight

    nothing = jnp.zeros((together,), jnp.float32)
    # Finite: the first programs of a row with a window may have nothing.
    start = jnp.zeros((together, dim), jnp.float32), nothing - 1e30, nothing
    upper = jnp.minimum((jnp.maximum(end, 1) - 1) // size // piece + 1, programs)
    out, _, total = jax.lax.fori_loop(0, upper, add, start)
    out = out / jnp.where(total > 0, total, 1.0)[:, None]
    triton.store(out_ref.at[row, heads, whole], out.astype(out_ref.dtype))
