"""Attention to pages in C++: on x86-64 CPUs, where a compiler is found.

A query goes through the pages that it sees, one after the other, with a running softmax in float32;
nothing is copied out of them and no scores are kept. What a token gets has the same bits whatever
the rows and tokens beside it, and in a chunk of whatever size.
"""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from folojax.attention.interface import AttentionSpec
from folojax.kv.cache import write
from folojax.kv.placement import Placement
from folojax.models.machine import compiler as native

_SOURCE = Path(__file__).with_suffix(".cc")
_NAME = "folojax_native_attention"
_LANES = 8
_UNBOUNDED = np.iinfo(np.int64).max // 2


@functools.cache
def problem() -> str | None:
    """Why programs on CPU cannot call the kernel; None: they can. The first call compiles it."""
    return native.register(_SOURCE, _NAME, "NativeAttention")


class _Native:
    """The kernel; see `folojax.attention.interface.Kernel`."""

    def refusal(self, spec: AttentionSpec) -> str | None:
        """Refuses capped scores, and pages that are not of whole registers of float32 by head."""
        if spec.page_format.order != "heads" or spec.storage_dtype != jnp.float32:
            return "reads pages of float32 in the order of heads"
        if spec.scoring.softcap is not None:
            return "does not cap scores"
        if spec.scoring.chunk is not None:
            return "knows no chunks"
        if spec.scoring.has_sinks:
            return "knows no sinks"
        sizes = spec.page_format.page_size, spec.head_dim, spec.value_dim
        if any(size % _LANES for size in sizes):
            return f"takes page sizes and head dims that are multiples of {_LANES}"
        reason = problem()
        return None if reason is None else f"cannot be compiled: {reason}"

    def attend(
        self,
        query: Float[Array, "T H D"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T K D"] | None,
        pages: Num[Array, "P N K S D"],
        placement: Placement,
        spec: AttentionSpec,
        sinks: Float[Array, " H"] | None = None,
    ) -> tuple[Num[Array, "P N K S D"], Float[Array, "T H V"]]:
        """As `Kernel.attend`; zeros for tokens of padding."""
        del sinks  # refused
        given = spec.value_dim if value is None else value
        order = spec.page_format.order
        pages = write(pages, placement.page, placement.offset, key, given, order)
        queries = placement.by_row(query)
        rows, _, heads, dim = queries.shape
        num_pages, num_arrays, kv_heads, size, _ = pages.shape
        assert num_arrays == (1 if value is None else 2), f"pages are {pages.shape}"
        chex.assert_shape(pages, (num_pages, num_arrays, kv_heads, size, dim))
        chex.assert_shape(placement.page_table, (rows, None))
        chex.assert_shape([placement.first, placement.length], (rows,))
        chex.assert_is_divisible(heads, kv_heads)
        result = jax.ShapeDtypeStruct((*queries.shape[:-1], spec.value_dim), jnp.float32)
        call = jax.ffi.ffi_call(_NAME, result, vmap_method="sequential")
        of_rows = placement.page_table, placement.first, placement.length
        scoring = spec.scoring
        out = call(
            queries.astype(jnp.float32),
            pages,
            *(one.astype(jnp.int32) for one in of_rows),
            scale=np.float32(dim**-0.5 if scoring.scale is None else scoring.scale),
            window=np.int64(_UNBOUNDED if scoring.window is None else scoring.window),
        )
        return pages, placement.by_token(out.astype(query.dtype))


KERNEL = _Native()
