"""Attention of single tokens row by row: every row reads its own pages, one after the other.

The softmax is a running one, so nothing is kept of a page but what it adds. How many pages are
read is known when the step runs, not when it is compiled: one program serves all lengths, and what
a row gets does not depend on how long the others are. A page that several rows share is read by
each of them, one right after the other: out of a processor's cache.

It is the way of CPUs where `native_attention` is not to be had, and on every platform that of
deterministic mode, with a product of its own.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from folojax import kv_cache
from folojax.gathered_attention import MASKED
from folojax.kv_cache import KVCache
from folojax.models.interface import PLAIN, Scoring
from folojax.models.row_sums import sum_products
from folojax.state import DecodeInputs

PageProduct: TypeAlias = Callable[
    [Float[Array, "BK G A"], Float[Array, "BK A Z"]], Float[Array, "BK G Z"]
]
"""Of G rows for every row of the batch and head, with what lies in its page; float32."""

# Rows that read as many pages as the longest of them. Fewer would wait less for one another, and
# more often for a second thread.
_BLOCK = 8


class RowPlan(NamedTuple):
    """Where the tokens of a step go, and what they see."""

    page: Int[Array, " B"]
    offset: Int[Array, " B"]
    page_table: Int[Array, "B N"]
    position: Int[Array, " B"]
    num_pages: Int[Array, " B"]  # that hold what a row sees; 0 for a row of padding


class _Sums(NamedTuple):
    """The softmax over the pages so far."""

    maximum: Float[Array, "B K G"]
    total: Float[Array, "B K G"]
    value: Float[Array, "B K G D"]


def plan_rows(inputs: DecodeInputs, cache: KVCache) -> RowPlan:
    """Finds the page of every token; `inputs.shared` is not read."""
    table, position = inputs.page_table, inputs.position
    page, offset = kv_cache.places(cache, table, position)
    num_pages = jnp.minimum(position // kv_cache.page_size(cache) + 1, table.shape[1])
    is_row = table[:, 0] < kv_cache.num_pages(cache)
    return RowPlan(page, offset, table, position, jnp.where(is_row, num_pages, 0))


def attend_rows(
    plan: RowPlan,
    cache: KVCache,
    layer: int,
    query: Float[Array, "B H D"],
    key: Float[Array, "B K D"],
    value: Float[Array, "B K D"],
    scoring: Scoring = PLAIN,
) -> tuple[KVCache, Float[Array, "B H D"]]:
    """Attention of rows to their pages, in the dtype of the cache.

    It is fastest where rows of similar lengths are next to each other: all rows read as many pages
    as the shortest one has, and then some at a time what is left.
    """
    cache = kv_cache.write(cache, layer, plan.page, plan.offset, key, value)
    grouped = _by_group(query, key).astype(kv_cache.dtype(cache))

    def read(plan: RowPlan, grouped: Array, sums: _Sums, first: Array | int) -> _Sums:
        return _read(plan, cache, layer, grouped, sums, first, scoring, _sum)

    rows, sums = query.shape[0], _nothing(grouped)
    if rows <= _BLOCK:
        return cache, _finish(read(plan, grouped, sums, 0), query)
    pages = plan.num_pages
    shortest = jnp.min(jnp.where(pages > 0, pages, jnp.iinfo(pages.dtype).max))
    together = plan._replace(num_pages=jnp.minimum(pages, shortest))
    common = read(together, grouped, sums, 0)

    def read_rest(index: Int[Array, ""], sums: _Sums) -> _Sums:
        start = jnp.minimum(index * _BLOCK, rows - _BLOCK)  # the last ones may be read twice

        def some(leaf: Array) -> Array:
            return lax.dynamic_slice_in_dim(leaf, start, _BLOCK)

        part = read(jax.tree.map(some, plan), some(grouped), jax.tree.map(some, common), shortest)
        return jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new, start, 0), sums, part
        )

    return cache, _finish(lax.fori_loop(0, -(-rows // _BLOCK), read_rest, common), query)


def attend_rows_alike(
    plan: RowPlan,
    cache: KVCache,
    layer: int,
    query: Float[Array, "B H D"],
    key: Float[Array, "B K D"],
    value: Float[Array, "B K D"],
    scoring: Scoring = PLAIN,
) -> tuple[KVCache, Float[Array, "B H D"]]:
    """The same in products of one shape, rounded alike for every row and whatever the batch.

    In the dtype of the queries. Pages behind a row's last one leave its sums as they are (exp(0) =
    1, and a weight of 0), so the longest row may decide how many are looked at.
    """
    cache = kv_cache.write(cache, layer, plan.page, plan.offset, key, value)
    grouped = _by_group(query, key)
    sums = _read(plan, cache, layer, grouped, _nothing(grouped), 0, scoring, _multiply_alone)
    return cache, _finish(sums, query)


def _by_group(query: Float[Array, "B H D"], key: Float[Array, "B K D"]) -> Array:
    rows, heads, dim = query.shape
    return query.reshape(rows, key.shape[1], heads // key.shape[1], dim)


def _nothing(grouped: Float[Array, "B K G D"]) -> _Sums:
    shape = grouped.shape[:-1]
    return _Sums(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(grouped.shape))


def _finish(sums: _Sums, query: Float[Array, "B H D"]) -> Float[Array, "B H D"]:
    # Rows of padding may see nothing but stale pages: whatever they give is dropped.
    total = jnp.maximum(sums.total, jnp.finfo(jnp.float32).tiny)
    return (sums.value / total[..., None]).reshape(query.shape).astype(query.dtype)


def _read(
    plan: RowPlan,
    cache: KVCache,
    layer: int,
    grouped: Float[Array, "B K G D"],
    sums: _Sums,
    first: Int[Array, ""] | int,
    scoring: Scoring,
    product: PageProduct,
) -> _Sums:
    """Adds to the sums what the pages from the `first` one of each row on give, up to the most."""
    rows, kv_heads, groups, dim = grouped.shape
    size = kv_cache.page_size(cache)
    flat = grouped.reshape(rows * kv_heads, groups, dim)

    def read_page(index: Int[Array, ""], sums: _Sums) -> _Sums:
        page = lax.dynamic_index_in_dim(plan.page_table, index, axis=1, keepdims=False)
        keys, values = kv_cache.gather_pages(cache, layer, page, grouped.dtype)
        scores = product(flat, keys.reshape(rows * kv_heads, dim, size))
        scores = scoring.scores(scores.reshape(rows, kv_heads, groups, size), dim)
        age = plan.position[:, None] - (index * size + jnp.arange(size)[None, :])
        visible = scoring.is_visible(age)[:, None, None, :]
        maximum = jnp.maximum(sums.maximum, jnp.where(visible, scores, MASKED).max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - maximum[..., None]), 0.0)
        kept = jnp.exp(sums.maximum - maximum)
        flat_weights = weights.astype(grouped.dtype).reshape(rows * kv_heads, groups, size)
        part = product(flat_weights, values.reshape(rows * kv_heads, size, dim))
        return _Sums(
            maximum,
            kept * sums.total + weights.sum(axis=-1),
            kept[..., None] * sums.value + part.reshape(rows, kv_heads, groups, dim),
        )

    return lax.fori_loop(first, jnp.max(plan.num_pages), read_page, sums)


def _sum(rows: Float[Array, "BK G A"], pages: Float[Array, "BK A Z"]) -> Float[Array, "BK G Z"]:
    """In a loop over the page, which on CPU is not even copied."""
    return sum_products(rows, pages.swapaxes(-1, -2))


def _multiply_alone(
    rows: Float[Array, "BK G A"], pages: Float[Array, "BK A Z"]
) -> Float[Array, "BK G Z"]:
    """A product that is fused with nothing: what precedes or follows would change its rounding."""
    pages = lax.optimization_barrier(pages)
    out = jnp.einsum("nga,naz->ngz", rows, pages, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(out)
