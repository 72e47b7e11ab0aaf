"""Attention of prompt chunks to keys and values that were copied out of their pages.

`attend_gathered` has two ways. The plain one is products and a softmax, on every platform and for
every scoring: it is the reference for the other. The other is `jax.nn.dot_product_attention`, for
cuDNN's fused attention: it stores no scores, and it takes most models in half precision on a GPU.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from folojax.models.interface import Scoring

# Finite, so that a row without any valid key (padding) gives numbers and not NaN.
MASKED = -1e30

Way: TypeAlias = Literal["plain", "cudnn", "xla"]
"""Products and a softmax, or an implementation of `jax.nn.dot_product_attention`."""


def attend_gathered(
    query: Float[Array, "R C H D"],
    keys: Float[Array, "R N K D S"],
    values: Float[Array, "R N K S D"],
    query_position: Int[Array, "R C"],
    end: Int[Array, " R"],
    scoring: Scoring,
) -> Float[Array, "R C H D"]:
    """Causal attention of every row's queries to its pages, softmax in float32.

    Args:
        query: C tokens of each row.
        keys: Of N pages a row, in the order of positions; in the dtype of the queries.
        values: Likewise; all are finite.
        query_position: Of every query.
        end: Positions of the row that have keys; what lies behind them may be NaN.
        scoring: What becomes of the products.
    """
    way = choose_way(query.dtype, query.shape[-1], scoring)
    position = jnp.arange(keys.shape[1] * keys.shape[-1])
    visible = scoring.is_visible(query_position[:, :, None] - position[None, None, :])
    if way == "plain":
        return _attend_plainly(query, keys, values, visible, scoring)
    # A mask is added to the scores, which leaves a NaN of the page's earlier owner what it is.
    is_own = (position[None, :] < end[:, None]).reshape(*keys.shape[:2], 1, 1, keys.shape[-1])
    keys = jnp.where(is_own, keys, 0)
    return _attend_fused(query, keys, values, visible, scoring, way)


def choose_way(dtype: DTypeLike, head_dim: int, scoring: Scoring) -> Way:
    """The fused way where cuDNN has it: half precision, NVIDIA from Ampere on, no soft cap."""
    device = jax.devices()[0]
    is_half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    is_size = head_dim % 8 == 0 and head_dim <= 128
    if device.platform != "gpu" or not is_half or not is_size or scoring.softcap is not None:
        return "plain"
    capability = getattr(device, "compute_capability", "0.0")  # AMD's are names
    major = capability.partition(".")[0]
    return "cudnn" if major.isdigit() and int(major) >= 8 else "plain"


def _attend_plainly(
    query: Float[Array, "R C H D"],
    keys: Float[Array, "R N K D S"],
    values: Float[Array, "R N K S D"],
    visible: Bool[Array, "R C T"],
    scoring: Scoring,
) -> Float[Array, "R C H D"]:
    rows, pages, kv_heads, dim, size = keys.shape
    columns, groups = query.shape[1], query.shape[2] // kv_heads
    # Batch axes flattened to one, queries of a group stacked: plain batched products, which is
    # what XLA's CPU backend runs fastest (and in bfloat16 runs at all).
    flat = query.reshape(rows, columns, kv_heads, groups, dim).transpose(0, 2, 1, 3, 4)
    flat = flat.reshape(rows * kv_heads, columns * groups, dim)
    keys = keys.transpose(0, 2, 3, 1, 4).reshape(rows * kv_heads, dim, pages * size)
    values = values.transpose(0, 2, 1, 3, 4).reshape(rows * kv_heads, pages * size, dim)
    scores = jnp.einsum("nqd,nds->nqs", flat, keys, preferred_element_type=jnp.float32)
    scores = scoring.scores(scores, dim).reshape(rows, kv_heads, columns, groups, pages * size)
    scores = jnp.where(visible[:, None, :, None, :], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    weights = weights.reshape(rows * kv_heads, columns * groups, pages * size)
    out = jnp.einsum("nqs,nsd->nqd", weights, values, preferred_element_type=jnp.float32)
    out = out.reshape(rows, kv_heads, columns, groups, dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(rows, columns, kv_heads * groups, dim).astype(query.dtype)


def _attend_fused(
    query: Float[Array, "R C H D"],
    keys: Float[Array, "R N K D S"],
    values: Float[Array, "R N K S D"],
    visible: Bool[Array, "R C T"],
    scoring: Scoring,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "R C H D"]:
    rows, pages, kv_heads, dim, size = keys.shape
    return jax.nn.dot_product_attention(
        query,
        keys.transpose(0, 1, 4, 2, 3).reshape(rows, pages * size, kv_heads, dim),
        values.transpose(0, 1, 3, 2, 4).reshape(rows, pages * size, kv_heads, dim),
        mask=visible[:, None],
        scale=scoring.scale,
        implementation=implementation,
    )
