"""Attention to pages where they lie, in C++: on x86-64, where a compiler is found.

    query [R, C, H, D]    C tokens of R rows, from position `first` on; `length` of them are real
    keys, values          one layer of a cache in the layout of CPUs (`kv_cache`)

A query goes through the pages that it sees, one after the other, with a running softmax in float32;
nothing is copied out of them and no scores are kept. What a token gets has the same bits whatever
the rows and tokens beside it, and in a chunk of whatever size.

`row_attention` and `gathered_attention` are the ways of XLA, which compute the same.
"""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from folojax import kv_cache
from folojax.kv_cache import KVCache
from folojax.models import native
from folojax.models.config import ModelConfig
from folojax.models.interface import Scoring
from folojax.models.platforms import platform

_SOURCE = Path(__file__).with_suffix(".cc")
_NAME = "folojax_native_attention"
_LANES = 8
_UNBOUNDED = np.iinfo(np.int64).max // 2


def has_native_attention() -> bool:
    """Whether programs on CPU may call it; it is compiled if nobody has done so before."""
    return native.register(_SOURCE, _NAME, "NativeAttention") is None


def suits(config: ModelConfig, page_size: int) -> bool:
    """Whether this attention is for all layers of a model."""
    return _suits(page_size, config.head_dim, config.attention_softcap)


def is_native(cache: KVCache, scoring: Scoring) -> bool:
    """Whether this attention is for a cache, and what is to be done with scores."""
    *_, dim = cache.values[0][0].shape
    return len(cache.keys) == 1 and _suits(kv_cache.page_size(cache), dim, scoring.softcap)


def _suits(page_size: int, dim: int, softcap: float | None) -> bool:
    """Pages are read in whole registers, and scores have no cap."""
    if platform() != "cpu" or softcap is not None or page_size % _LANES or dim % _LANES:
        return False
    return has_native_attention()


def attend_natively(
    query: Float[Array, "R C H D"],
    cache: KVCache,
    layer: int,
    page_table: Int[Array, "R N"],
    first: Int[Array, " R"],
    length: Int[Array, " R"],
    scoring: Scoring,
) -> Float[Array, "R C H D"]:
    """Causal attention of every row's tokens to its pages; zeros for tokens of padding.

    Args:
        query: In any dtype, which is that of the result.
        cache: With the keys and values of all that the tokens see, their own included.
        layer: Of the cache.
        page_table: Pages of each row; those behind its last token are not looked at.
        first: Position of each row's first token.
        length: Tokens of each row that are no padding.
        scoring: Without a cap.
    """
    keys, values = cache.keys[0][layer], cache.values[0][layer]
    rows, _, heads, dim = query.shape
    pages, kv_heads, size, _ = keys.shape
    chex.assert_shape([keys, values], (pages, kv_heads, size, dim))
    chex.assert_shape(page_table, (rows, None))
    chex.assert_shape([first, length], (rows,))
    chex.assert_is_divisible(heads, kv_heads)
    call = jax.ffi.ffi_call(
        _NAME, jax.ShapeDtypeStruct(query.shape, jnp.float32), vmap_method="sequential"
    )
    integers = (one.astype(jnp.int32) for one in (page_table, first, length))
    out = call(
        query.astype(jnp.float32),
        keys,
        values,
        *integers,
        scale=np.float32(dim**-0.5 if scoring.scale is None else scoring.scale),
        window=np.int64(_UNBOUNDED if scoring.window is None else scoring.window),
    )
    return out.astype(query.dtype)
