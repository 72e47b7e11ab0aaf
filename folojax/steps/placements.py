"""From the inputs of a step to rows of tokens with places in the cache, and back to rows."""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from folojax.kv import KVCache, Placement, place_tokens
from folojax.steps.state import DecodeInputs, PrefillInputs


def place_prefill(
    cache: KVCache, inputs: PrefillInputs, num_tokens: int | None = None
) -> tuple[Placement, Int[Array, " T"], Int[Array, " T"]]:
    """What the layers of a prefill need: where tokens lie, the tokens, their positions."""
    rows, columns = inputs.tokens.shape
    chex.assert_shape([inputs.start, inputs.length], (rows,))
    chex.assert_shape(inputs.page_table, (rows, None))
    placement, position = place_tokens(
        cache, inputs.page_table, inputs.start, inputs.length, columns, num_tokens
    )
    return placement, placement.by_token(inputs.tokens), position


def last_and_all(
    hidden: Float[Array, "T E"], inputs: PrefillInputs, placement: Placement | None = None
) -> tuple[Float[Array, "R E"], Float[Array, "R C E"]]:
    """The hidden state of each row's last valid token, and those of all tokens by row."""
    rows, columns = inputs.tokens.shape
    every = hidden.reshape(rows, columns, -1) if placement is None else placement.by_row(hidden)
    last = jnp.maximum(inputs.length - 1, 0)
    return jnp.take_along_axis(every, last[:, None, None], axis=1)[:, 0], every


def place_decode(
    cache: KVCache, tokens: Int[Array, " M"], inputs: DecodeInputs
) -> tuple[Placement, Int[Array, " B"]]:
    """What the layers of a decode step need: where each row's token lies, and the token."""
    rows = inputs.slot.shape[0]
    chex.assert_shape([inputs.token, inputs.position], (rows,))
    chex.assert_shape(inputs.page_table, (rows, None))
    sampled = tokens.at[inputs.slot].get(mode="clip")
    is_row = inputs.page_table[:, 0] < cache.num_pages
    placement, _ = place_tokens(
        cache, inputs.page_table, inputs.position, is_row.astype(jnp.int32), 1
    )
    return placement, jnp.where(inputs.token < 0, sampled, inputs.token)
