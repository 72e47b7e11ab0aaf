"""Attention over one whole sequence without a cache: the reference for every other form."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from folojax.models.core.interface import PLAIN, Scoring


def dense_attend(
    cache: Any,
    layer: int,
    query: Float[Array, "N H D"],
    key: Float[Array, "N K D"],
    value: Float[Array, "N K D"],
    scoring: Scoring = PLAIN,
    sinks: Float[Array, " H"] | None = None,
) -> tuple[Any, Float[Array, "N H D"]]:
    """Causal attention among N tokens of ONE sequence, in order; an `Attend` (see interface.py).

    Token n sees tokens 0..n, whatever their positions say. Scores and softmax are float32, and the
    [K, G*N, N] scores exist in full, so memory grows with N squared. H is a multiple of K, and head
    h reads kv head h // (H / K). The output is in the query's dtype; `cache`, None by custom, is
    passed through.
    """
    del layer  # `scoring` says how it differs from others
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    # One batch axis and plain matrices: XLA on CPU has no bfloat16 product for the richer forms.
    #   query [N, K, G, D] -> [K, G*N, D]        key, value [N, K, D] -> [K, N, D]
    grouped = query.reshape(num_tokens, num_kv_heads, group, head_dim)
    rows = grouped.transpose(1, 2, 0, 3).reshape(num_kv_heads, group * num_tokens, head_dim)
    scores = jnp.einsum(
        "kmd,ksd->kms", rows, key.transpose(1, 0, 2), preferred_element_type=jnp.float32
    )
    scores = scores.reshape(num_kv_heads, group, num_tokens, num_tokens)
    scores = scoring.scores(scores, head_dim)
    place = jnp.arange(num_tokens)
    is_visible = scoring.is_visible(place[:, None] - place[None, :])
    scores = jnp.where(is_visible[None, None], scores, -jnp.inf)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(num_kv_heads, group, 1, 1)
        beside = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        scores = jnp.concatenate((scores, beside), axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :num_tokens]
    out = jnp.einsum(
        "kms,ksd->kmd",
        weights.reshape(num_kv_heads, group * num_tokens, num_tokens).astype(value.dtype),
        value.transpose(1, 0, 2),
        preferred_element_type=jnp.float32,
    )
    out = out.reshape(num_kv_heads, group, num_tokens, head_dim).transpose(2, 0, 1, 3)
    return cache, out.reshape(num_tokens, num_heads, head_dim).astype(query.dtype)
