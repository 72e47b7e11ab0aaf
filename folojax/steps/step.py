"""The functions of a step: `prefill` and `decode`, `sample_tokens`, `score_tokens`.

    prompt chunks ──> prefill ──┐
                                ├──> hidden states ──> sample_tokens ──> next token of each slot
    single tokens ──> decode  ──┘                 └──> score_tokens  ──> log-probabilities

All are pure: parameters, state and inputs in; new state and a report out. The state that goes in
is DONATED: its buffers are reused for the new one and the old value is dead after the call. None
has an error path: that a row has room in its pages is decided on the host (`folojax.sched`).

Model and sampler are separate calls because each has its own axes of variation. The shapes of the
inputs choose the executable of the model; the number of rows and a static `SamplingSpec` choose
that of the sampler, which is small. Together they need the product of both, which is for devices
that are done before the host could hand them a second program. Parameters of a request are arrays
and choose nothing. The engine compiles programs of its own (`folojax.steps.calls`) from what these
functions consist of.

Shapes that do not fit together fail while tracing, with an AssertionError that names them.
"""

import functools
from typing import Any

import chex
import jax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from folojax.attention import PagedAttend
from folojax.kv import KVCache, Placement
from folojax.models.core.decoder import Llama
from folojax.models.core.shards import AXIS, has_whole_blocks
from folojax.sampling.logit_edits import note_tokens
from folojax.sampling.logits_processors import apply_processors, note_outputs
from folojax.sampling.part_reports import score_part
from folojax.sampling.part_sampler import sample_part
from folojax.sampling.parts import Part
from folojax.sampling.rows import SampleInputs, SlotState, StepOutput, TokenScores
from folojax.sampling.sampler import SamplingSpec, sample, token_logprobs
from folojax.steps.layers import NO_EXTRAS, Residuals, StepExtras, join_layers, layer_of, run_layers
from folojax.steps.placements import last_and_all, of_tokens, place
from folojax.steps.state import DecodeInputs, PrefillInputs


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(
    params: Any, cache: KVCache, inputs: PrefillInputs, *, model: Llama
) -> tuple[KVCache, Float[Array, "R E"], Float[Array, "R C E"]]:
    """Caches chunks of prompts.

    DONATES `cache`.

    Args:
        params: The module's parameters.
        cache: Earlier tokens of a row must be cached already, or stand in an earlier row of the
            same call.
        inputs: R rows of C tokens.
        model: A module of `folojax.models`.

    Returns:
        The new cache, the hidden state of each row's last valid token, and those of all tokens.
    """
    cache, hidden, placement, _ = forward(params, cache, None, inputs, model)
    return cache, *last_and_all(hidden, inputs, placement)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def decode(
    params: Any,
    cache: KVCache,
    tokens: Int[Array, " M"],
    inputs: DecodeInputs,
    *,
    model: Llama,
) -> tuple[KVCache, Float[Array, "B E"]]:
    """Caches one token of every row.

    DONATES `cache`.

    On CPU the engine's own programs of it are compiled with the options
    `folojax.models.machine.row_sums.REORDERED`, which make attention by XLA some three times as
    fast. JAX has them for a program only and not for a function within one, so here they are left
    to the caller.

    Args:
        params: The module's parameters.
        cache: Holds the rows' earlier tokens.
        tokens: The last token of every slot (`SlotState.tokens`); row i continues slot
            `inputs.slot[i]`, unless the inputs give its token.
        inputs: B rows.
        model: A module of `folojax.models`.

    Returns:
        The new cache and the hidden state of each row's token.
    """
    return forward(params, cache, tokens, inputs, model)[:2]


@functools.partial(jax.jit, static_argnames=("model", "spec"), donate_argnames="slots")
def sample_tokens(
    params: Any,
    slots: SlotState,
    hidden: Float[Array, "B E"],
    inputs: SampleInputs,
    *,
    model: Llama,
    spec: SamplingSpec,
) -> tuple[SlotState, StepOutput]:
    """Samples the next token of each row and keeps it as its slot's last one.

    DONATES `slots`.

    Args:
        params: The module's parameters; `head_params(params)` suffices.
        slots: Of all requests; for class EDITED, with their `edits`.
        hidden: From `prefill` or `decode`.
        inputs: B rows.
        model: A module of `folojax.models`.
        spec: At least as demanding as every row.

    Returns:
        The new slots, and a report whose row i is of input row i.
    """
    chex.assert_shape([inputs.slot, inputs.position], (hidden.shape[0],))
    if not is_sampled_in_parts(model) or spec.processors:
        logits: Any = model.apply({"params": params}, hidden, method="logits")
        return draw_and_note(slots, logits, inputs, spec)
    own: Any = model.apply({"params": params}, hidden, method="own_logits")
    edits, pair = slots.edits, None
    if edits is not None and inputs.edits is not None:
        pair = edits, inputs.edits
    part = Part(AXIS, model.config.vocab_size)
    out = sample_part(own, part, inputs.rows, inputs.position, spec, pair, inputs.mask)
    if pair is not None:
        edits = note_tokens(pair[0], pair[1].slot, out.tokens)
    return slots._replace(tokens=_note(slots, inputs, out), edits=edits), out


