"""Attention over pages: `attend_chunks` for prompt chunks, `attend_tokens` for single tokens.

Both have the shape that the models ask for (`folojax.models.interface.Attend`) once their plan is
bound: they store the new keys and values, then attend to everything that is cached, so a chunk
sees its own tokens by the same path as earlier ones. The plans hold what is the same for every
layer and are computed once a step.

    both          ──> native_attention        on CPU, in C++, where that can be compiled
    attend_chunks ──> gathered_attention      products, or a GPU's fused kernel
    attend_tokens ──┬> row_attention          on CPU: a loop over each row's pages
                    └> page_attention         elsewhere: all pages at once
"""

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from folojax import kv_cache
from folojax.gathered_attention import attend_gathered
from folojax.kv_cache import KVCache
from folojax.models.interface import PLAIN, Scoring
from folojax.models.platforms import platform
from folojax.native_attention import attend_natively, is_native
from folojax.page_attention import PagePlan, attend_pages, plan_pages
from folojax.row_attention import RowPlan, attend_rows, plan_rows
from folojax.state import DecodeInputs, PrefillInputs

TokenPlan: TypeAlias = RowPlan | PagePlan


class ChunkPlan(NamedTuple):
    """Where the tokens of a prefill step go and what they see."""

    page: Int[Array, " T"]  # T = R * C, row by row
    offset: Int[Array, " T"]
    page_table: Int[Array, "R N"]
    query_position: Int[Array, "R C"]
    end: Int[Array, " R"]  # positions of the row that have keys, this chunk's included


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
        end=inputs.start + inputs.length,
    )


def plan_tokens(inputs: DecodeInputs, cache: KVCache) -> TokenPlan:
    """Finds the page and offset of every token, and what the platform's way needs beside them."""
    return plan_rows(inputs, cache) if platform() == "cpu" else plan_pages(inputs, cache)


def attend_chunks(
    plan: ChunkPlan,
    cache: KVCache,
    layer: int,
    query: Float[Array, "T H D"],
    key: Float[Array, "T K D"],
    value: Float[Array, "T K D"],
    scoring: Scoring = PLAIN,
) -> tuple[KVCache, Float[Array, "T H D"]]:
    """Causal attention of every row's tokens to its request's pages, softmax in float32."""
    cache = kv_cache.write(cache, layer, plan.page, plan.offset, key, value)
    rows, columns = plan.query_position.shape
    query = query.reshape(rows, columns, *query.shape[1:])
    if is_native(cache, scoring):
        first = plan.query_position[:, 0]
        length = plan.end - first
        out = attend_natively(query, cache, layer, plan.page_table, first, length, scoring)
    else:
        keys, values = kv_cache.gather_pages(cache, layer, plan.page_table, query.dtype)
        out = attend_gathered(query, keys, values, plan.query_position, plan.end, scoring)
    return cache, out.reshape(rows * columns, *out.shape[2:])


def attend_tokens(
    plan: TokenPlan,
    cache: KVCache,
    layer: int,
    query: Float[Array, "B H D"],
    key: Float[Array, "B K D"],
    value: Float[Array, "B K D"],
    scoring: Scoring = PLAIN,
) -> tuple[KVCache, Float[Array, "B H D"]]:
    """Attention of one token of every row to its request's pages, in the way of the plan."""
    if isinstance(plan, PagePlan):
        return attend_pages(plan, cache, layer, query, key, value, scoring)
    if not is_native(cache, scoring):
        return attend_rows(plan, cache, layer, query, key, value, scoring)
    cache = kv_cache.write(cache, layer, plan.page, plan.offset, key, value)
    length = (plan.num_pages > 0).astype(plan.position.dtype)
    table, position = plan.page_table, plan.position
    out = attend_natively(query[:, None], cache, layer, table, position, length, scoring)
    return cache, out[:, 0]
