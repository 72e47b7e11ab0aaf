"""Attention of chunks to pages of latents where these lie: NVIDIA GPUs.

All heads share one key, whose first numbers are the value, so the queries of several tokens are
rows of one product: some tokens, with all heads or some of them. A program goes through the row's
pages from the oldest token that its own see to the newest, block by block. The chunk's own tokens
are stored before, so a program reads them like the others.

Axes: T tokens, R rows of at most C of them, H heads, D numbers of a key, V of a value, S tokens of
a page, P pages of the pool.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from folojax.attention.paged_decode import add_block, parts_of_key, scores_of
from folojax.kv.cache import write
from folojax.kv.placement import Placement
from folojax.models.machine.triton import triton

_QUERIES = 64  # of a program: heads times tokens
_BLOCK = 32  # tokens that are read at once
_NOTHING = -1e30  # the largest score of no keys: finite, so that it can be subtracted from itself
_LOG2_E = math.log2(math.e)


def attend_chunks(
    query: Float[Array, "T H D"],
    key: Float[Array, "T 1 D"],
    value_dim: int,
    pages: Num[Array, "P 1 S 1 D"],
    placement: Placement,
    window: int | None,
    scale: float,
) -> tuple[Num[Array, "P 1 S 1 D"], Float[Array, "T H V"]]:
    """Stores tokens, and the attention of each to its row up to itself, or to `window` tokens.

    Args:
        query: In the dtype of the pages, like the key.
        key: Stored as `folojax.kv.cache.write` does.
        value_dim: V.
        pages: What lies behind V may be NaN behind a row's end; values are finite.
        placement: Of rows of several tokens. Padding gets zeros.
        window: Of the layer.
        scale: Of the scores.
    """
    tokens, heads, _ = query.shape
    num_pages, _, size, _, dim = pages.shape
    pages = write(pages, placement.page, placement.offset, key, value_dim, "tokens")
    together = min(_QUERIES, heads)  # heads of a program
    columns, rows = placement.columns, len(placement.first)
    of_program = max(1, _QUERIES // together)  # tokens of it
    first, length = (one.astype(jnp.int32) for one in (placement.first, placement.length))
    # Where tokens lie one behind the other, a row's first one among them.
    begin = () if placement.place is None else (placement.place[:, 0].astype(jnp.int32),)
    # Padding, which no program writes, stays zeros.
    out = jnp.zeros((tokens, heads, value_dim), query.dtype)
    out = pl.pallas_call(
        functools.partial(
            _attend,
            scale=scale * _LOG2_E,
            window=window,
            columns=columns,
            together=together,
            tokens=of_program,
        ),
        grid=(-(-heads // together), pl.cdiv(columns, of_program), rows),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={0: 0},
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        name="attend_latents",
    )(
        out,
        query,
        pages.reshape(num_pages, size, dim),
        placement.page_table.astype(jnp.int32),
        first,
        length,
        *begin,
    )
    return pages, out


def _attend(
    old_ref: Any,
    query_ref: Any,
    pages_ref: Any,
    table_ref: Any,
    first_ref: Any,
    length_ref: Any,
    *begin_and_out_refs: Any,
    scale: float,
    window: int | None,
    columns: int,
    together: int,
    tokens: int,
) -> None:
    """Some heads of some tokens of a row."""
    del old_ref  # the same memory as the result
    *begin_ref, out_ref = begin_and_out_refs
    block, tile, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    size, num_heads, value_dim = pages_ref.shape[1], query_ref.shape[1], out_ref.shape[-1]
    length = triton.load(length_ref.at[row])

    @pl.when(tile * tokens < length)
    def _() -> None:
        start = triton.load(first_ref.at[row]) + tile * tokens
        count = jnp.minimum(length - tile * tokens, tokens)
        end = start + count
        index = jnp.arange(1 << (together * tokens - 1).bit_length())
        place, head = index // together, block * together + index % together
        is_query = (place < count) & (head < num_heads)
        begin = triton.load(begin_ref[0].at[row]) if begin_ref else row * columns
        token = begin + tile * tokens + place
        position = start + place

        def of_queries(first: int, width: int) -> tuple[Any, Any]:
            at = token[:, None], head[:, None], first + jnp.arange(width)[None, :]
            return at, jnp.broadcast_to(is_query[:, None], (index.size, width))

        parts = parts_of_key(query_ref.shape[-1], value_dim)
        query = []
        for one in parts:
            at, mask = of_queries(*one)
            query.append(triton.load(query_ref.at[at], mask=mask, other=0.0))
        unit = min(_BLOCK, size)

        def read(number: Any, sums: Any) -> Any:
            page = triton.load(table_ref.at[row, number * unit // size])
            there = pl.ds(number * unit % size, unit)
            keys = [triton.load(pages_ref.at[page, there, pl.ds(*one)]) for one in parts]
            distance = position[:, None] - (number * unit + jnp.arange(unit))[None, :]
            is_seen = distance >= 0
            if window is not None:
                is_seen &= distance < window
            # What lies behind the row's end has NaN, and rows of padding would see it.
            is_seen &= is_query[:, None]
            scores = jnp.where(is_seen, scores_of(query, keys, scale), -jnp.inf)
            return add_block(sums, scores, keys[0])

        nothing = jnp.zeros((index.size,), jnp.float32)
        sums = jnp.zeros((index.size, value_dim), jnp.float32), nothing + _NOTHING, nothing
        lowest = jnp.zeros_like(start) if window is None else jnp.maximum(start - window + 1, 0)
        out, _, total = jax.lax.fori_loop(lowest // unit, (end + unit - 1) // unit, read, sums)
        at, mask = of_queries(0, value_dim)
        out = out / jnp.where(total > 0, total, 1.0)[:, None]
        triton.store(out_ref.at[at], out.astype(out_ref.dtype), mask=mask)
