"""The steps of deterministic mode: every token is a row of one fixed shape.

    prompt chunks, single tokens ──> T rows ──> forward ──> hidden ──> row_logits ──> logits
                                                                          ├──> sample_logits
                                                                          └──> score_logits

What changes the last bits of a row is the shape of the call that computes it, and how many terms a
sum has. Here neither depends on the batch. All calls have T rows, a row is a token of any request,
in prefill, decode and scoring alike; it reads its own pages one after the other, in the order of
its table, with a product of one shape a page. Pages behind its last one leave its sums as they are
(exp(0) = 1, and a weight of 0), so the longest row may decide how many are looked at.

The raw log-probability is made of two numbers, a logit and the logarithm of the row's mass. Both
come from one program, `row_logits`, whoever asks.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from folojax import kv_cache
from folojax.gathered_attention import MASKED
from folojax.kv_cache import KVCache
from folojax.models.interface import PLAIN, Scoring
from folojax.residual import ActivationEdit, intercept
from folojax.sampling import SamplingSpec, log_sum_exp, token_logprobs
from folojax.state import DecodeInputs, SampleInputs, SlotState, StepOutput, TokenScores
from folojax.step import draw_and_note


class RowPlan(NamedTuple):
    """Where the tokens of a call go, and what they see."""

    page: Int[Array, " B"]
    offset: Int[Array, " B"]
    page_table: Int[Array, "B N"]
    position: Int[Array, " B"]


@functools.partial(jax.jit, static_argnames=("model", "edits"), donate_argnames="cache")
def forward(
    params: Any,
    cache: KVCache,
    tokens: Int[Array, " M"],
    inputs: DecodeInputs,
    is_edited: Bool[Array, "B _"] | None = None,
    *,
    model: nn.Module,
    edits: tuple[ActivationEdit, ...] = (),
) -> tuple[KVCache, Float[Array, "B E"]]:
    """Caches one token of every row; several rows may be tokens of one request, in order.

    DONATES `cache`. Arguments and results as of `folojax.decode`; `inputs.shared` is not read. A
    padding row has a table of padding alone.
    """
    rows = inputs.slot.shape[0]
    chex.assert_shape([inputs.token, inputs.position], (rows,))
    page_size = kv_cache.page_size(cache)
    index = jnp.minimum(inputs.position // page_size, inputs.page_table.shape[1] - 1)
    plan = RowPlan(
        page=jnp.take_along_axis(inputs.page_table, index[:, None], axis=1)[:, 0],
        offset=inputs.position % page_size,
        page_table=inputs.page_table,
        position=inputs.position,
    )
    sampled = tokens.at[inputs.slot].get(mode="clip")
    with intercept(edits, is_edited):
        result: Any = model.apply(
            {"params": params},
            jnp.where(inputs.token < 0, sampled, inputs.token),
            inputs.position,
            cache,
            functools.partial(attend_rows, plan),
        )
    hidden, cache = result
    return cache, hidden


def attend_rows(
    plan: RowPlan,
    cache: KVCache,
    layer: int,
    query: Float[Array, "B H D"],
    key: Float[Array, "B K D"],
    value: Float[Array, "B K D"],
    scoring: Scoring = PLAIN,
) -> tuple[KVCache, Float[Array, "B H D"]]:
    """Attention of single tokens to their own pages, page by page with a running softmax."""
    cache = kv_cache.write(cache, layer, plan.page, plan.offset, key, value)
    rows, heads, dim = query.shape
    kv_heads, size = key.shape[1], kv_cache.page_size(cache)
    groups = heads // kv_heads
    flat = query.reshape(rows * kv_heads, groups, dim)

    def read_page(index: Int[Array, ""], sums: tuple[Array, Array, Array]) -> tuple:
        maximum, total, out = sums
        page = lax.dynamic_index_in_dim(plan.page_table, index, axis=1, keepdims=False)
        keys, values = kv_cache.gather_pages(cache, layer, page, query.dtype)
        keys, values = lax.optimization_barrier((keys, values))
        scores = jnp.einsum(
            "ngd,nds->ngs",
            flat,
            keys.reshape(rows * kv_heads, dim, size),
            preferred_element_type=jnp.float32,
        )
        scores = scoring.scores(scores.reshape(rows, kv_heads, groups, size), dim)
        age = plan.position[:, None] - (index * size + jnp.arange(size)[None, :])
        visible = scoring.is_visible(age)[:, None, None, :]
        new_maximum = jnp.maximum(maximum, jnp.where(visible, scores, MASKED).max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_maximum[..., None]), 0.0)
        kept = jnp.exp(maximum - new_maximum)
        part = jnp.einsum(
            "ngs,nsd->ngd",
            weights.astype(query.dtype).reshape(rows * kv_heads, groups, size),
            values.reshape(rows * kv_heads, size, dim),
            preferred_element_type=jnp.float32,
        )
        part = part.reshape(rows, kv_heads, groups, dim)
        total = kept * total + weights.sum(axis=-1)
        # The products are not fused into the sums: a fused multiply-add rounds differently.
        return new_maximum, total, kept[..., None] * out + lax.optimization_barrier(part)

    shape = (rows, kv_heads, groups)
    start = jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, dim))
    num_pages = jnp.max(plan.position) // size + 1
    _, total, out = lax.fori_loop(0, num_pages, read_page, start)
    # Rows of padding may see nothing but stale pages: whatever they give is dropped.
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return cache, out.reshape(rows, heads, dim).astype(query.dtype)


@functools.partial(jax.jit, static_argnames=("model",))
def row_logits(
    params: Any, hidden: Float[Array, "B E"], *, model: nn.Module
) -> tuple[Float[Array, "B V"], Float[Array, " B"]]:
    """Logits of rows, and the logarithms of the sums of their exponentials."""
    logits: Any = model.apply({"params": params}, hidden, method="logits")
    logits = lax.optimization_barrier(logits)
    return logits, log_sum_exp(logits)


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames="slots")
def sample_logits(
    slots: SlotState,
    logits: Float[Array, "B V"],
    log_mass: Float[Array, " B"],
    inputs: SampleInputs,
    *,
    spec: SamplingSpec,
) -> tuple[SlotState, StepOutput]:
    """Samples the next token of each row that has a slot, as `folojax.sample_tokens` does.

    DONATES `slots`.
    """
    return draw_and_note(slots, logits, inputs, spec, log_mass)


@functools.partial(jax.jit, static_argnames=("num_logprobs",))
def score_logits(
    logits: Float[Array, "B V"],
    log_mass: Float[Array, " B"],
    targets: Int[Array, " B"],
    *,
    num_logprobs: int,
) -> TokenScores:
    """Raw log-probabilities of given tokens; the rows of the report are the rows of the call."""
    found = token_logprobs(logits, targets, num_logprobs, log_mass)
    return TokenScores(*(field[:, None] for field in found))
