"""The two jitted functions of the engine: `prefill` and `decode`.

Both are pure: parameters, state and inputs in; new state and a report out. The state is DONATED:
its buffers are reused for the new one and the old value is dead after the call. Neither has an
error path: that a row has room in its pages is decided on the host (`folojax.sched`).

Shapes that do not fit together fail while tracing, with an AssertionError that names them.

The shapes of the inputs choose the executable, together with two static arguments: the module and
the sampling class. Nothing else does; parameters of a request are arrays.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from folojax.attention import attend_chunks, attend_tokens, plan_chunks, plan_tokens
from folojax.sampling import SamplingClass, sample
from folojax.state import DecodeInputs, EngineState, PrefillInputs, StepOutput


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def prefill(
    params: Any,
    state: EngineState,
    inputs: PrefillInputs,
    *,
    model: nn.Module,
    sampling: SamplingClass = SamplingClass.MASKED,
) -> tuple[EngineState, StepOutput]:
    """Caches chunks of prompts; samples the next token of each row whose slot is given.

    DONATES `state`.

    Args:
        params: The module's parameters.
        state: Cache and last tokens. Earlier tokens of a row must be cached already, or stand in
            an earlier row of the same call.
        inputs: R rows of C tokens.
        model: A module of `folojax.models`.
        sampling: At least as demanding as every row.
    """
    rows, columns = inputs.tokens.shape
    chex.assert_shape([inputs.start, inputs.length, inputs.slot], (rows,))
    chex.assert_shape(inputs.page_table, (rows, None))
    plan = plan_chunks(inputs, state.cache)
    result: Any = model.apply(
        {"params": params},
        inputs.tokens.reshape(-1),
        plan.query_position.reshape(-1),
        state.cache,
        functools.partial(attend_chunks, plan),
    )
    hidden, cache = result
    last = jnp.arange(rows) * columns + jnp.maximum(inputs.length - 1, 0)
    logits: Any = model.apply({"params": params}, hidden[last], method="logits")
    out = sample(logits, inputs.sampling, inputs.start + inputs.length, sampling)
    tokens = state.tokens.at[inputs.slot].set(out.tokens, mode="drop")
    return EngineState(cache, tokens), out


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def decode(
    params: Any,
    state: EngineState,
    inputs: DecodeInputs,
    *,
    model: nn.Module,
    sampling: SamplingClass = SamplingClass.MASKED,
) -> tuple[EngineState, StepOutput]:
    """Advances every row by one token: caches its last token and samples the next.

    DONATES `state`.

    Args:
        params: The module's parameters.
        state: Cache and last tokens; row i continues slot `inputs.slot[i]`.
        inputs: B rows.
        model: A module of `folojax.models`.
        sampling: At least as demanding as every row.
    """
    rows = inputs.slot.shape[0]
    chex.assert_shape(inputs.position, (rows,))
    chex.assert_shape(inputs.page_table, (rows, None))
    plan = plan_tokens(inputs, state.cache)
    result: Any = model.apply(
        {"params": params},
        state.tokens.at[inputs.slot].get(mode="clip"),
        inputs.position,
        state.cache,
        functools.partial(attend_tokens, plan),
    )
    hidden, cache = result
    logits: Any = model.apply({"params": params}, hidden, method="logits")
    out = sample(logits, inputs.sampling, inputs.position + 1, sampling)
    tokens = state.tokens.at[inputs.slot].set(out.tokens, mode="drop")
    return EngineState(cache, tokens), out
