"""Attention of single tokens page by page: the cache is read once, where it lies.

It is the way of a GPU, whose step is a graph of fixed shapes: all pages of the cache's segments
are multiplied with the query of the row that owns them, and each row combines what its own gave.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from folojax import kv_cache
from folojax.gathered_attention import MASKED
from folojax.kv_cache import KVCache
from folojax.models.interface import PLAIN, Scoring
from folojax.state import DecodeInputs, SharedPages


class PagePlan(NamedTuple):
    """Where the tokens of a decode step go, and for every page who owns it and what is valid."""

    page: Int[Array, " B"]
    offset: Int[Array, " B"]
    page_table: Int[Array, "B N"]
    owner: Int[Array, " P"]  # first row of the page; B for a page that nobody reads
    age: Int[Array, "P S"]  # positions between a key and its owner's query; below 0: not valid
    partial: Int[Array, "B N"]  # where the row finds what its pages gave: P + X * Q of them
    shared: SharedPages | None
    shared_age: Int[Array, "X Q S"] | None


def plan_pages(inputs: DecodeInputs, cache: KVCache) -> PagePlan:
    """Turns the page tables inside out: a map from pages to rows."""
    page_size, num_pages = kv_cache.page_size(cache), kv_cache.num_pages(cache)
    rows, table_pages = inputs.page_table.shape
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, table_pages))
    column = jnp.broadcast_to(jnp.arange(table_pages)[None, :], (rows, table_pages))
    shared = inputs.shared
    is_first = True if shared is None else shared.lane < 0
    first_table = jnp.where(is_first, inputs.page_table, num_pages)
    owner = jnp.full(num_pages, rows).at[first_table].set(row, mode="drop")
    index = jnp.zeros(num_pages, jnp.int32).at[first_table].set(column, mode="drop")
    last_position = jnp.append(inputs.position, -1)
    key_position = index[:, None] * page_size + jnp.arange(page_size)[None, :]
    page, offset = kv_cache.places(cache, inputs.page_table, inputs.position)
    partial, shared_age = inputs.page_table, None
    if shared is not None:
        partial = jnp.where(is_first, partial, num_pages + shared.lane)
        shared_position = key_position.at[shared.page].get(mode="clip")
        shared_age = last_position[shared.owner][:, :, None] - shared_position[:, None, :]
    return PagePlan(
        page=page,
        offset=offset,
        page_table=inputs.page_table,
        owner=owner,
        age=last_position[owner][:, None] - key_position,
        partial=partial,
        shared=shared,
        shared_age=shared_age,
    )


def attend_pages(
    plan: PagePlan,
    cache: KVCache,
    layer: int,
    query: Float[Array, "B H D"],
    key: Float[Array, "B K D"],
    value: Float[Array, "B K D"],
    scoring: Scoring = PLAIN,
) -> tuple[KVCache, Float[Array, "B H D"]]:
    """Paged attention with the pages as the batch axis: the cache is read once, where it lies.

    Every page takes the query of the row that owns it and gives a partial maximum, sum and value
    (1/S of the cache's data); a row then combines its pages' partials through its table, in their
    order. So a row's result depends neither on its neighbours nor on which pages it was given.
    Pages with several owners are copied out and read once more for every Q further ones.
    """
    cache = kv_cache.write(cache, layer, plan.page, plan.offset, key, value)
    # In the dtype of the cache, which is all of the data: to convert it would cost as much again.
    query, dtype = query.astype(kv_cache.dtype(cache)), query.dtype
    rows, heads, dim = query.shape
    segments = kv_cache.layer_segments(cache, layer, query.dtype)
    num_pages = plan.owner.shape[0]

    page_query = query[jnp.minimum(plan.owner, rows - 1)].reshape(num_pages, 1, heads, dim)
    partials = _attend_pages(page_query, plan.age[:, None, :], segments, scoring)
    if plan.shared is not None:
        assert plan.shared_age is not None
        lane_query = query[jnp.minimum(plan.shared.owner, rows - 1)]
        copied = kv_cache.gather_pages(cache, layer, plan.shared.page, query.dtype)
        lanes = _attend_pages(lane_query, plan.shared_age, [copied], scoring)
        partials = _Partials(*map(jnp.concatenate, zip(partials, lanes, strict=True)))

    # [B, N] pages a row. Gathers: sums by scatter would be atomic on a GPU, in any order and slow.
    is_page = (plan.page_table < num_pages)[:, :, None, None]
    row_max = jnp.where(is_page, partials.maximum.at[plan.partial].get(mode="clip"), MASKED)
    scale = jnp.exp(row_max - row_max.max(axis=1, keepdims=True)) * is_page
    total = (scale * partials.total.at[plan.partial].get(mode="clip")).sum(axis=1)
    out = (scale[..., None] * partials.value.at[plan.partial].get(mode="clip")).sum(axis=1)
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return cache, out.reshape(rows, heads, dim).astype(dtype)


class _Partials(NamedTuple):
    """What pages give their owners; W = pages x owners of each."""

    maximum: Float[Array, "W K G"]
    total: Float[Array, "W K G"]
    value: Float[Array, "W K G D"]


def _attend_pages(
    query: Float[Array, "P Q H D"],
    age: Int[Array, "P Q S"],
    arrays: list[tuple[Float[Array, "_ K _ _"], Float[Array, "_ K _ _"]]],
    scoring: Scoring,
) -> _Partials:
    """Softmax parts of Q queries of every page over the tokens of that page."""
    pages, owners, heads, dim = query.shape
    kv_heads, size = arrays[0][0].shape[1], age.shape[-1]
    groups = heads // kv_heads
    flat = query.reshape(pages, owners, kv_heads, groups, dim).transpose(0, 2, 1, 3, 4)
    flat = flat.reshape(pages * kv_heads, owners * groups, dim)
    score = _by_segment(flat, [keys for keys, _ in arrays])
    score = scoring.scores(score, dim).reshape(pages, kv_heads, owners, groups, size)
    is_valid = scoring.is_visible(age)[:, None, :, None, :]
    score = jnp.where(is_valid, score, MASKED)
    maximum = score.max(axis=-1)
    # Of a page without any valid token all weights are 1; its maximum makes it nothing to the row.
    weight = jnp.exp(score - maximum[..., None])
    flat_weight = weight.astype(query.dtype).reshape(pages * kv_heads, owners * groups, size)
    value = _by_segment(flat_weight, [values for _, values in arrays])
    value = value.reshape(pages, kv_heads, owners, groups, dim)

    def by_owner(x: Array) -> Array:
        return jnp.moveaxis(x, 2, 1).reshape(pages * owners, kv_heads, groups, *x.shape[4:])

    return _Partials(by_owner(maximum), by_owner(weight.sum(axis=-1)), by_owner(value))


def _by_segment(
    flat: Float[Array, "PK G A"], arrays: list[Float[Array, "_ K A Z"]]
) -> Float[Array, "PK G Z"]:
    """A product with the pages of all segments, without joining them first."""
    out, first = [], 0
    for array in arrays:
        batch = array.shape[0] * array.shape[1]
        pages = array.reshape(batch, *array.shape[2:])
        rows = flat[first : first + batch]
        out.append(jnp.einsum("nga,naz->ngz", rows, pages, preferred_element_type=jnp.float32))
        first += batch
    return jnp.concatenate(out)
