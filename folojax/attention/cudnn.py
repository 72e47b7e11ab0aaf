"""Attention to pages by cuDNN, through the custom call that JAX has for it: NVIDIA GPUs.

JAX's own functions for paged attention want a pool of exactly rows times pages of a row; the call
below them takes any pool, and any page anywhere in it. It is private to JAX: all that is used of it
is in this file, and a version of JAX whose call has other arguments is refused (`problem`). Those
of 0.10 to 0.12 are known.

A token that continues a row is a kernel of our own (`folojax.attention.paged_decode`), or one call
over the row's pages where that does not take the heads. Causal masks of the call are aligned to the
first query and the first key, so a chunk behind cached tokens is two, whose softmaxes are joined by
the logarithms of their sums:

    own keys       causal among the chunk's own tokens
    pages before   without a mask, up to the chunk's first token

A layer with a window reads no page outside of it: the table begins with the page of the oldest
token that a row sees, and what lies before that token in the page gets a bias.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from folojax.attention.interface import AttentionSpec
from folojax.attention.paged_decode import attend_single, is_taken
from folojax.attention.row_layout import Part, join, lay_out
from folojax.kv.cache import write
from folojax.kv.placement import Placement

_ARGUMENTS = (
    "query key value bias q_seqlen kv_seqlen q_offsets kv_offsets page_table_k page_table_v scale "
    "seed dropout_rate variadic_args mask_type layout sliding_window_length cudnn_version "
    "return_residual"
)
"""What JAX's call takes."""

_LATER: dict[str, Any] = {"score_mod_args": (), "score_mod": None}
"""What it takes from 0.12 on, and the value that changes nothing."""

# For what a window hides. Finite, also times log2(e): cuDNN makes NaN of a block that is all -inf.
_HIDDEN, _HIDDEN_IN_FLOAT16 = -1e30, -3e4

_AMPERE, _HOPPER = 8.0, 9.0  # compute capabilities


@functools.cache
def problem() -> str | None:
    """Why no program of this process can call cuDNN, as the rest of a sentence; None: it can."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        arguments = _arguments(fused)
        fused.check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"is not to be had: {error}"
    if set(arguments) - set(_LATER) != set(_ARGUMENTS.split()):
        return f"is called otherwise in JAX {jax.__version__}: folojax knows 0.10 to 0.12"
    return None


def _arguments(fused: Any) -> list[str]:
    """The arguments of JAX's call, in their order."""
    return list(inspect.signature(fused._dot_product_attention).parameters)


