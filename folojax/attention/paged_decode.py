"""Attention of single tokens to pages where these lie: NVIDIA GPUs.

A row's pages are cut by position into blocks, whole pages or parts of one, and pieces of the same
number of blocks, wherever they lie and whatever the other rows are, which are dealt out to C
programs, one piece to each in turn. A program reads its pieces for the queries of a kv head, up to
64 of them, which are rows of one product (of at least 16). A second kernel joins what the programs
of a row found, by the logarithms of their sums. So a long row is read by many processors, a batch
starts no more programs than it can use however long rows may become, and what a row gets depends on
no other row.

Where values are the first numbers of keys (latent attention) a block of keys is read once for both.
Sides of products are powers of two, so a key is two parts then: those numbers, and the rest.

Axes: R rows, H query heads, K kv heads, G = H / K, D numbers of a key, V of a value, S tokens of a
page, P pages of the pool, N pages of a row, C programs of a row and kv head.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from folojax.attention.row_layout import finite_in_kernel, finite_parts
from folojax.kv.placement import Placement
from folojax.models.machine.triton import triton

_PIECE_TOKENS, _LATENT_PIECE = 512, 256  # latents have one kv head, and so fewer programs
_LATENT_BLOCK = 32  # tokens: a page of latents is too much for a processor's own memory
_PROGRAMS = 8192  # of a batch; one that has nothing to read costs half a nanosecond
_LEAST_PROGRAMS, _MOST_PROGRAMS = 4, 64  # of a row and kv head
_LEAST_GROUP, _MOST_GROUP = 16, 64  # rows of a product
_MOST_JOINED = 16, 2048  # heads, and numbers of them, that a program joins
_HOPPER = 9.0
_LOG2_E = math.log2(math.e)


def is_taken(
    head_dim: int, groups: int, page_size: int, capability: float, value_dim: int | None = None
) -> bool:
    """Whether the kernel takes heads of these sizes on a device of that capability.

    Products have sides that are powers of two from 16 on, and two pages of a head, or blocks of
    latents, must fit into a processor's own memory.
    """
    sizes = [page_size, *(width for _, width in parts_of_key(head_dim, value_dim))]
    is_product = all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    most, tokens = 2**14 if capability >= _HOPPER else 2**13, page_size
    if value_dim is not None:
        # Keys are the values too, but queries have as many numbers.
        most, tokens, groups = 640 * _LATENT_BLOCK, min(page_size, _LATENT_BLOCK), 1
    fits = head_dim * tokens <= most and groups <= _MOST_GROUP
    return triton is not None and is_product and fits


def parts_of_key(dim: int, value_dim: int | None) -> list[tuple[int, int]]:
    """Where the parts of a key begin, which are multiplied apart, and their sizes."""
    return [(0, dim)] if value_dim is None else [(0, value_dim), (value_dim, dim - value_dim)]


def attend_single(
    query: Float[Array, "R H D"],
    key: Float[Array, "R K D"],
    value: Float[Array, "R K D"] | int,
    pages: Num[Array, "P X S K D"],
    placement: Placement,
    window: int | None,
    scale: float,
) -> tuple[Num[Array, "P X S K D"], Float[Array, "R H V"]]:
    """Stores a token of each row, and its attention to the row, or to the last `window` tokens.

    Args:
        query: In the dtype of the pages, like key and value.
        key: Stored as `folojax.kv.cache.write` does, like the value.
        value: Likewise; or V, where values are the first numbers of keys.
        pages: Keys may be NaN behind a row's end; values are finite.
        placement: Of rows of one token. One without is padding: it gets zeros.
        window: Of the layer.
        scale: Of the scores.
    """
    rows, heads, dim = query.shape
    _, _, size, kv_heads, _ = pages.shape
    groups = heads // kv_heads
    value_dim = value if isinstance(value, int) else None
    width = dim if value_dim is None else value_dim
    most, block = _PIECE_TOKENS, size
    if value_dim is not None:
        most, block = _LATENT_PIECE, min(size, _LATENT_BLOCK)
    table = placement.page_table.astype(jnp.int32)
    end = jnp.where(placement.length > 0, placement.first + 1, 0).astype(jnp.int32)
    piece = max(1, most // block)
    together = min(_MOST_GROUP, groups)
    num_parts = kv_heads * -(-groups // together)  # of the queries of a row
    programs = _PROGRAMS // max(1, rows * num_parts)
    num_pieces = -(-table.shape[1] * size // (piece * block))
    programs = min(max(programs, _LEAST_PROGRAMS), _MOST_PROGRAMS, num_pieces)
    # The arrays of a page follow each other.
    halves = pages.reshape(-1, size, kv_heads, dim)
    static: dict[str, Any] = {"window": window, "size": block, "piece": piece, "programs": programs}
    of_keys: dict[str, Any] = {"value_dim": value_dim, "page_size": size, "groups": groups}
    given = (key,) if isinstance(value, int) else (key, value)
    num_warps = 8 if value_dim is not None and together > _LEAST_GROUP else 4
    halves, partial, mass = pl.pallas_call(
        functools.partial(
            _read_piece, scale=scale * _LOG2_E, together=together, **of_keys, **static
        ),
        grid=(num_parts, programs, rows),
        out_shape=[
            jax.ShapeDtypeStruct(halves.shape, halves.dtype),
            jax.ShapeDtypeStruct((rows, programs, heads, width), jnp.float32),
            jax.ShapeDtypeStruct((rows, programs, heads), jnp.float32),
        ],
        input_output_aliases={1 + len(given): 0},
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=2),
        name="read_pieces",
    )(query, *given, halves, table, end)
    joined = math.gcd(min(_MOST_JOINED[0], max(1, _MOST_JOINED[1] // width)), heads)
    out = pl.pallas_call(
        functools.partial(_join_pieces, together=joined, **static),
        grid=(rows, heads // joined),
        out_shape=jax.ShapeDtypeStruct((rows, heads, width), query.dtype),
        compiler_params=triton.CompilerParams(num_warps=4),
        name="join_pieces",
    )(partial, mass, end)
    return halves.reshape(pages.shape), out


class _Share(NamedTuple):
    """What a program reads of its row: its blocks from the one numbered `lower` to before `upper`.

    It numbers its own blocks, piece after piece of those that are dealt out to it.
    """

    cached: Any  # tokens of the row that lie in pages; its own comes next
    first: Any  # the first position that the row sees
    lower: Any
    upper: Any
    own_block: Any  # of the row's own token
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
    cached, own_block = end - 1, jnp.maximum(end - 1, 0) // size

    def count(blocks: Any) -> Any:
        """How many of the row's first blocks are the program's."""
        rounds, rest = blocks // (piece * programs), blocks % (piece * programs)
        return rounds * piece + jnp.clip(rest - number * piece, 0, piece)

    lower, upper = count(first // size), count((cached + size - 1) // size)
    has_own = (end > 0) & (own_block // piece % programs == number)
    return _Share(cached, first, lower, upper, own_block, has_own)


def _product(left: Any, right: Any, axis: int) -> Any:
    """The product of matrices over the last axis of one and `axis` of the other, in float32."""
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def scores_of(query: Sequence[Any], keys: Sequence[Any], scale: float) -> Any:
    """Of queries, part by part, and a block of keys."""
    return sum(_product(*pair, 1) for pair in zip(query, keys, strict=True)) * scale


def add_block(sums: Any, scores: Any, values: Any) -> Any:
    """Takes a block into a softmax: sums of values, the largest score, sums of weights.

    Scores of what is not seen are -inf; the largest is finite, from the first block on or before.
    """
    out, most, total = sums
    now = jnp.maximum(most, jnp.max(scores, axis=1))
    kept, weights = jnp.exp2(most - now), jnp.exp2(scores - now[:, None])
    part = _product(weights.astype(values.dtype), values, 0)
    return out * kept[:, None] + part, now, total * kept + jnp.sum(weights, axis=1)


def _read_piece(
    query_ref: Any,
    *refs: Any,
    scale: float,
    groups: int,
    together: int,
    value_dim: int | None,
    window: int | None,
    page_size: int,
    size: int,
    piece: int,
    programs: int,
) -> None:
    """A program's blocks of a row, for some queries of one kv head.

    The one that the row's own token belongs to takes it as it comes, and stores it.
    """
    *given_refs, halves_ref, table_ref, end_ref, stored_ref, out_ref, mass_ref = refs
    part, number, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    num_blocks = -(-groups // together)
    head, first_head = part // num_blocks, part % num_blocks * together
    dim, width, num_arrays = query_ref.shape[-1], out_ref.shape[-1], len(given_refs)
    parts: list[Any] = [pl.ds(*one) for one in parts_of_key(dim, value_dim)]
    end = triton.load(end_ref.at[row])
    share = _share(end, number, window=window, size=size, piece=piece, programs=programs)

    @pl.when(~share.is_empty)
    def _() -> None:
        group = first_head + jnp.arange(max(_LEAST_GROUP, 1 << (together - 1).bit_length()))
        is_head = group < jnp.minimum(first_head + together, groups)
        heads = head * groups + group

        def of_heads(first: int, size: int) -> tuple[Any, Any]:
            place = heads[:, None], first + jnp.arange(size)[None, :]
            return place, jnp.broadcast_to(is_head[:, None], (group.size, size))

        query = []
        for one in parts:
            place, mask = of_heads(one.start, one.size)
            query.append(triton.load(query_ref.at[row, *place], mask=mask, other=0.0))
        own = [triton.load(ref.at[row, head, one]) for ref in given_refs for one in parts]
        own = list((finite_in_kernel if num_arrays == 2 else finite_parts)(*own))

        @pl.when(share.has_own)
        def _() -> None:
            half = num_arrays * triton.load(table_ref.at[row, share.own_block * size // page_size])
            is_kept = (half >= 0) & (half < halves_ref.shape[0])
            for skip, one in enumerate(own):
                where = parts[skip % len(parts)]
                place = half + skip // len(parts), share.cached % page_size, head, where
                mask = jnp.broadcast_to(is_kept, (where.size,))
                triton.store(stored_ref.at[place], one, mask=mask)

        def read(index: Any, sums: Any) -> Any:
            place = (index // piece * programs + number) * piece + index % piece
            half = num_arrays * triton.load(table_ref.at[row, place * size // page_size])
            tokens = pl.ds(0 if size == page_size else place * size % page_size, size)
            keys = [triton.load(halves_ref.at[half, tokens, head, one]) for one in parts]
            position = place * size + jnp.arange(size)
            is_seen = (position < share.cached) & (position >= share.first)
            # A block has a position that is seen, or the own token was there before.
            scores = jnp.where(is_seen[None, :], scores_of(query, keys, scale), -jnp.inf)
            if num_arrays == 1:
                return add_block(sums, scores, keys[0])
            return add_block(
                sums, scores, triton.load(halves_ref.at[half + 1, tokens, head, parts[0]])
            )

        nothing = jnp.zeros(group.shape, jnp.float32)
        score = nothing
        for of_query, of_key in zip(query, own[: len(parts)], strict=True):
            wide = of_key.astype(jnp.float32)[None, :] * of_query.astype(jnp.float32)
            score = score + jnp.sum(wide, axis=1)
        score = jnp.where(share.has_own, score * scale, nothing - jnp.inf)
        weight = jnp.where(share.has_own, nothing + 1.0, nothing)
        own_value = own[-1] if num_arrays == 2 else own[0]
        own_part = weight[:, None] * own_value.astype(jnp.float32)[None, :]
        start = own_part, score, weight
        out, most, total = jax.lax.fori_loop(share.lower, share.upper, read, start)
        place, mask = of_heads(0, width)
        triton.store(out_ref.at[row, number, *place], out / total[:, None], mask=mask)
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
