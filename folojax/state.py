"""What crosses the jit boundary: the carried state, the inputs of a step and its report.

One axis dictionary for the whole project, in shapes, einsums and comments:

    B  rows of a decode step        R  rows of a prefill step     C  tokens of a prefill row
    M  request slots                P  pages                      S  tokens in a page
    N  pages of one row             T  tokens of a step, R * C    Q  queries of a row and kv head
    H  query heads                  K  key/value heads            G  query heads per kv head
    D  head dim                     E  hidden size                V  vocabulary
    L  layers                       J  alternatives reported with a token
    U  blocks of the vocabulary     W  tokens of a block          Z  bans of a step

Carried state (`EngineState`) is donated to the steps that change it and dead afterwards; reported
output (`StepOutput`) is a different type. Padding is spelled with out-of-range indices: a row whose
slot is `M` or a table entry that is `P` is dropped by every scatter, so nothing masks it twice.

Inputs may be NumPy arrays: handing those to a jitted call is their cheapest way to the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from folojax.kv.cache import KVCache, KVLayout, init_cache
from folojax.logit_edits import EditRows, EditState
from folojax.processors import ProcessorRows, ProcessorSlots
from folojax.record import TokenRecord


class SlotState(NamedTuple):
    """What the sampler keeps of every running request."""

    tokens: Int[Array, " M"]  # last sampled token of each slot: the next decode step's input
    edits: EditState | None = None  # None: for sampling classes that edit nothing
    processors: ProcessorSlots | None = None  # None: for steps without any


class EngineState(NamedTuple):
    """All that lives on the device from step to step."""

    cache: KVCache
    slots: SlotState


class PrefillInputs(NamedTuple):
    """Chunks of prompts, cut into rows of C tokens; one request may fill several rows."""

    tokens: Int[Array, "R C"]
    start: Int[Array, " R"]  # position of the row's first token
    length: Int[Array, " R"]  # valid tokens of the row, the rest is padding; 0 for a padding row
    page_table: Int[Array, "R N"]  # the request's pages in order; P is padding


class DecodeInputs(NamedTuple):
    """One token for every running row."""

    slot: Int[Array, " B"]  # M for a padding row
    token: Int[Array, " B"]  # the input token where the host knows it; -1: the slot's last sample
    position: Int[Array, " B"]  # of the input token: how many tokens of the row are cached
    page_table: Int[Array, "B N"]  # the row's pages in order; P is padding


class SamplingRows(NamedTuple):
    """Sampling parameters, one row per sequence; see `folojax.sampling`."""

    temperature: Float[Array, " B"]  # 0 is greedy
    top_k: Int[Array, " B"]  # V is off
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


class StepOutput(NamedTuple):
    """What the host reads after sampling; row i belongs to input row i."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]  # of the token, in the distribution that the spec names
    ranks: Int[Array, " B"]  # 1 is the likeliest; 0 where the spec asks for no log-probabilities
    is_valid: Bool[Array, " B"]  # False: the row's logits hold a NaN or no finite value at all
    top_tokens: Int[Array, "B J"]  # the likeliest tokens, descending
    top_logprobs: Float[Array, "B J"]
    record: TokenRecord | None = None  # where the spec asks for it


class TokenScores(NamedTuple):
    """Log-probabilities of given tokens under the raw model distribution."""

    logprobs: Float[Array, "R C"]
    ranks: Int[Array, "R C"]  # 1 is the likeliest
    top_tokens: Int[Array, "R C J"]
    top_logprobs: Float[Array, "R C J"]


def init_state(layout: KVLayout, max_num_seqs: int) -> EngineState:
    """Allocates an empty cache and `max_num_seqs` slots.

    Args:
        layout: Shape of the cache: pages, page size, layers, heads, dtype.
        max_num_seqs: M, how many requests may hold a slot at once.
    """
    return EngineState(init_cache(layout), SlotState(jnp.zeros(max_num_seqs, jnp.int32)))


def greedy_rows(num_rows: int) -> SamplingRows:
    """Sampling parameters that cut and draw nothing, for rows that take the likeliest token."""
    return SamplingRows(
        temperature=jnp.zeros(num_rows),
        top_k=jnp.full(num_rows, jnp.iinfo(jnp.int32).max),
        top_p=jnp.ones(num_rows),
        min_p=jnp.zeros(num_rows),
        seed=jnp.zeros((num_rows, 2), jnp.uint32),
    )


def is_alive(state: EngineState) -> bool:
    """False when a step that was interrupted has consumed the state without returning one."""
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
