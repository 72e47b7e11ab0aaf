"""Edits of the logits before anything is drawn: penalties, biases, masks, banned words.

What they depend on and grows with a request stays on the device, one row a slot (`EditState`):

    history  how often the request has sampled each token, and whether its prompt holds it
    bias     logit_bias, and -inf for what it may never sample
    recent   its last tokens, prompt included: where a banned word of several tokens may end

A request's row is written when it joins the batch and followed token by token. Rows of requests
without such edits are stale, not clean: nothing reads them.

Order: penalties, as in vLLM and transformers (the repetition penalty counts prompt and output, the
others the output alone), then bias, then bans.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from folojax.sampling.parts import own_columns

NUM_RECENT = 15
"""K: how many of a request's last tokens are kept."""

MAX_BAD_WORD_TOKENS = NUM_RECENT + 1
"""Most tokens of a banned word."""

PROMPT_BIT = 1 << 30
"""Added to the count of a token that the prompt holds."""

ANY_TOKEN = -1
"""Matches every token, in a ban; in `recent`, where a request has no token yet."""


class EditState(NamedTuple):
    """What the edits of the running requests need to know, by slot."""

    history: Int[Array, "M V"]
    bias: Float[Array, "M V"]
    recent: Int[Array, "M K"]  # the last token last


class EditRows(NamedTuple):
    """Edits of a step's rows."""

    slot: Int[Array, " B"]  # where the row's edits are kept; M: it has neither penalty nor bias
    repetition: Float[Array, " B"]  # 1 is off
    presence: Float[Array, " B"]  # 0 is off
    frequency: Float[Array, " B"]  # 0 is off
    # Row of the step (B is padding), banned token, and the K tokens it may not follow: those of a
    # shorter word stand at the end, behind ANY_TOKEN. Nothing but ANY_TOKEN bans unconditionally.
    bans: Int[Array, "Z 2+K"]


class SlotEdits(NamedTuple):
    """What is written to a slot when a request joins; ids of V are padding."""

    history_tokens: Int[Array, " A"]
    history_counts: Int[Array, " A"]
    bias_tokens: Int[Array, " A"]
    bias_values: Float[Array, " A"]
    other_bias: Float[Array, ""]  # of the tokens that are not named: -inf if only those are allowed
    recent: Int[Array, " K"]


def init_edits(num_slots: int, vocab_size: int) -> EditState:
    """Allocates `num_slots` rows; 8 bytes a slot and token of the vocabulary."""
    return EditState(
        history=jnp.zeros((num_slots, vocab_size), jnp.int32),
        bias=jnp.zeros((num_slots, vocab_size)),
        recent=jnp.full((num_slots, NUM_RECENT), ANY_TOKEN),
    )


@functools.partial(jax.jit, donate_argnames="edits")
def write_slot(edits: EditState, slot: Int[Array, ""], new: SlotEdits) -> EditState:
    """Replaces the row of a slot; that of slot M is dropped. DONATES `edits`."""
    vocab_size = edits.bias.shape[1]
    history = jnp.zeros(vocab_size, jnp.int32)
    history = history.at[new.history_tokens].set(new.history_counts, mode="drop")
    bias = jnp.full(vocab_size, new.other_bias)
    bias = bias.at[new.bias_tokens].set(new.bias_values, mode="drop")
    return EditState(
        history=edits.history.at[slot].set(history, mode="drop"),
        bias=edits.bias.at[slot].set(bias, mode="drop"),
        recent=edits.recent.at[slot].set(new.recent, mode="drop"),
    )


def apply_edits(
    logits: Float[Array, "B V"],
    edits: EditState,
    rows: EditRows,
    first: Int[Array, ""] | None = None,
) -> Float[Array, "B V"]:
    """The edited logits; a row with nothing to edit keeps its bits.

    Args:
        logits: Of all tokens, or of some that follow each other.
        edits: Of all tokens.
        rows: Those of the step.
        first: The first token of the logits; None: they are of all.
    """
    num_slots, size = edits.bias.shape[0], logits.shape[1]
    history = own_columns(edits.history.at[rows.slot].get(mode="clip"), first, size)
    count = (history & (PROMPT_BIT - 1)).astype(logits.dtype)
    repetition = rows.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    edited = jnp.where(history > 0, repeated, logits)
    edited -= rows.frequency[:, None] * count
    edited -= jnp.where(count > 0, rows.presence[:, None], 0.0)
    edited += own_columns(edits.bias.at[rows.slot].get(mode="clip"), first, size)
    edited = jnp.where((rows.slot < num_slots)[:, None], edited, logits)
    return _ban(edited, edits.recent, rows, first)


def allow_only(
    logits: Float[Array, "B V"], mask: UInt[Array, "B _"], first: Int[Array, ""] | None = None
) -> Float[Array, "B V"]:
    """The logits of tokens whose bits are set, the lowest bit of a word first; -inf elsewhere.

    The logits may be those of some tokens, as in `apply_edits`; the first is a multiple of 32.
    """
    words = None if first is None else first // 32
    mask = own_columns(mask, words, -(-logits.shape[1] // 32))
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
    is_allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] == 1
    return jnp.where(is_allowed, logits, -jnp.inf)


def note_tokens(edits: EditState, slot: Int[Array, " B"], tokens: Int[Array, " B"]) -> EditState:
    """Takes in the tokens just sampled; a slot of M is dropped."""
    recent = edits.recent.at[slot].get(mode="clip")
    recent = jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1)
    return EditState(
        history=edits.history.at[slot, tokens].add(1, mode="drop"),
        bias=edits.bias,
        recent=edits.recent.at[slot].set(recent, mode="drop"),
    )


def _ban(
    logits: Float[Array, "B V"],
    recent: Int[Array, "M K"],
    rows: EditRows,
    first: Int[Array, ""] | None,
) -> Float[Array, "B V"]:
    row, token, prefix = rows.bans[:, 0], rows.bans[:, 1], rows.bans[:, 2:]
    last = recent.at[rows.slot.at[row].get(mode="clip")].get(mode="clip")
    is_met = ((prefix == ANY_TOKEN) | (prefix == last)).all(axis=1)
    if first is not None:  # an index below 0 would count from the end
        token = token - first
        is_met &= token >= 0
    row = jnp.where(is_met, row, logits.shape[0])
    return logits.at[row, token].set(-jnp.inf, mode="drop")