class _CuDNN:
    """The kernel; see `folojax.attention.interface.Kernel`."""

    def refusal(self, spec: AttentionSpec) -> str | None:
        """Refuses all but half precision, uncapped scores and head dims that are multiples of 8."""
        if spec.page_format.order != "tokens":
            return "reads pages in the order of tokens"
        if spec.dtype not in (jnp.bfloat16, jnp.float16) or spec.storage_dtype != spec.dtype:
            return "takes bfloat16 and float16"
        if spec.scoring.softcap is not None:
            return "does not cap scores"
        if spec.scoring.chunk is not None:
            return "knows no chunks"
        if spec.scoring.has_sinks:
            return "knows no sinks"
        if spec.scoring.value_dim is not None:
            return "takes values that lie beside their keys"
        capability = spec.page_format.capability
        if capability < _AMPERE:
            return "needs an NVIDIA GPU of the Ampere generation or later"
        if (reason := problem()) is not None:
            return reason
        most_dims = 256 if capability >= _HOPPER else 128
        if spec.head_dim % 8 or spec.head_dim > most_dims:
            return f"takes head dims that are multiples of 8 up to {most_dims} here"
        return None

    def attend(
        self,
        query: Float[Array, "T H D"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T K D"] | None,
        pages: Num[Array, "P 2 S K D"],
        placement: Placement,
        spec: AttentionSpec,
        sinks: Float[Array, " H"] | None = None,
    ) -> tuple[Num[Array, "P 2 S K D"], Float[Array, "T H D"]]:
        """As `Kernel.attend`; one kernel or call for single tokens, two calls for chunks."""
        del sinks  # refused
        assert value is not None, "values that are a part of keys are refused"
        scale = spec.scoring.scale
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        window = spec.scoring.window
        if placement.columns > 1:
            return _attend_chunk(query, key, value, pages, placement, window, scale)
        size, kv_heads, dim = pages.shape[2:]
        if is_taken(dim, query.shape[1] // kv_heads, size, spec.page_format.capability):
            return attend_single(query, key, value, pages, placement, window, scale)
        pages = write(pages, placement.page, placement.offset, key, value, "tokens")
        out = _attend_pages(query[:, None], pages, placement, 1, window, scale)
        return pages, out[:, 0]


KERNEL = _CuDNN()


def _attend_pages(
    query: Float[Array, "R C H D"],
    pages: Num[Array, "P 2 S K D"],
    placement: Placement,
    num_own: int,
    window: int | None,
    scale: float,
    **options: Any,
) -> Any:
    """Attention to all positions before a row's first token, and to `num_own` from there on."""
    num_pages, _, size, kv_heads, dim = pages.shape
    columns = query.shape[1]
    is_row, first = placement.length > 0, placement.first
    table, end, bias = placement.page_table, first + num_own, None
    if window is not None:
        oldest = jnp.maximum(first - window + 1, 0)  # that the row's first token sees
        skipped = oldest // size
        # As many pages as a window can touch, wherever in a page it begins.
        table = _shift(table, skipped, min((window + size - 2) // size + 1, table.shape[1]))
        position = skipped[:, None] * size + jnp.arange(table.shape[1] * size)[None, :]
        token = first[:, None] + jnp.arange(columns)[None, :]
        is_hidden = token[:, :, None] - position[:, None, :] >= window
        hidden = _HIDDEN_IN_FLOAT16 if query.dtype == jnp.float16 else _HIDDEN
        bias = jnp.where(is_hidden, hidden, 0.0).astype(query.dtype)[:, None]
        end = end - skipped * size
    # Keys and values of a page follow each other: twice as many pages, of one or the other.
    halves = pages.reshape(2 * num_pages, size, kv_heads, dim)
    # No length reaches an entry of padding; but a kernel may load a page ahead.
    table = 2 * jnp.minimum(table, num_pages - 1)[:, None, :, None]
    # A single query is always there, if only to see nothing.
    own = jnp.ones_like(first) if columns == 1 else placement.length
    lengths = (own, jnp.where(is_row, end, 0))
    return _call(query, halves, halves, lengths, (table, table + 1), bias, scale, **options)


def _attend_chunk(
    query: Float[Array, "T H D"],
    key: Float[Array, "T K D"],
    value: Float[Array, "T K D"],
    pages: Num[Array, "P 2 S K D"],
    placement: Placement,
    window: int | None,
    scale: float,
) -> tuple[Num[Array, "P 2 S K D"], Float[Array, "T H D"]]:
    pages, queries, keys, values = lay_out(query, key, value, pages, placement)
    columns = queries.shape[1]
    own = _call(
        queries,
        keys,
        values,
        (placement.length, placement.length),
        None,
        None,
        scale,
        is_causal=True,
        window=window if window is not None and window < columns else None,
        has_mass=True,
    )
    before = _attend_pages(queries, pages, placement, 0, window, scale, has_mass=True)
    return pages, join(Part(*own), Part(*before), placement, window)


def _shift(table: Int[Array, "R N"], skipped: Int[Array, " R"], width: int) -> Int[Array, "R W"]:
    """Tables without so many pages of each row."""
    index = skipped[:, None] + jnp.arange(width)[None, :]
    return jnp.take_along_axis(table, jnp.minimum(index, table.shape[1] - 1), axis=1)


def _call(
    query: Float[Array, "R C H D"],
    keys: Float[Array, "_ S K D"],
    values: Float[Array, "_ S K D"],
    lengths: tuple[Int[Array, " R"], Int[Array, " R"]],
    tables: tuple[Int[Array, "R 1 N 1"], Int[Array, "R 1 N 1"]] | None,
    bias: Float[Array, "R 1 C T"] | None,
    scale: float,
    *,
    is_causal: bool = False,
    window: int | None = None,
    has_mass: bool = False,
) -> Any:
    """JAX's call of cuDNN; with `has_mass` also [R, H, C], logarithms of the sums of weights."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    nothing = jnp.zeros(0, query.dtype)
    key_table, value_table = (nothing, nothing) if tables is None else tables
    kind = fused.MaskType.PADDING_CAUSAL if is_causal else fused.MaskType.PADDING
    query_length, length = (one.astype(jnp.int32) for one in lengths)
    values_of = _LATER | {
        "query": query,
        "key": keys,
        "value": values,
        "bias": nothing if bias is None else bias,
        "q_seqlen": query_length,
        "kv_seqlen": length,
        "q_offsets": nothing,  # of packed sequences
        "kv_offsets": nothing,
        "page_table_k": key_table,
        "page_table_v": value_table,
        "scale": scale,
        "seed": 42,  # of no dropout
        "dropout_rate": 0.0,
        "variadic_args": (bias is not None, False),
        "mask_type": kind,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
        "cudnn_version": fused.check_cudnn_version(),
        "return_residual": has_mass,
    }
    return fused._dot_product_attention(*(values_of[name] for name in _arguments(fused)))
