"""The functions of a step: `prefill` and `decode`, `sample_tokens`, `score_tokens`.

    prompt chunks ──> prefill ──┐
                                ├──> hidden states ──> sample_tokens ──> next token of each slot
    single tokens ──> decode  ──┘                 └──> score_tokens  ──> log-probabilities

All are pure: parameters, state and inputs in; new state and a report out. The state that goes in
is DONATED: its buffers are reused for the new one and the old value is dead after the call. None
has an error path: that a row has room in its pages is decided on the host (`folojax.sched`).

Model and sampler are separate calls because each has its own axes of variation. The shapes of the
inputs choose the executable of the model; the number of rows and a static `SamplingSpec` choose
that of the sampler, which is small. Together they need the product of both; `decode_and_sample` is
that, for devices that are done before the host could hand them a second program, and `decode_steps`
is both several times over. Parameters of a request are arrays and choose nothing.

Shapes that do not fit together fail while tracing, with an AssertionError that names them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from folojax.attention import attend
from folojax.kv import KVCache
from folojax.models.machine.row_sums import REORDERED
from folojax.sampling.logit_edits import note_tokens
from folojax.sampling.logits_processors import apply_processors, note_outputs
from folojax.sampling.rows import SampleInputs, SlotState, StepOutput, TokenScores
from folojax.sampling.sampler import SamplingSpec, sample, token_logprobs
from folojax.steps.placements import last_and_all, place_decode, place_prefill
from folojax.steps.residual_stream import ActivationEdit, intercept, read_layers
from folojax.steps.state import DecodeInputs, PrefillInputs


@functools.partial(
    jax.jit, static_argnames=("model", "edits", "num_tokens"), donate_argnames="cache"
)
def prefill(
    params: Any,
    cache: KVCache,
    inputs: PrefillInputs,
    is_edited: Bool[Array, "R _"] | None = None,
    *,
    model: nn.Module,
    edits: tuple[ActivationEdit, ...] = (),
    num_tokens: int | None = None,
) -> tuple[KVCache, Float[Array, "R E"], Float[Array, "R C E"]]:
    """Caches chunks of prompts.

    DONATES `cache`.

    Args:
        params: The module's parameters.
        cache: Earlier tokens of a row must be cached already, or stand in an earlier row of the
            same call.
        inputs: R rows of C tokens.
        is_edited: Which rows the edits are on for; None without edits.
        model: A module of `folojax.models`.
        edits: Z edits of the residual stream.
        num_tokens: Most tokens that are no padding: only so many go through the model's products.
            None: padding does, too.

    Returns:
        The new cache, the hidden state of each row's last valid token, and those of all tokens.
    """
    placement, tokens, positions = place_prefill(cache, inputs, num_tokens)
    is_on = None
    if is_edited is not None:
        of_rows = jnp.repeat(is_edited, inputs.tokens.shape[1], axis=0)
        is_on = of_rows if placement.source is None else of_rows[placement.source]
    with intercept(edits, is_on):
        result: Any = model.apply(
            {"params": params}, tokens, positions, cache, functools.partial(attend, placement)
        )
    hidden, cache = result
    return cache, *last_and_all(hidden, inputs, placement)


@functools.partial(jax.jit, static_argnames=("model", "edits"), donate_argnames="cache")
def decode(
    params: Any,
    cache: KVCache,
    tokens: Int[Array, " M"],
    inputs: DecodeInputs,
    is_edited: Bool[Array, "B _"] | None = None,
    *,
    model: nn.Module,
    edits: tuple[ActivationEdit, ...] = (),
) -> tuple[KVCache, Float[Array, "B E"]]:
    """Caches one token of every row.

    DONATES `cache`.

    On CPU the engine's own programs of it (`folojax.steps.by_layer`) are compiled with the options
    `models.machine.row_sums.REORDERED`, which make attention by XLA some three times as fast. JAX
    has them for a program only and not for a function within one, so here they are left to the
    caller.

    Args:
        params: The module's parameters.
        cache: Holds the rows' earlier tokens.
        tokens: The last token of every slot (`SlotState.tokens`); row i continues slot
            `inputs.slot[i]`, unless the inputs give its token.
        inputs: B rows.
        is_edited: Which rows the edits are on for; None without edits.
        model: A module of `folojax.models`.
        edits: Z edits of the residual stream.

    Returns:
        The new cache and the hidden state of each row's token.
    """
    with intercept(edits, is_edited):
        return _decode(params, cache, tokens, inputs, model, None)


@functools.partial(
    jax.jit,
    static_argnames=("model", "spec", "activation_edits", "taps"),
    donate_argnames=("cache", "slots"),
)
def decode_and_sample(
    params: Any,
    cache: KVCache,
    slots: SlotState,
    inputs: DecodeInputs,
    sampling: SampleInputs,
    is_edited: Bool[Array, "B _"] | None = None,
    *,
    model: nn.Module,
    spec: SamplingSpec,
    activation_edits: tuple[ActivationEdit, ...] = (),
    taps: tuple[int, ...] = (),
) -> tuple[KVCache, SlotState, StepOutput, dict[int, Float[Array, "B E"]]]:
    """`decode`, and `sample_tokens` of what it gives.

    DONATES `cache` and `slots`.

    Args:
        params: The module's parameters.
        cache: Holds the rows' earlier tokens.
        slots: Of all requests.
        inputs: B rows.
        sampling: Of the same rows; one with slot M samples nothing.
        is_edited: Which rows the activation edits are on for; None without them.
        model: A module of `folojax.models`.
        spec: At least as demanding as every row.
        activation_edits: Of the residual stream.
        taps: Layers behind which the stream is read.

    Returns:
        The new cache and slots, the report, and by layer the streams of each row's token.
    """
    with read_layers(taps) as found, intercept(activation_edits, is_edited):
        cache, hidden = _decode(params, cache, slots.tokens, inputs, model, None)
    slots, out = sample_hidden(params, slots, hidden, sampling, model, spec)
    return cache, slots, out, found


@functools.partial(
    jax.jit,
    static_argnames=("model", "spec", "most_steps", "activation_edits", "taps"),
    donate_argnames=("cache", "slots"),
    compiler_options=REORDERED,
)
def decode_steps(
    params: Any,
    cache: KVCache,
    slots: SlotState,
    inputs: DecodeInputs,
    num_steps: Int[Array, " B"],
    sampling: SampleInputs,
    bans: Int[Array, "K Z _"] | None,
    is_edited: Bool[Array, "B _"] | None = None,
    *,
    model: nn.Module,
    spec: SamplingSpec,
    most_steps: int,
    activation_edits: tuple[ActivationEdit, ...] = (),
    taps: tuple[int, ...] = (),
) -> tuple[KVCache, SlotState, StepOutput, dict[int, Float[Array, "T E"]]]:
    """`decode` and `sample_tokens`, K times over: each step computes what the one before sampled.

    DONATES `cache` and `slots`.

    Args:
        params: The module's parameters.
        cache: Holds the rows' earlier tokens, and has room for K more.
        slots: Of all requests.
        inputs: B rows, as for the first step.
        num_steps: How many steps each row takes; in the others it is padding.
        sampling: As for the first step.
        bans: In place of those in `sampling.edits`, of each step; None for specs without edits.
        is_edited: Which rows the activation edits are on for; None without them.
        model: A module of `folojax.models`.
        spec: At least as demanding as every row.
        most_steps: K.
        activation_edits: Of the residual stream.
        taps: Layers behind which the stream is read.

    Returns:
        The new cache and slots, the report of each step ([K, B] where one step has [B]), and by
        layer the streams of K tokens a row; T is B * K.
    """
    num_slots = slots.tokens.shape[0]

    def one_step(
        carry: tuple[KVCache, SlotState], xs: tuple[Array, Array | None]
    ) -> tuple[tuple[KVCache, SlotState], tuple[StepOutput, dict[int, Array]]]:
        (cache, slots), (number, banned) = carry, xs
        is_active = number < num_steps
        # A row that is done stands still, at a token that it has computed already.
        behind = jnp.clip(number, 0, jnp.maximum(num_steps - 1, 0))
        now = inputs._replace(
            slot=jnp.where(is_active, inputs.slot, num_slots),
            token=jnp.where(number == 0, inputs.token, -1),
            position=inputs.position + behind,
        )
        with read_layers(taps) as found, intercept(activation_edits, is_edited):
            cache, hidden = _decode(params, cache, slots.tokens, now, model, is_active)
        edits = sampling.edits
        if edits is not None and banned is not None:
            edits = edits._replace(slot=jnp.where(is_active, edits.slot, num_slots), bans=banned)
        processors = sampling.processors
        if processors is not None:
            mine = jnp.where(is_active, processors.slot, num_slots)
            processors = processors._replace(slot=mine)
        drawn = sampling._replace(
            processors=processors,
            slot=jnp.where(is_active, sampling.slot, num_slots),
            position=sampling.position + behind,
            edits=edits,
        )
        slots, out = sample_hidden(params, slots, hidden, drawn, model, spec)
        return (cache, slots), (out, found)

    steps = jnp.arange(most_steps), bans
    (cache, slots), (out, found) = lax.scan(one_step, (cache, slots), steps)
    streams = {layer: _by_row(stream) for layer, stream in found.items()}
    return cache, slots, out, streams


@functools.partial(jax.jit, static_argnames=("model", "spec"), donate_argnames="slots")
def sample_tokens(
    params: Any,
    slots: SlotState,
    hidden: Float[Array, "B E"],
    inputs: SampleInputs,
    *,
    model: nn.Module,
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
    """
    return sample_hidden(params, slots, hidden, inputs, model, spec)


