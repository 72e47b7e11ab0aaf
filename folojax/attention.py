"""Attention over pages: `attend_chunks` for prompt chunks, `attend_tokens` for single tokens.

Both have the shape that the models ask for (`folojax.models.interface.Attend`) once their plan is
bound: they store the new keys and values, then attend to everything that is cached, so a chunk
sees its own tokens by the same path as earlier ones. The plans hold what is the same for every
layer and are computed once a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from folojax import kv_cache
from folojax.kv_cache import KVCache
from folojax.state import DecodeInputs, PrefillInputs

# Finite, so that a row without any valid key (padding) gives numbers and not NaN.
MASKED = -1e30


class ChunkPlan(NamedTuple):
    """Where the tokens of a prefill step go and what they see."""

    page: Int[Array, " T"]  # T = R * C, row by row
    offset: Int[Array, " T"]
    page_table: Int[Array, "R N"]
    query_position: Int[Array, "R C"]


class TokenPlan(NamedTuple):
    """Where the tokens of a decode step go, and for every page who owns it and what is valid."""

    page: Int[Array, " B"]
    offset: Int[Array, " B"]
    page_ids: Int[Array, " W"]
    page_rows: Int[Array, " W"]
    owner: Int[Array, " P"]  # row of the page; B for a page that nobody reads
    is_valid: Bool[Array, "P S"]


def plan_chunks(inputs: PrefillInputs, cache: KVCache) -> ChunkPlan:
    """Finds the page and offset of every token; padding tokens go to the page out of range."""
    page_size, num_pages = kv_cache.page_size(cache), kv_cache.num_pages(cache)
    column = jnp.arange(inputs.tokens.shape[1])[None, :]
    position = inputs.start[:, None] + column
    table_index = jnp.minimum(position // page_size, inputs.page_table.shape[1] - 1)
    page = jnp.take_along_axis(inputs.page_table, table_index, axis=1)
    page = jnp.where(column < inputs.length[:, None], page, num_pages)
    return ChunkPlan(
        page=page.reshape(-1),
        offset=(position % page_size).reshape(-1),
        page_table=inputs.page_table,
        query_position=position,
    )


def plan_tokens(inputs: DecodeInputs, cache: KVCache) -> TokenPlan:
    """Turns the list of work items into a map from pages to rows."""
    page_size, num_pages = kv_cache.page_size(cache), kv_cache.num_pages(cache)
    num_rows = inputs.slot.shape[0]
    owner = jnp.full(num_pages, num_rows).at[inputs.page_ids].set(inputs.page_rows, mode="drop")
    index = jnp.zeros(num_pages, jnp.int32).at[inputs.page_ids].set(inputs.page_index, mode="drop")
    position = jnp.append(inputs.position, -1)[owner]
    key_position = index[:, None] * page_size + jnp.arange(page_size)[None, :]
    # The new token's page is the row's last work item, found without a search.
    is_last = inputs.page_index == jnp.append(inputs.position, -1)[inputs.page_rows] // page_size
    row = jnp.where(is_last, inputs.page_rows, num_rows)
    return TokenPlan(
        page=jnp.full(num_rows, num_pages).at[row].set(inputs.page_ids, mode="drop"),
        offset=inputs.position % page_size,
        page_ids=inputs.page_ids,
        page_rows=inputs.page_rows,
        owner=owner,
        is_valid=key_position <= position[:, None],
    )


def attend_chunks(
    plan: ChunkPlan,
    cache: KVCache,
    layer: int,
    query: Float[Array, "T H D"],
    key: Float[Array, "T K D"],
    value: Float[Array, "T K D"],
) -> tuple[KVCache, Float[Array, "T H D"]]:
    """Causal attention of every row's tokens to its request's pages, softmax in float32."""
    cache = kv_cache.write(cache, layer, plan.page, plan.offset, key, value)
    keys, values = kv_cache.gather_pages(cache, layer, plan.page_table, query.dtype)
    rows, pages, kv_heads, dim, size = keys.shape
    columns, groups = plan.query_position.shape[1], query.shape[1] // kv_heads
    # Batch axes flattened to one, queries of a group stacked: plain batched products, which is
    # what XLA's CPU backend runs fastest (and in bfloat16 runs at all).
    query = query.reshape(rows, columns, kv_heads, groups, dim).transpose(0, 2, 1, 3, 4)
    query = query.reshape(rows * kv_heads, columns * groups, dim)
    keys = keys.transpose(0, 2, 3, 1, 4).reshape(rows * kv_heads, dim, pages * size)
    values = values.transpose(0, 2, 1, 3, 4).reshape(rows * kv_heads, pages * size, dim)
    scores = jnp.einsum("nqd,nds->nqs", query, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, kv_heads, columns, groups, pages * size) * dim**-0.5
    visible = jnp.arange(pages * size)[None, None, :] <= plan.query_position[:, :, None]
    scores = jnp.where(visible[:, None, :, None, :], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    weights = weights.reshape(rows * kv_heads, columns * groups, pages * size)
    out = jnp.einsum("nqs,nsd->nqd", weights, values, preferred_element_type=jnp.float32)
    out = out.reshape(rows, kv_heads, columns, groups, dim).transpose(0, 2, 1, 3, 4)
    return cache, out.reshape(rows * columns, kv_heads * groups, dim).astype(query.dtype)


def attend_tokens(
    plan: TokenPlan,
    cache: KVCache,
    layer: int,
    query: Float[Array, "B H D"],
    key: Float[Array, "B K D"],
    value: Float[Array, "B K D"],
) -> tuple[KVCache, Float[Array, "B H D"]]:
    """Paged attention with the pages as the batch axis: the cache is read once, where it lies.

    Every page takes the query of the row that owns it. Scores are shifted by the row's maximum,
    pages give partial sums, and these are added up in the order of the row's own pages: a row's
    result depends neither on its neighbours nor on which pages it was given.
    """
    cache = kv_cache.write(cache, layer, plan.page, plan.offset, key, value)
    rows, heads, dim = query.shape
    segments = kv_cache.layer_segments(cache, layer, query.dtype)
    kv_heads, size = segments[0][0].shape[1], segments[0][0].shape[3]
    groups = heads // kv_heads
    num_pages = plan.owner.shape[0]

    owner_query = query[jnp.minimum(plan.owner, rows - 1)].reshape(
        num_pages * kv_heads, groups, dim
    )
    score = _paged_product("ngd,nds->ngs", owner_query, [keys for keys, _ in segments])
    score = score.reshape(num_pages, kv_heads, groups, size) * dim**-0.5
    score = jnp.where(plan.is_valid[:, None, None, :], score, MASKED)

    page_max = score.max(axis=-1)
    row_max = jax.ops.segment_max(page_max, plan.owner, num_segments=rows + 1)
    weight = jnp.exp(score - row_max[plan.owner][..., None])
    weight = jnp.where(plan.is_valid[:, None, None, :], weight, 0.0)

    page_weight = weight.astype(query.dtype).reshape(num_pages * kv_heads, groups, size)
    partial = _paged_product("ngs,nsd->ngd", page_weight, [values for _, values in segments])
    partial = partial.reshape(num_pages, kv_heads, groups, dim)

    def sum_rows(x: Array) -> Array:
        in_row_order = x.at[plan.page_ids].get(mode="clip")
        return jax.ops.segment_sum(
            in_row_order, plan.page_rows, num_segments=rows + 1, indices_are_sorted=True
        )[:rows]

    total = sum_rows(weight.sum(axis=-1))
    out = sum_rows(partial) / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return cache, out.reshape(rows, heads, dim).astype(query.dtype)


def _paged_product(
    product: str, flat: Float[Array, "PK G A"], arrays: list[Float[Array, "_ K A Z"]]
) -> Float[Array, "PK G Z"]:
    """A batched product with the pages of all segments, without joining them first."""
    out, first = [], 0
    for array in arrays:
        batch = array.shape[0] * array.shape[1]
        pages = array.reshape(batch, *array.shape[2:])
        operand = flat[first : first + batch]
        out.append(jnp.einsum(product, operand, pages, preferred_element_type=jnp.float32))
        first += batch
    return jnp.concatenate(out)
