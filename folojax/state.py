"""What crosses the jit boundary: the carried state, the inputs of a step and its report.

One axis dictionary for the whole project, in shapes, einsums and comments:

    B  rows of a decode step        R  rows of a prefill step     C  tokens of a prefill row
    M  request slots                P  pages                      S  tokens in a page
    N  pages of one row             X  ids that may be banned     L  layers
    H  query heads                  K  key/value heads            G  query heads per kv head
    D  head dim                     V  vocabulary

Carried state (`EngineState`) is donated to every step and dead afterwards; reported output
(`StepOutput`) is a different type. Padding is spelled with out-of-range indices: a row whose slot
is `M` or a table entry that is `P` is dropped by every scatter, so nothing masks it twice.

Inputs may be NumPy arrays: handing those to a jitted call is their cheapest way to the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from folojax.kv_cache import KVCache, KVLayout, init_cache


class EngineState(NamedTuple):
    """All that lives on the device from step to step."""

    cache: KVCache
    tokens: Int[Array, " M"]  # last sampled token of each slot: the next decode step's input


class SamplingRows(NamedTuple):
    """Sampling parameters, one row per sequence; see `folojax.sampling`."""

    temperature: Float[Array, " B"]  # 0 is greedy
    top_k: Int[Array, " B"]  # V is off
    top_p: Float[Array, " B"]  # 1 is off
    min_p: Float[Array, " B"]  # 0 is off
    seed: UInt[Array, "B 2"]  # high and low word of the request's seed
    banned: Int[Array, "B X"]  # ids that may not be sampled in this step; V is padding


class PrefillInputs(NamedTuple):
    """Chunks of prompts, cut into rows of C tokens; one request may fill several rows."""

    tokens: Int[Array, "R C"]
    start: Int[Array, " R"]  # position of the row's first token
    length: Int[Array, " R"]  # valid tokens of the row, the rest is padding; 0 for a padding row
    page_table: Int[Array, "R N"]  # the request's pages in order; P is padding
    slot: Int[Array, " R"]  # where the sampled token goes; M when the row ends no prompt
    sampling: SamplingRows


class DecodeInputs(NamedTuple):
    """One token for every running row; the token itself is in the state."""

    slot: Int[Array, " B"]  # M for a padding row
    position: Int[Array, " B"]  # of the input token: how many tokens of the row are cached
    page_table: Int[Array, "B N"]  # the row's pages in order; P is padding
    sampling: SamplingRows


class StepOutput(NamedTuple):
    """What the host reads after a step; row i belongs to input row i."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]  # log-probability of the token in the raw model distribution
    is_valid: Bool[Array, " B"]  # False: the row's logits hold a NaN or no finite value at all


def init_state(layout: KVLayout, max_num_seqs: int) -> EngineState:
    """Allocates an empty cache and `max_num_seqs` slots.

    Args:
        layout: Shape of the cache: segments, page size, layers, heads, dtype.
        max_num_seqs: M, how many requests may hold a slot at once.
    """
    return EngineState(init_cache(layout), jnp.zeros(max_num_seqs, jnp.int32))


def greedy_rows(num_rows: int) -> SamplingRows:
    """Sampling parameters that cut and draw nothing, for rows that take the likeliest token."""
    return SamplingRows(
        temperature=jnp.zeros(num_rows),
        top_k=jnp.full(num_rows, jnp.iinfo(jnp.int32).max),
        top_p=jnp.ones(num_rows),
        min_p=jnp.zeros(num_rows),
        seed=jnp.zeros((num_rows, 2), jnp.uint32),
        banned=jnp.zeros((num_rows, 0), jnp.int32),
    )


def is_alive(state: EngineState) -> bool:
    """False when a step that was interrupted has consumed the state without returning one."""
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
