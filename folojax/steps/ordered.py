"""The calls of deterministic mode on NVIDIA GPUs: those of default mode, with sums in order.

    prompt chunks ──> prefill ──┬──> hidden ──> sample, a kind of sampling at a time
    single tokens ──> decode  ──┘         └───> score
                        └──> and sampling, where all rows are greedy

Calls have the shapes of default mode; what must not depend on these is the order in which a sum's
terms are added. So every sum over the numbers of a row is in a kernel whose order is the row's own:
products (`folojax.models.core.ordered_product`), norms (`folojax.models.core.row_kernels`),
attention (`folojax.attention.paged_ordered`), the mass of the vocabulary
(`folojax.models.core.ordered_mass`). What else there is computes each number from few others.

Draws have sums of many kinds. They are made for 32 rows at a time, in a loop whose body is the same
program whatever the batch; and by a program of their own, so that a row's is not another one
because of what its neighbours ask.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from folojax.attention.attend import KERNELS
from folojax.attention.interface import AttentionSpec
from folojax.kv.cache import PageFormat
from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama
from folojax.models.core.ordered_mass import log_mass_in_order
from folojax.models.core.row_kernels import kernel_or
from folojax.sampling.rows import SampleInputs, SlotState, StepOutput, TokenScores
from folojax.sampling.sampler import SamplingSpec, log_sum_exp, token_logprobs
from folojax.steps import step
from folojax.steps.executables import Executable, StepKind, is_plain_greedy
from folojax.steps.fused import (
    MODEL_OPTIONS,
    SAMPLER_OPTIONS,
    WholeSteps,
    packed,
    run_model,
    run_sampler,
)
from folojax.steps.state import CallInputs, CallResults

KERNEL = "ordered"
"""Of attention."""

_ROWS = 32  # that are drawn for at a time


def refusal(
    config: ModelConfig, dtype: Any, page_format: PageFormat, quantization: str | None
) -> str | None:
    """Why a model cannot be run so, as the rest of a sentence; None: it can.

    Args:
        config: Of the model.
        dtype: That it computes in.
        page_format: Of its cache.
        quantization: Of its kernels.
    """
    if quantization is not None:
        return "takes no quantised kernels"
    if config.num_experts or config.kv_rank:
        return "knows no experts and no latent heads"
    if config.recurrent is not None:
        return "knows no recurrent layers"
    has_other = config.has_post_norm or not config.has_pre_norm
    if config.norm != "rms" or has_other or (config.qk_norm and not config.is_qk_norm_plain):
        return f"does not have the norms of {config.architecture}"
    for layer in range(config.num_layers):
        of_layer = config.head_dim, page_format, config.scoring(layer)
        spec = AttentionSpec(jnp.dtype(dtype), jnp.dtype(dtype), *of_layer)
        reason = KERNELS[KERNEL].refusal(spec)
        if reason is not None:
            return reason
    return None


class OrderedSteps(WholeSteps):
    """Calls in which a row's sums have an order of their own; see `folojax.steps.calls.Steps`."""

    kind: StepKind = "ordered"

    def __init__(self, model: Llama) -> None:
        """Compiles nothing."""
        config = dataclasses.replace(model.config, is_ordered=True)
        super().__init__(model.clone(config=config), _PROGRAMS)


def log_mass(logits: Float[Array, "B V"]) -> Float[Array, " B"]:
    """The logarithm of each row's mass, in its own order on an NVIDIA GPU."""
    found: Array = kernel_or(log_mass_in_order, log_sum_exp)(logits)
    return found


