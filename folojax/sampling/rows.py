"""What the sampler takes and gives, a row a sequence; axes as in `folojax.steps.state`."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from folojax.sampling.logit_edits import EditRows, EditState
from folojax.sampling.logits_processors import ProcessorRows, ProcessorSlots
from folojax.sampling.token_record import TokenRecord


class SlotState(NamedTuple):
    """What the sampler keeps of every running request."""

    tokens: Int[Array, " M"]  # last sampled token of each slot: the next decode step's input
    edits: EditState | None = None  # None: for sampling classes that edit nothing
    processors: ProcessorSlots | None = None  # None: for steps without any


class SamplingRows(NamedTuple):
    """Sampling parameters, one row per sequence; see `folojax.sampling.sampler`."""

    temperature: Float[Array, " B"]  # 0 is greedy
    top_k: Int[Array, " B"]  # V or more is off
    top_p: Float[Array, " B"]  # 1 is off
    min_p: Float[Array, " B"]  # 0 is off
    seed: UInt[Array, "B 2"]  # high and low word of the request's seed


class SampleInputs(NamedTuple):
    """Which rows of hidden states are to give a token, and how."""

    slot: Int[Array, " B"]  # where the token goes; M for a row that samples nothing
    position: Int[Array, " B"]  # of the token to be drawn in its sequence: its randomness
    rows: SamplingRows
    edits: EditRows | None = None  # for class EDITED, with `SlotState.edits`
    processors: ProcessorRows | None = None  # with `SlotState.processors`
    mask: UInt[Array, "B _"] | None = None  # tokens that grammars allow, 32 a word; with `has_mask`


class StepOutput(NamedTuple):
    """What the host reads after sampling; row i belongs to input row i."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]  # of the token, in the distribution that the spec names
    ranks: Int[Array, " B"]  # 1 is the likeliest; 0 where the spec asks for no log-probabilities
    is_valid: Bool[Array, " B"]  # False: a logit is NaN, or edits leave no finite one: no token
    top_tokens: Int[Array, "B J"]  # the likeliest tokens, descending
    top_logprobs: Float[Array, "B J"]
    record: TokenRecord | None = None  # where the spec asks for it


class TokenScores(NamedTuple):
    """Log-probabilities of given tokens under the raw model distribution."""

    logprobs: Float[Array, "R C"]
    ranks: Int[Array, "R C"]  # 1 is the likeliest
    top_tokens: Int[Array, "R C J"]
    top_logprobs: Float[Array, "R C J"]


def greedy_rows(num_rows: int) -> SamplingRows:
    """Sampling parameters that cut and draw nothing, for rows that take the likeliest token."""
    return SamplingRows(
        temperature=jnp.zeros(num_rows),
        top_k=jnp.full(num_rows, jnp.iinfo(jnp.int32).max),
        top_p=jnp.ones(num_rows),
        min_p=jnp.zeros(num_rows),
        seed=jnp.zeros((num_rows, 2), jnp.uint32),
    )
