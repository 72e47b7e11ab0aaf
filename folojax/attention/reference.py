"""Attention to pages in plain XLA: the contract of every kernel, and the way where none fits.

All rows go through their pages together, some pages at a time, with a running softmax in float32:
memory does not grow with the lengths, and how far the loop runs is known when the step runs, not
when it is compiled. Pages behind a row's last one leave its sums as they are (exp(0) = 1, and a
weight of 0), so what a row gets does not depend on how long the others are.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from folojax.attention.interface import AttentionSpec
from folojax.kv.cache import write
from folojax.kv.placement import Placement
from folojax.models.machine.row_sums import MOST_AT_ONCE, sum_products

# Finite, so that a row without any valid key (padding) gives numbers and not NaN.
MASKED = -1e30

_BLOCK_TOKENS = 128
"""Tokens that a round of the loop reads of each row, or a page if that is more."""

Product: TypeAlias = Callable[
    [Float[Array, "RK Q A"], Float[Array, "RK A Z"]], Float[Array, "RK Q Z"]
]
"""Of Q queries for every row and head, with what lies in its pages; float32."""


class _Sums(NamedTuple):
    """The softmax over the pages so far; Q = G * C queries of a row and head."""

    maximum: Float[Array, "RK Q"]
    total: Float[Array, "RK Q"]
    value: Float[Array, "RK Q V"]


class _Reference:
    """The kernel; see `folojax.attention.interface.Kernel`."""

    def __init__(self, is_alike: bool) -> None:
        """`is_alike`: a page a round, in products of one shape, rounded alike in any batch."""
        self._is_alike = is_alike

    def refusal(self, spec: AttentionSpec) -> str | None:
        """It takes everything."""
        del spec
        return None

    def attend(
        self,
        query: Float[Array, "T H D"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T K D"] | None,
        pages: Num[Array, "P N _ _ D"],
        placement: Placement,
        spec: AttentionSpec,
        sinks: Float[Array, " H"] | None = None,
    ) -> tuple[Num[Array, "P N _ _ D"], Float[Array, "T H V"]]:
        """As `Kernel.attend`, computed in the dtype of the pages, or of the queries if alike."""
        order, width = spec.page_format.order, spec.value_dim
        given = width if value is None else value
        pages = write(pages, placement.page, placement.offset, key, given, order)
        queries = placement.by_row(query)
        rows, columns, heads, dim = queries.shape
        kv_heads, size = key.shape[1], spec.page_format.page_size
        groups = heads // kv_heads
        dtype = query.dtype if self._is_alike else pages.dtype
        grouped = queries.astype(dtype).reshape(rows, columns, kv_heads, groups, dim)
        grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(rows * kv_heads, groups * columns, dim)
        product = _product(grouped, spec, self._is_alike)
        is_by_page = self._is_alike or spec.page_format.order == "heads"
        count = 1 if is_by_page else max(1, min(_BLOCK_TOKENS // size, _width(placement)))
        block = count * size
        position = placement.first[:, None] + jnp.arange(columns)[None, :]
        end = jnp.where(placement.length > 0, placement.first + placement.length, 0)
        table = jnp.pad(placement.page_table, ((0, 0), (0, -_width(placement) % count)))

        def read(index: Int[Array, ""], sums: _Sums) -> _Sums:
            page = lax.dynamic_slice_in_dim(table, index * count, count, axis=1)
            # Padding reads some page or other, all of whose positions are masked.
            found = spec.page_format.by_token(pages.at[page].get(mode="clip")).astype(dtype)
            # [R, n, N, S, K, D] to keys [R * K, D, n * S] and values [R * K, n * S, V]
            keys = found[:, :, 0].transpose(0, 3, 4, 1, 2).reshape(rows * kv_heads, dim, block)
            values = found[:, :, -1, ..., :width].transpose(0, 3, 1, 2, 4)
            values = values.reshape(rows * kv_heads, block, width)
            key_position = (index * block + jnp.arange(block))[None, None, :]
            visible = spec.scoring.is_visible(position[:, :, None], key_position)
            # Tokens of padding would see what lies behind their row, which may be NaN.
            visible = (visible & (key_position < end[:, None, None]))[:, None, None]
            visible = jnp.broadcast_to(visible, (rows, kv_heads, groups, columns, block))
            visible = visible.reshape(rows * kv_heads, groups * columns, block)
            scores = spec.scoring.scores(product(grouped, keys), dim)
            masked = jnp.where(visible, scores, MASKED)
            maximum = jnp.maximum(sums.maximum, masked.max(axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - maximum[..., None]), 0.0)
            kept = jnp.exp(sums.maximum - maximum)
            part = product(weights.astype(dtype), values)
            return _Sums(
                maximum,
                kept * sums.total + weights.sum(axis=-1),
                kept[..., None] * sums.value + part,
            )

        shape = grouped.shape[:-1]
        nothing = _Sums(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, width)))
        if sinks is not None:  # the softmax begins with their scores, which have no value
            of_head = sinks.astype(jnp.float32).reshape(1, kv_heads, groups, 1)
            of_head = jnp.broadcast_to(of_head, (rows, kv_heads, groups, columns)).reshape(shape)
            nothing = nothing._replace(maximum=of_head, total=jnp.ones(shape))
        sums = lax.fori_loop(0, jnp.max(-(-end // block)), read, nothing)
        # Rows of padding see nothing.
        out = sums.value / jnp.maximum(sums.total, jnp.finfo(jnp.float32).tiny)[..., None]
        out = out.reshape(rows, kv_heads, groups, columns, width).transpose(0, 3, 1, 2, 4)
        out = out.reshape(rows, columns, heads, width).astype(query.dtype)
        return pages, placement.by_token(out)


KERNEL = _Reference(is_alike=False)
ALIKE = _Reference(is_alike=True)


def _width(placement: Placement) -> int:
    return placement.page_table.shape[1]


def _product(grouped: Array, spec: AttentionSpec, is_alike: bool) -> Product:
    if is_alike:
        return _multiply_alone
    # Pages in the order of heads are a CPU's, where few rows are faster as loops over the page.
    is_few = grouped.shape[1] <= MOST_AT_ONCE
    return _sum if is_few and spec.page_format.order == "heads" else _multiply


def _sum(rows: Float[Array, "RK Q A"], pages: Float[Array, "RK A Z"]) -> Float[Array, "RK Q Z"]:
    """In a loop over the page, which on CPU is not even copied."""
    return sum_products(rows, pages.swapaxes(-1, -2))


def _multiply(
    rows: Float[Array, "RK Q A"], pages: Float[Array, "RK A Z"]
) -> Float[Array, "RK Q Z"]:
    return jnp.einsum("nqa,naz->nqz", rows, pages, preferred_element_type=jnp.float32)


def _multiply_alone(
    rows: Float[Array, "RK Q A"], pages: Float[Array, "RK A Z"]
) -> Float[Array, "RK Q Z"]:
    """A product that is fused with nothing: what precedes or follows would change its rounding."""
    pages = lax.optimization_barrier(pages)
    return lax.optimization_barrier(_multiply(rows, pages))