def draw_in_blocks(
    slots: SlotState, logits: Float[Array, "B V"], inputs: SampleInputs, spec: SamplingSpec
) -> tuple[SlotState, StepOutput]:
    """As `step.draw_and_note`, for a fixed number of rows at a time."""
    mass = log_mass(logits)
    if is_plain_greedy(spec):  # the largest logit is the same in any order
        return step.draw_and_note(slots, logits, inputs, spec, mass)
    num_rows, num_slots = logits.shape[0], slots.tokens.shape[0]
    index = jnp.arange(-(-num_rows // _ROWS) * _ROWS)

    def cut(array: Array, filling: Any = None) -> Array:
        """By blocks of rows; the last is filled up with a value, or with any of the rows."""
        if len(index) > num_rows:
            array = array.at[index].get(mode="clip")
            if filling is not None:
                array = jnp.where(index < num_rows, array, filling)
        return array.reshape(-1, _ROWS, *array.shape[1:])

    edits, processors = inputs.edits, inputs.processors
    bans = None if edits is None else edits.bans  # of all rows: they name them
    if edits is not None:
        slot = cut(edits.slot, num_slots)
        edits = jax.tree.map(cut, edits._replace(bans=edits.slot))._replace(slot=slot)
    if processors is not None:
        slot = cut(processors.slot, num_slots)
        processors = jax.tree.map(cut, processors)._replace(slot=slot)
    blocks = inputs._replace(
        slot=cut(inputs.slot, num_slots),
        position=cut(inputs.position),
        rows=jax.tree.map(cut, inputs.rows),
        edits=edits,
        processors=processors,
        mask=None if inputs.mask is None else cut(inputs.mask),
    )

    def draw(slots: SlotState, given: Any) -> tuple[SlotState, StepOutput]:
        # Fused with nothing around it.
        number, logits, mass, inputs = lax.optimization_barrier(given)
        if bans is not None:
            row = bans[:, 0] - number * _ROWS
            row = jnp.where((row >= 0) & (row < _ROWS), row, _ROWS)
            inputs = inputs._replace(edits=inputs.edits._replace(bans=bans.at[:, 0].set(row)))
        found = step.draw_and_note(slots, logits, inputs, spec, mass)
        result: tuple[SlotState, StepOutput] = lax.optimization_barrier(found)
        return result

    given = jnp.arange(len(index) // _ROWS), cut(logits), cut(mass), blocks
    slots, out = lax.scan(draw, slots, given)
    return slots, jax.tree.map(lambda x: x.reshape(len(index), *x.shape[2:])[:num_rows], out)


def _sample_hidden(
    params: Any,
    slots: SlotState,
    hidden: Float[Array, "B E"],
    inputs: SampleInputs,
    *,
    model: Llama,
    spec: SamplingSpec,
) -> tuple[SlotState, StepOutput]:
    """As `step.sample_tokens`."""
    logits: Any = model.apply({"params": params}, hidden, method="logits")
    return draw_in_blocks(slots, logits, inputs, spec)


def _decode(
    params: Any, cache: Any, slots: SlotState, inputs: CallInputs, one: Executable, model: Llama
) -> Any:
    return run_model(params, cache, slots, inputs, one, model, _sample_hidden)


def _sample(
    params: Any, cache: None, slots: SlotState, inputs: CallInputs, one: Executable, model: Any
) -> Any:
    return run_sampler(params, cache, slots, inputs, one, model, _sample_hidden)


def _score(
    params: Any, cache: None, slots: None, inputs: CallInputs, one: Executable, model: Any
) -> Any:
    count, num_tokens = one.sampler.num_logprobs or 0, one.sampler.num_tokens

    def score_row(row: tuple[Array, Array]) -> TokenScores:
        logits: Any = model.apply({"params": params}, row[0], method="logits")
        found = token_logprobs(logits, row[1], count, log_mass(logits), num_tokens)
        return TokenScores(*found)

    scores = lax.map(score_row, (inputs.hidden, inputs.targets))
    return cache, slots, CallResults(scores=scores)


_PROGRAMS = {
    "prefill": packed(run_model, "prefill", MODEL_OPTIONS),
    "decode": packed(_decode, "decode", MODEL_OPTIONS),
    "sample": packed(_sample, "sample", SAMPLER_OPTIONS),
    "score": packed(_score, "score"),
}
