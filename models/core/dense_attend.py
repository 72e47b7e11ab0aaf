"""One whole sequence without a cache: the reference for every other form."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from folojax.models.core.interface import PLAIN, Scoring
from folojax.models.core.recurrence import CHUNK, Rows, convolve_rows, recur_rows


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DenseAttend:
    """An `Attend` and a `Recur` for N tokens of ONE sequence, in order, from its first one on.

    No memory outlives a call; `cache`, None by custom, is passed through.
    """

    def __call__(
        self,
        cache: Any,
        layer: int,
        query: Float[Array, "N H D"],
        key: Float[Array, "N K D"],
        value: Float[Array, "N K D"] | None,
        scoring: Scoring = PLAIN,
        sinks: Float[Array, " H"] | None = None,
    ) -> tuple[Any, Float[Array, "N H V"]]:
        """Causal attention.

        Token n sees tokens 0..n, whatever their positions say. Scores and softmax are float32, and
        the [K, G*N, N] scores exist in full, so memory grows with N squared. H is a multiple of K,
        and head h reads kv head h // (H / K). The output is in the query's dtype.
        """
        del layer  # `scoring` says how it differs from others
        value = key[..., : scoring.value_dim] if value is None else value
        return cache, _attend(query, key, value, scoring, sinks)

    def convolve(
        self, cache: Any, layer: int, x: Float[Array, "N X"], kernel: Float[Array, "X W"]
    ) -> tuple[Any, Float[Array, "N X"]]:
        """As `Recur.convolve`."""
        del layer
        state = jnp.zeros((1, kernel.shape[1] - 1, x.shape[1]), jnp.float32)
        return cache, convolve_rows(state, _one_row(len(x)), x[None], kernel)[1][0]

    def recur(
        self,
        cache: Any,
        layer: int,
        query: Float[Array, "N K D"],
        key: Float[Array, "N K D"],
        value: Float[Array, "N H Z"],
        decay: Float[Array, "N H"],
        beta: Float[Array, "N H"] | None = None,
    ) -> tuple[Any, Float[Array, "N H Z"]]:
        """As `Recur.recur`, in chunks."""
        del layer
        num_tokens, missing = len(value), -len(value) % CHUNK
        given = (query, key, value, decay) if beta is None else (query, key, value, decay, beta)
        padded = [jnp.pad(one, ((0, missing), *[(0, 0)] * (one.ndim - 1)))[None] for one in given]
        state = jnp.zeros((1, value.shape[1], key.shape[2], value.shape[2]), jnp.float32)
        _, out = recur_rows(state, _one_row(num_tokens), *padded)
        return cache, out[0, :num_tokens]


dense_attend = DenseAttend()


def _one_row(length: int) -> Rows:
    nothing = jnp.zeros(1, jnp.int32)
    return Rows(nothing, nothing, jnp.full(1, length, jnp.int32))


def _attend(
    query: Float[Array, "N H D"],
    key: Float[Array, "N K D"],
    value: Float[Array, "N K V"],
    scoring: Scoring,
    sinks: Float[Array, " H"] | None,
) -> Float[Array, "N H V"]:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    # One batch axis and plain matrices: XLA on CPU has no bfloat16 product for the richer forms.
    #   query [N, K, G, D] -> [K, G*N, D]     key, value [N, K, D or V] -> [K, N, D or V]
    grouped = query.reshape(num_tokens, num_kv_heads, group, head_dim)
    rows = grouped.transpose(1, 2, 0, 3).reshape(num_kv_heads, group * num_tokens, head_dim)
    scores = jnp.einsum(
        "kmd,ksd->kms", rows, key.transpose(1, 0, 2), preferred_element_type=jnp.float32
    )
    scores = scores.reshape(num_kv_heads, group, num_tokens, num_tokens)
    scores = scoring.scores(scores, head_dim)
    place = jnp.arange(num_tokens)
    is_visible = scoring.is_visible(place[:, None], place[None, :])
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
    out = out.reshape(num_kv_heads, group, num_tokens, -1).transpose(2, 0, 1, 3)
    return out.reshape(num_tokens, num_heads, -1).astype(query.dtype)
