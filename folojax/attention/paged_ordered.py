"""Attention whose sums are the row's own: what a token gets has the same bits in any call.

A query goes through the keys that it sees in blocks of 64 positions, which are cut into pieces of
512. Every piece begins anew, and the pieces are added in the order of positions. That is so for
single tokens and for those of a chunk, for all sizes of chunks and pages: what a call adds to it
are blocks that a query does not see, which change nothing, and other queries beside it.

    single tokens   a program a piece; a second kernel adds the pieces of a row
    chunks          a program for some tokens, which adds piece after piece

Three things keep it so. The tiles of the tensor cores have keys, and numbers of values, along their
long side and queries along their short one: a tile of few queries and one of many take the same
instructions for a number. What sums are scaled with is a power of two, so it never rounds, however
a compiler fuses it. And tokens are stored before anything is read, by a kernel of its own, so one's
own key is read like the others.

NVIDIA GPUs of the Hopper generation, in half precision (Triton through Pallas).

Axes: T tokens, R rows of at most C of them, H query heads, K kv heads, G = H / K, D head dimension,
S tokens of a page, P pages of the pool, N pages of a row.
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
from folojax.models.machine.triton import triton

_BLOCK = 64  # positions that are read at once
_PIECE_BLOCKS = 8
_FEWEST_QUERIES, _MOST_QUERIES = 16, 64  # of a tile: heads times tokens
_MOST_PARTIAL_BYTES = 2**26  # of what the pieces of all rows found
_MOST_STORED = 8, 1024  # tokens, and numbers of each, that a program stores
_NOTHING = -1e30  # the largest score of no keys: finite, so that it can be subtracted from itself
_LOG2_E = math.log2(math.e)


def attend_in_order(
    query: Float[Array, "T H D"],
    key: Float[Array, "T K D"],
    value: Float[Array, "T K D"],
    pages: Num[Array, "P 2 S K D"],
    placement: Placement,
    window: int | None,
    scale: float,
) -> tuple[Num[Array, "P 2 S K D"], Float[Array, "T H D"]]:
    """Stores tokens, and the attention of each to its row up to itself, or to `window` tokens.

    Args:
        query: In the dtype of the pages, like key and value.
        key: Stored as `folojax.kv.cache.write` does, like the value.
        value: Likewise.
        pages: Keys may be NaN behind a row's end; values are finite.
        placement: Of rows of one token, or of chunks. Padding gets anything finite.
        window: Of the layer.
        scale: Of the scores.
    """
    heads, dim = query.shape[1:]
    num_pages, _, size, kv_heads, _ = pages.shape
    groups, (rows, width) = heads // kv_heads, placement.page_table.shape
    halves = store_tokens(key, value, pages.reshape(2 * num_pages, size, kv_heads, dim), placement)
    table = placement.page_table.astype(jnp.int32)
    columns = placement.columns
    first, length = (one.astype(jnp.int32) for one in (placement.first, placement.length))
    # Where tokens lie one behind the other, a row's first one among them.
    begin = () if placement.place is None else (placement.place[:, 0].astype(jnp.int32),)
    pieces = pl.cdiv(width * size, _BLOCK * _PIECE_BLOCKS)
    is_single = columns == 1
    partial_bytes = 4 * rows * pieces * heads * dim
    is_split = is_single and pieces > 1 and partial_bytes <= _MOST_PARTIAL_BYTES
    most = _FEWEST_QUERIES if is_single else _MOST_QUERIES if dim <= 128 else _MOST_QUERIES // 2
    queries = max(most, 1 << (groups - 1).bit_length())
    tokens = queries // groups
    numbers: dict[str, Any] = {
        "scale": scale * _LOG2_E,
        "groups": groups,
        "window": window,
        "size": size,
    }
    kernel = functools.partial(
        _attend, **numbers, columns=columns, queries=queries, tokens=tokens, is_split=is_split
    )
    params = triton.CompilerParams(num_warps=4, num_stages=2)
    arguments = query, halves, table, first, length, *begin
    if not is_split:
        out = pl.pallas_call(
            kernel,
            grid=(kv_heads, pl.cdiv(columns, tokens), rows),
            out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
            input_output_aliases={0: 0},  # padding, which no program writes, keeps its query
            compiler_params=params,
            name="attend_in_order",
        )(*arguments)
        return halves.reshape(pages.shape), out
    of_heads = jax.ShapeDtypeStruct((rows, pieces, heads), jnp.float32)
    parts = pl.pallas_call(
        kernel,
        grid=(kv_heads, pieces, rows),
        out_shape=[
            jax.ShapeDtypeStruct((rows, pieces, heads, dim), jnp.float32),
            of_heads,
            of_heads,
        ],
        compiler_params=params,
        name="attend_pieces_in_order",
    )(*arguments)
    together = math.gcd(16, heads)
    out = pl.pallas_call(
        functools.partial(_join, together=together, window=window),
        grid=(rows, heads // together),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=4),
        name="join_in_order",
    )(*parts, first, length)
    return halves.reshape(pages.shape), out


def store_tokens(
    key: Float[Array, "T K D"],
    value: Float[Array, "T K D"],
    halves: Num[Array, "_ S K D"],
    placement: Placement,
) -> Num[Array, "_ S K D"]:
    """Stores keys and values of tokens in their pages, as `folojax.kv.cache.write` does.

    Args:
        key: Of the tokens.
        value: Likewise.
        halves: The pages, keys and values apart.
        placement: Says which page each token belongs to; one outside of the pool drops it.
    """
    num_tokens, kv_heads, dim = key.shape
    numbers = kv_heads * dim
    tokens = min(_MOST_STORED[0], 1 << (num_tokens - 1).bit_length())
    block = min(_MOST_STORED[1], 1 << (numbers - 1).bit_length())
    flat = halves.reshape(*halves.shape[:2], numbers)
    stored = pl.pallas_call(
        functools.partial(_store, tokens=tokens, block=block),
        grid=(pl.cdiv(num_tokens, tokens), pl.cdiv(numbers, block)),
        out_shape=jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        input_output_aliases={2: 0},
        compiler_params=triton.CompilerParams(num_warps=4),
        name="store_tokens",
    )(
        key.reshape(num_tokens, numbers),
        value.reshape(num_tokens, numbers),
        flat,
        placement.page.astype(jnp.int32),
        placement.offset.astype(jnp.int32),
    )
    return stored.reshape(halves.shape)


def _store(
    key_ref: Any,
    value_ref: Any,
    old_ref: Any,
    page_ref: Any,
    offset_ref: Any,
    halves_ref: Any,
    *,
    tokens: int,
    block: int,
) -> None:
    """Some numbers of some tokens."""
    del old_ref  # the same memory
    token = pl.program_id(0) * tokens + jnp.arange(tokens)
    number = pl.program_id(1) * block + jnp.arange(block)
    num_halves, (num_tokens, width) = halves_ref.shape[0], key_ref.shape
    is_there = token < num_tokens
    half = 2 * triton.load(page_ref.at[token], mask=is_there, other=num_halves // 2)
    offset = triton.load(offset_ref.at[token], mask=is_there, other=0)
    is_kept = is_there & (half >= 0) & (half < num_halves)
    mask = is_kept[:, None] & (number < width)[None, :]
    pair = (
        triton.load(ref.at[token[:, None], number[None, :]], mask=mask, other=0.0)
        for ref in (key_ref, value_ref)
    )
    for skip, one in enumerate(finite_in_kernel(*pair)):
        where = (half + skip)[:, None], offset[:, None], number[None, :]
        triton.store(halves_ref.at[where], one, mask=mask)


def _attend(
    query_ref: Any,
    halves_ref: Any,
    table_ref: Any,
    first_ref: Any,
    length_ref: Any,
    *begin_and_out_refs: Any,
    columns: int,
    scale: float,
    groups: int,
    window: int | None,
    size: int,
    queries: int,
    tokens: int,
    is_split: bool,
) -> None:
    """The queries of a kv head for some tokens of a row: all that they see, or a piece of it."""
    head, number, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    tile = 0 if is_split else number
    num_outs = 3 if is_split else 1
    begin_ref, out_refs = begin_and_out_refs[:-num_outs], begin_and_out_refs[-num_outs:]
    length = triton.load(length_ref.at[row])

    @pl.when(tile * tokens < length)
    def _() -> None:
        start = triton.load(first_ref.at[row]) + tile * tokens
        count = jnp.minimum(length - tile * tokens, tokens)
        end = start + count
        lowest = jnp.zeros_like(start) if window is None else jnp.maximum(start - window + 1, 0)
        index, dims = jnp.arange(queries), jnp.arange(query_ref.shape[-1])
        group, place = index % groups, index // groups
        is_query = (place < count) & (index < tokens * groups)
        # What is masked must not name a head that is not: the interpreter writes it back.
        heads = head * groups + (index if is_split else group)
        begin = triton.load(begin_ref[0].at[row]) if begin_ref else row * columns
        token = begin + tile * tokens + place
        of_query = token[:, None], heads[:, None], dims[None, :]
        is_number = jnp.broadcast_to(is_query[:, None], (queries, dims.size))
        query = triton.load(query_ref.at[of_query], mask=is_number, other=0.0)
        position = start + place

        def read(block: Any, sums: Any) -> Any:
            """Takes in a block of keys; sums are by number of a value and query."""
            out, most, total = sums
            key_position = block * _BLOCK + jnp.arange(_BLOCK)
            where: list[Any]
            if size % _BLOCK == 0:
                half = 2 * triton.load(table_ref.at[row, block * _BLOCK // size])
                offset = pl.ds(block * _BLOCK % size, _BLOCK)
                where = [(half + skip, offset, head, pl.ds(0, dims.size)) for skip in (0, 1)]
            else:
                place = jnp.minimum(key_position // size, table_ref.shape[1] - 1)
                is_there = key_position < end
                half = 2 * triton.load(table_ref.at[row, place], mask=is_there, other=0)
                offset = (key_position % size)[:, None]
                where = [((half + skip)[:, None], offset, head, dims[None, :]) for skip in (0, 1)]
            key = triton.load(halves_ref.at[where[0]])
            scores = _product(key, query, (1, 1)) * scale
            distance = position[None, :] - key_position[:, None]
            is_seen = distance >= 0
            if window is not None:
                is_seen &= distance < window
            scores = jnp.where(is_seen, scores, -jnp.inf)
            now = jnp.maximum(most, jnp.ceil(jnp.max(scores, axis=0)))
            kept, weights = jnp.exp2(most - now), jnp.exp2(scores - now[None, :])
            value = triton.load(halves_ref.at[where[1]])
            part = _product(value, weights.astype(value.dtype), (0, 0))
            return out * kept[None, :] + part, now, total * kept + jnp.sum(weights, axis=0)

        nothing = _no_sums(dims.size, queries)
        low, high = lowest // _BLOCK, (end + _BLOCK - 1) // _BLOCK

        def read_piece(piece: Any) -> Any:
            first, last = piece * _PIECE_BLOCKS, (piece + 1) * _PIECE_BLOCKS
            return jax.lax.fori_loop(
                jnp.maximum(low, first), jnp.minimum(high, last), read, nothing
            )

        if is_split:
            out_ref, most_ref, total_ref = out_refs

            @pl.when((number * _PIECE_BLOCKS < high) & ((number + 1) * _PIECE_BLOCKS > low))
            def _() -> None:
                out, most, total = read_piece(number)
                place = row, number, heads[:, None], dims[None, :]
                triton.store(out_ref.at[place], out.T, mask=is_number)
                triton.store(most_ref.at[row, number, heads], most, mask=is_query)
                triton.store(total_ref.at[row, number, heads], total, mask=is_query)

        else:
            low_piece, high_piece = low // _PIECE_BLOCKS, pl.cdiv(high, _PIECE_BLOCKS)
            sums = jax.lax.fori_loop(
                low_piece, high_piece, lambda piece, sums: _added(sums, read_piece(piece)), nothing
            )
            (out_ref,) = out_refs
            triton.store(
                out_ref.at[of_query], _quotient(sums).T.astype(out_ref.dtype), mask=is_number
            )


def _join(
    out_ref: Any,
    most_ref: Any,
    total_ref: Any,
    first_ref: Any,
    length_ref: Any,
    joined_ref: Any,
    *,
    together: int,
    window: int | None,
) -> None:
    """Adds the pieces of some heads of a row."""
    row, dim = pl.program_id(0), out_ref.shape[-1]
    heads, whole = pl.ds(pl.program_id(1) * together, together), pl.ds(0, dim)
    is_row = triton.load(length_ref.at[row]) > 0
    end = jnp.where(is_row, triton.load(first_ref.at[row]) + 1, 0)
    lowest = jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0)
    tokens = _BLOCK * _PIECE_BLOCKS

    def add(piece: Any, sums: Any) -> Any:
        place = row, piece, heads
        out = triton.load(out_ref.at[*place, whole])
        most, total = triton.load(most_ref.at[place]), triton.load(total_ref.at[place])
        return _added(sums, (out.T, most, total))

    sums = jax.lax.fori_loop(
        lowest // tokens, (end + tokens - 1) // tokens, add, _no_sums(dim, together)
    )
    joined = _quotient(sums).T
    triton.store(joined_ref.at[row, heads, whole], joined.astype(joined_ref.dtype))


def _no_sums(dim: int, queries: int) -> Any:
    """Of no keys: the sum of values, the largest score rounded up, the sum of weights."""
    nothing = jnp.zeros((queries,), jnp.float32)
    return jnp.zeros((dim, queries), jnp.float32), nothing + _NOTHING, nothing


def _added(sums: Any, more: Any) -> Any:
    """Both as one; factors are powers of two."""
    (out, most, total), (part, its_most, its_total) = sums, more
    now = jnp.maximum(most, its_most)
    kept, factor = jnp.exp2(most - now), jnp.exp2(its_most - now)
    return out * kept[None, :] + part * factor[None, :], now, total * kept + its_total * factor


def _quotient(sums: Any) -> Any:
    out, _, total = sums
    return out / jnp.where(total == 0, 1.0, total)[None, :]


def _product(left: Any, right: Any, axes: tuple[int, int]) -> Any:
    """The product of matrices over an axis of each, in float32."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
