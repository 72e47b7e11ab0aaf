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
output (`StepOutput`, `CallResults`) is a different type. Padding is spelled with out-of-range
indices: a row whose slot is `M` or a table entry that is `P` is dropped by every scatter, so
nothing masks it twice.

Inputs may be NumPy arrays: handing those to a jitted call is their cheapest way to the device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from folojax.kv.cache import KVCache, KVLayout, init_cache
from folojax.sampling.rows import SlotState, TokenScores
from folojax.steps.layers import Residuals


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
    # M for a padding row. Only models with recurrent layers need it: their states lie by slots.
    slot: Int[Array, " R"] | None = None


class DecodeInputs(NamedTuple):
    """One token for every running row."""

    slot: Int[Array, " B"]  # M for a padding row
    token: Int[Array, " B"]  # the input token where the host knows it; -1: the slot's last sample
    position: Int[Array, " B"]  # of the input token: how many tokens of the row are cached
    page_table: Int[Array, "B N"]  # the row's pages in order; P is padding


class CallInputs(NamedTuple):
    """What an executable is called with beside parameters and state; each kind takes some of it."""

    rows: Any = None  # `PrefillInputs` or `DecodeInputs`, of R rows
    is_edited: Any = None  # [R, Z], which rows the activation edits are on for; None without edits
    adapters: Any = None  # [R], the slots of the rows' adapters; None: the model has no stacks
    # [R, C, L, M], the M experts that tokens are sent to in the L layers that have any; below 0:
    # those that the router chooses. None: all are.
    routing: Any = None
    sampling: Any = None  # `SampleInputs`
    num_steps: Any = None  # [B], how many each row takes of several decode steps
    hidden: Any = None  # what the model's call gave, for a sampler or a scorer
    targets: Any = None  # [R, C], the tokens to be scored
    mail: Any = None  # [B, 3], whence masks come while it runs; None: `sampling` has what there is


class CallResults(NamedTuple):
    """What an executable gives beside the new state; None where a kind gives nothing.

    The report of several decode steps has an axis of steps in front.
    """

    hidden: Any = None  # [R, E], of each row's last token
    every: Any = None  # [R, C, E], of all tokens
    report: Any = None  # a `StepOutput`, as a `folojax.steps.packing.PackedReport`
    scores: TokenScores | None = None
    residuals: Residuals | None = None


def init_state(layout: KVLayout, max_num_seqs: int) -> EngineState:
    """Allocates an empty cache and `max_num_seqs` slots.

    Args:
        layout: Shape of the cache: pages, page size, layers, heads, dtype.
        max_num_seqs: M, how many requests may hold a slot at once.
    """
    return EngineState(init_cache(layout), SlotState(jnp.zeros(max_num_seqs, jnp.int32)))


def is_alive(state: EngineState) -> bool:
    """False when a step that was interrupted has consumed the state without returning one."""
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
