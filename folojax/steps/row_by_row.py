"""The steps of deterministic mode: every token is a row of one fixed shape.

    prompt chunks, single tokens ──> T rows ──> forward ──> hidden ──> row_logits ──> logits
                                                                          ├──> sample_logits
                                                                          └──> score_logits

What changes the last bits of a row is the shape of the call that computes it, and how many terms a
sum has. Here neither depends on the batch. All calls have T rows, a row is a token of any request,
in prefill, decode and scoring alike; it reads its own pages one after the other, in the order of
its table. The kernels of such an engine (`PageFormat.kernels`) are those whose sums depend on
nothing but the row: C++ on CPU, or products of one shape a page.

The raw log-probability is made of two numbers, a logit and the logarithm of the row's mass. Both
come from one program, `row_logits`, whoever asks.
"""

import functools
from typing import Any

import jax
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from folojax.attention import attend
from folojax.kv import KVCache
from folojax.sampling.rows import SampleInputs, SlotState, StepOutput, TokenScores
from folojax.sampling.sampler import SamplingSpec, log_sum_exp, token_logprobs
from folojax.steps.placements import place_decode
from folojax.steps.residual_stream import ActivationEdit, intercept
from folojax.steps.state import DecodeInputs
from folojax.steps.step import draw_and_note


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

    DONATES `cache`. Arguments and results as of `folojax.decode`. A padding row has a table of
    padding alone.
    """
    placement, token = place_decode(cache, tokens, inputs)
    with intercept(edits, is_edited):
        result: Any = model.apply(
            {"params": params},
            token,
            inputs.position,
            cache,
            functools.partial(attend, placement),
        )
    hidden, cache = result
    return cache, hidden


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


@functools.partial(jax.jit, static_argnames=("num_logprobs", "num_tokens"))
def score_logits(
    logits: Float[Array, "B V"],
    log_mass: Float[Array, " B"],
    targets: Int[Array, " B"],
    *,
    num_logprobs: int,
    num_tokens: int | None = None,
) -> TokenScores:
    """Raw log-probabilities of given tokens; the rows of the report are the rows of the call."""
    found = token_logprobs(logits, targets, num_logprobs, log_mass, num_tokens)
    return TokenScores(*(field[:, None] for field in found))