@functools.partial(jax.jit, static_argnames=("model", "num_logprobs", "num_tokens"))
def score_tokens(
    params: Any,
    hidden: Float[Array, "R C E"],
    targets: Int[Array, "R C"],
    *,
    model: Llama,
    num_logprobs: int,
    num_tokens: int | None = None,
) -> TokenScores:
    """Log-probabilities of the tokens that follow, in the raw model distribution.

    Row by row, so that only C rows of the vocabulary are in memory at once.

    Args:
        params: The module's parameters; `head_params(params)` suffices.
        hidden: From `prefill`.
        targets: The token after each position; anything where there is none.
        model: A module of `folojax.models`.
        num_logprobs: J, alternatives to report for each position.
        num_tokens: Ids from here on are padding of the vocabulary, and no alternatives.
    """
    chex.assert_shape(targets, hidden.shape[:2])

    def score_row(row: tuple[Array, Array]) -> TokenScores:
        if is_sampled_in_parts(model):
            own: Any = model.apply({"params": params}, row[0], method="own_logits")
            part = Part(AXIS, model.config.vocab_size)
            return TokenScores(*score_part(own, part, row[1], num_logprobs, num_tokens))
        logits: Any = model.apply({"params": params}, row[0], method="logits")
        return TokenScores(*token_logprobs(logits, row[1], num_logprobs, None, num_tokens))

    return lax.map(score_row, (hidden, targets))


def is_sampled_in_parts(model: Llama) -> bool:
    """Whether devices share the vocabulary, and each samples from its part."""
    return model.config.num_shards > 1 and has_whole_blocks(model.config)


def forward(
    params: Any,
    cache: KVCache,
    tokens: Int[Array, " M"] | None,
    inputs: PrefillInputs | DecodeInputs,
    model: Llama,
    extras: StepExtras = NO_EXTRAS,
    is_edited: Bool[Array, "R Z"] | None = None,
    most_tokens: int | None = None,
    adapters: Int[Array, " R"] | None = None,
    routing: Any = None,
    *,
    may_repeat: bool = False,
) -> tuple[KVCache, Float[Array, "T E"], Placement, Residuals]:
    """The model on the tokens of a step; inside of a jitted function.

    Args:
        params: The module's parameters.
        cache: Holds the rows' earlier tokens.
        tokens: The last token of every slot; None for a prefill.
        inputs: R rows.
        model: A module of `folojax.models`.
        extras: With Z edits.
        is_edited: Which rows the edits are on for; None without edits.
        most_tokens: Most tokens that are no padding: only so many go through the model's products.
            None: padding does, too.
        adapters: The slots of the rows' adapters, where kernels are `AdaptedKernel`s.
        routing: The experts of tokens, as of `CallInputs`.
        may_repeat: Whether several rows of a decode step may be of one request.

    Returns:
        The new cache, the hidden states of all tokens, where the tokens lie, and what was read.
    """
    placement, token, position = place(
        cache,
        tokens,
        inputs,
        most_tokens,
        has_states=model.config.recurrent is not None,
        may_repeat=may_repeat,
    )
    if is_edited is not None:
        is_edited = of_tokens(is_edited, inputs, placement)
    if adapters is not None:
        adapters = of_tokens(adapters, inputs, placement)
    if routing is not None:
        routing = placement.by_token(routing)
    hidden, layers, residuals = run_layers(
        params,
        token,
        position,
        [layer_of(cache, index) for index in range(len(cache.layers))],
        PagedAttend(placement),
        model=model,
        extras=extras,
        is_edited=is_edited,
        adapters=adapters,
        routing=routing,
    )
    return join_layers(layers), hidden, placement, residuals


def draw_and_note(
    slots: SlotState,
    logits: Float[Array, "B V"],
    inputs: SampleInputs,
    spec: SamplingSpec,
    log_mass: Float[Array, " B"] | None = None,
) -> tuple[SlotState, StepOutput]:
    """Draws a token a row and takes it into the state of its slot; inside of a jitted function."""
    edits, processors, edited, pair = slots.edits, slots.processors, None, None
    if processors is not None and inputs.processors is not None:
        edited, processors = apply_processors(
            logits, processors, inputs.processors, spec.processors
        )
    if edits is not None and inputs.edits is not None:
        pair = edits, inputs.edits
    out = sample(logits, inputs.rows, inputs.position, spec, pair, log_mass, edited, inputs.mask)
    if pair is not None:
        edits = note_tokens(pair[0], pair[1].slot, out.tokens)
    if processors is not None and inputs.processors is not None:
        processors = note_outputs(processors, inputs.processors, out.tokens)
    return SlotState(_note(slots, inputs, out), edits, processors), out


def _note(slots: SlotState, inputs: SampleInputs, out: StepOutput) -> Int[Array, " M"]:
    return slots.tokens.at[inputs.slot].set(out.tokens, mode="drop")