@functools.partial(jax.jit, static_argnames=("model", "num_logprobs", "num_tokens"))
def score_tokens(
    params: Any,
    hidden: Float[Array, "R C E"],
    targets: Int[Array, "R C"],
    *,
    model: nn.Module,
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
        logits: Any = model.apply({"params": params}, row[0], method="logits")
        return TokenScores(*token_logprobs(logits, row[1], num_logprobs, None, num_tokens))

    return lax.map(score_row, (hidden, targets))


def head_params(params: Any) -> Any:
    """The part of a parameter tree that a model's `logits` reads: all but the layers.

    The sampler is handed no more than that: what a call costs grows with its number of arrays.
    """
    return {name: value for name, value in params.items() if not isinstance(value, Mapping)}


def _decode(
    params: Any,
    cache: KVCache,
    tokens: Int[Array, " M"],
    inputs: DecodeInputs,
    model: nn.Module,
    is_active: Bool[Array, " B"] | None,
) -> tuple[KVCache, Float[Array, "B E"]]:
    """See `decode`; rows that are not active store nothing."""
    placement, token = place_decode(cache, tokens, inputs)
    if is_active is not None:
        page = jnp.where(is_active, placement.page, cache.num_pages)
        placement = placement._replace(page=page)
    # Meant to keep the layers' kernels from reading the inputs themselves, each of which a GPU's
    # graph has to change when the next step's inputs lie elsewhere. With it there are still 33 to
    # 40 of them (docs/gpu.md): it may go when a step is measured without it.
    placement, token, position = lax.optimization_barrier((placement, token, inputs.position))
    result: Any = model.apply(
        {"params": params}, token, position, cache, functools.partial(attend, placement)
    )
    hidden, cache = result
    return cache, hidden


def _by_row(stream: Float[Array, "K B E"]) -> Float[Array, "T E"]:
    """The tokens of a row one after the other."""
    return jnp.swapaxes(stream, 0, 1).reshape(-1, stream.shape[-1])


def sample_hidden(
    params: Any,
    slots: SlotState,
    hidden: Float[Array, "B E"],
    inputs: SampleInputs,
    model: nn.Module,
    spec: SamplingSpec,
) -> tuple[SlotState, StepOutput]:
    """`sample_tokens`, inside of a jitted function."""
    chex.assert_shape([inputs.slot, inputs.position], (hidden.shape[0],))
    logits: Any = model.apply({"params": params}, hidden, method="logits")
    return draw_and_note(slots, logits, inputs, spec)


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
    out = sample(logits, inputs.rows, inputs.position, spec, pair, log_mass, edited)
    if pair is not None:
        edits = note_tokens(pair[0], pair[1].slot, out.tokens)
    if processors is not None and inputs.processors is not None:
        processors = note_outputs(processors, inputs.processors, out.tokens)
    tokens = slots.tokens.at[inputs.slot].set(out.tokens, mode="drop")
    return SlotState(tokens, edits, processors), out
