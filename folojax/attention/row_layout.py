"""The tokens of a prompt call as rows for cuDNN, and what its two calls give as tokens again.

A kernel each on NVIDIA GPUs, where XLA makes a scatter, three gathers, two masks, two
transpositions, a sum and one more gather. Elsewhere the same is computed as XLA does it; both round
once, at the end.

Axes: T tokens, R rows of at most C of them, H query heads, K kv heads, D head dimension, N = H * D
or K * D, numbers of a token.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from folojax.kv.cache import finite_values, write
from folojax.kv.placement import Placement
from folojax.models.core.row_kernels import is_taken, kernel_or, most_together
from folojax.models.machine.triton import triton

_MOST_TOKENS, _MOST_NUMBERS = 16, 1024  # of a row, and of a token, that a program lays out
_MOST_HEADS = 16  # of a token that a program joins


class Part(NamedTuple):
    """Attention of rows to some of the keys that they see."""

    out: Float[Array, "R C H D"]
    mass: Float[Array, "R H C"]  # logarithms of the sums of weights


def lay_out(
    query: Float[Array, "T H D"],
    key: Float[Array, "T K D"],
    value: Float[Array, "T K D"],
    pages: Num[Array, "P 2 S K D"],
    placement: Placement,
) -> tuple[
    Num[Array, "P 2 S K D"],
    Float[Array, "R C H D"],
    Float[Array, "R C K D"],
    Float[Array, "R C K D"],
]:
    """Stores tokens in their pages (`folojax.kv.cache.write`), and lays them out by row.

    Returns:
        The pages; queries, keys and values by row, with anything finite for padding. Values are
        finite (`finite_values`).
    """
    call = _lay_out_plain
    if placement.place is not None and is_taken(query.dtype, query.shape[-1]):
        call = kernel_or(_lay_out_in_one, _lay_out_plain)
    return call(query, key, value, pages, placement)


def join(own: Part, before: Part, placement: Placement, window: int | None) -> Any:
    """Attention to a chunk's own tokens and to those before it, as one.

    Args:
        own: Padding holds anything.
        before: Of rows with nothing before them, too.
        placement: Of the rows.
        window: Of the layer; one of a single token sees nothing before the chunk.

    Returns:
        [T, H, D], the result for each token; zeros for padding.
    """
    plain = functools.partial(_join_plain, window=window)
    if not is_taken(own.out.dtype, own.out.shape[-1]):
        return plain(own, before, placement)
    return kernel_or(functools.partial(_join_in_one, window=window), plain)(own, before, placement)


def _lay_out_plain(
    query: Array, key: Array, value: Array, pages: Array, placement: Placement
) -> Any:
    pages = write(pages, placement.page, placement.offset, key, value, "tokens")
    queries, keys, values = (placement.by_row(one) for one in (query, key, value))
    # Later tokens are masked by a weight of zero, which hides no NaN.
    return pages, queries, *finite_values(keys, values)


def _join_plain(own: Part, before: Part, placement: Placement, window: int | None) -> Any:
    # [R, H, C] to [R, C, H, 1]
    own_mass, mass = (one.mass.swapaxes(1, 2)[..., None] for one in (own, before))
    is_behind = (placement.first > 0) & (window != 1)
    mass = jnp.where(is_behind[:, None, None, None], mass, -jnp.inf)
    most = jnp.maximum(own_mass, mass)
    own_weight, weight = jnp.exp(own_mass - most), jnp.exp(mass - most)
    # Of no pages there is no result, of padding neither; 0 times whatever stands there may be NaN.
    behind = jnp.where(weight > 0, before.out.astype(jnp.float32), 0.0)
    out = own.out.astype(jnp.float32) * own_weight + behind * weight
    out = out / (own_weight + weight)
    is_real = jnp.arange(out.shape[1])[None, :] < placement.length[:, None]
    out = jnp.where(is_real[:, :, None, None], out, 0.0)
    return placement.by_token(out.astype(own.out.dtype))


def _lay_out_in_one(
    query: Array, key: Array, value: Array, pages: Array, placement: Placement
) -> Any:
    assert placement.place is not None, "tokens lie one behind the other"
    rows, columns = placement.place.shape
    size, _, dim = pages.shape[2:]
    flat = [one.reshape(one.shape[0], -1) for one in (query, key, value)]
    # Keys and values of a page follow each other.
    halves = pages.reshape(-1, size, flat[1].shape[1])
    most = [min(_MOST_NUMBERS, 1 << (one.shape[1] - 1).bit_length()) for one in flat]
    blocks = [pl.cdiv(one.shape[1], block) for one, block in zip(flat, most, strict=True)]
    tokens = most_together(_MOST_TOKENS, columns)
    stored, *by_row = pl.pallas_call(
        functools.partial(_lay_out_kernel, tokens=tokens, most=most, query_blocks=blocks[0]),
        grid=(rows, columns // tokens, blocks[0] + blocks[1]),
        out_shape=[
            jax.ShapeDtypeStruct(halves.shape, halves.dtype),
            *(jax.ShapeDtypeStruct((rows, columns, one.shape[1]), query.dtype) for one in flat),
        ],
        input_output_aliases={3: 0},
        compiler_params=triton.CompilerParams(num_warps=4),
        name="lay_out_rows",
    )(
        *flat,
        halves,
        placement.place[:, 0],
        placement.first,
        placement.length,
        placement.page_table.astype(jnp.int32),
    )
    return stored.reshape(pages.shape), *(one.reshape(rows, columns, -1, dim) for one in by_row)


def _lay_out_kernel(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    old_ref: Any,
    begin_ref: Any,
    first_ref: Any,
    length_ref: Any,
    table_ref: Any,
    halves_ref: Any,
    *out_refs: Any,
    tokens: int,
    most: list[int],
    query_blocks: int,
) -> None:
    """Some numbers of some tokens of a row: of queries, or of keys and values."""
    del old_ref  # the same memory as that of the halves
    row, part, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    column = part * tokens + jnp.arange(tokens)
    is_real = column < triton.load(length_ref.at[row])
    token = jnp.minimum(triton.load(begin_ref.at[row]) + column, query_ref.shape[0] - 1)

    def load(ref: Any, number: Any) -> Any:
        mask = is_real[:, None] & (number < ref.shape[1])[None, :]
        return triton.load(ref.at[token[:, None], number[None, :]], mask=mask, other=0.0)

    def store(ref: Any, number: Any, given: Any) -> None:
        mask = jnp.broadcast_to((number < ref.shape[2])[None, :], given.shape)
        triton.store(ref.at[row, column[:, None], number[None, :]], given, mask=mask)

    @pl.when(block < query_blocks)
    def _() -> None:
        number = block * most[0] + jnp.arange(most[0])
        store(out_refs[0], number, load(query_ref, number))

    @pl.when(block >= query_blocks)
    def _() -> None:
        num_halves, size, width = halves_ref.shape
        number = (block - query_blocks) * most[1] + jnp.arange(most[1])
        position = triton.load(first_ref.at[row]) + column
        place = jnp.minimum(position // size, table_ref.shape[1] - 1)
        half = 2 * triton.load(table_ref.at[row, place], mask=is_real, other=num_halves // 2)
        is_kept = (half >= 0) & (half < num_halves)
        mask = is_kept[:, None] & (number < width)[None, :]
        pair = finite_in_kernel(load(key_ref, number), load(value_ref, number))
        for skip, one in enumerate(pair):
            where = (half + skip)[:, None], (position % size)[:, None], number[None, :]
            triton.store(halves_ref.at[where], one, mask=mask)
            store(out_refs[1 + skip], number, one)


def finite_in_kernel(key: Any, value: Any) -> tuple[Any, Any]:
    """As `finite_values`, in a kernel: NaN and infinity alone are not zero times zero."""
    is_finite = value.astype(jnp.float32) * 0.0 == 0.0
    key = jnp.where(is_finite, key.astype(jnp.float32), jnp.nan).astype(key.dtype)
    return key, jnp.where(is_finite, value.astype(jnp.float32), 0.0).astype(value.dtype)


def finite_parts(value: Any, rest: Any) -> tuple[Any, Any]:
    """As `finite_latents`, in a kernel, of one token's key in two parts."""
    is_finite = value.astype(jnp.float32) * 0.0 == 0.0
    is_whole = jnp.min(jnp.where(is_finite, 1.0, 0.0)) > 0.5
    rest = jnp.where(is_whole, rest.astype(jnp.float32), jnp.nan).astype(rest.dtype)
    return jnp.where(is_finite, value.astype(jnp.float32), 0.0).astype(value.dtype), rest


def _join_in_one(own: Part, before: Part, placement: Placement, window: int | None) -> Any:
    heads, dim = own.out.shape[2:]
    num_tokens = placement.page.shape[0]
    together = most_together(_MOST_HEADS, heads)
    kernel = functools.partial(_join_kernel, together=together, window=window)
    sources = () if placement.source is None else (placement.source.astype(jnp.int32),)
    return pl.pallas_call(
        kernel,
        grid=(num_tokens, heads // together),
        out_shape=jax.ShapeDtypeStruct((num_tokens, heads, dim), own.out.dtype),
        compiler_params=triton.CompilerParams(num_warps=4),
        name="join_parts",
    )(*own, *before, placement.first, placement.length, *sources)


def _join_kernel(
    own_ref: Any,
    own_mass_ref: Any,
    before_ref: Any,
    mass_ref: Any,
    first_ref: Any,
    length_ref: Any,
    *source_and_out_refs: Any,
    together: int,
    window: int | None,
) -> None:
    """Some heads of one token."""
    *source_ref, out_ref = source_and_out_refs
    token, columns, dim = pl.program_id(0), own_ref.shape[1], own_ref.shape[-1]
    source = triton.load(source_ref[0].at[token]) if source_ref else token
    row, column = source // columns, source % columns
    heads, whole = pl.ds(pl.program_id(1) * together, together), pl.ds(0, dim)
    is_behind = (triton.load(first_ref.at[row]) > 0) & (window != 1)
    is_real = column < triton.load(length_ref.at[row])

    def load(ref: Any, mass_ref: Any, is_there: Any) -> tuple[Any, Any]:
        mask = jnp.broadcast_to(is_there, (together,))
        masses = triton.load(mass_ref.at[row, heads, column], mask=mask, other=-jnp.inf)
        mask = jnp.broadcast_to(is_there, (together, dim))
        out = triton.load(ref.at[row, column, heads, whole], mask=mask, other=0.0)
        return out.astype(jnp.float32), masses[:, None]

    out, own_mass = load(own_ref, own_mass_ref, is_real)
    behind, mass = load(before_ref, mass_ref, is_real & is_behind)
    most = jnp.maximum(own_mass, mass)
    own_weight, weight = jnp.exp(own_mass - most), jnp.exp(mass - most)
    behind = jnp.where(weight > 0, behind, 0.0)
    joined = (out * own_weight + behind * weight) / (own_weight + weight)
    joined = jnp.where(is_real, joined, 0.0).astype(out_ref.dtype)
    triton.store(out_ref.at[token, heads, whole], joined)
