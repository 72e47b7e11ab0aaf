"""From the inputs of a step to rows of tokens with places in the cache, and back to rows."""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from folojax.kv import KVCache, Placement, place_tokens
from folojax.steps.state import DecodeInputs, PrefillInputs


def place(
    cache: KVCache,
    tokens: Int[Array, " M"] | None,
    inputs: PrefillInputs | DecodeInputs,
    most_tokens: int | None = None,
    *,
    has_states: bool = False,
    may_repeat: bool = False,
) -> tuple[Placement, Int[Array, " T"], Int[Array, " T"]]:
    """What the layers of a step need: where tokens lie, the tokens, and their positions.

    Args:
        cache: Whose pages the inputs name.
        tokens: The last token of every slot, for rows of a decode step that do not give theirs.
        inputs: Chunks of prompts, or a token a row; a row without pages is padding.
        most_tokens: T, if the chunks' tokens are to lie one behind the other; see `place_tokens`.
        has_states: Whether some layers keep a state of each request, of which the inputs say where.
        may_repeat: Whether several rows of a decode step may be of one request.
    """
    if isinstance(inputs, PrefillInputs):
        rows, columns = inputs.tokens.shape
        chex.assert_shape([inputs.start, inputs.length], (rows,))
        first, length, given = inputs.start, inputs.length, inputs.tokens
        may_repeat = True
    else:
        assert tokens is not None, "rows of a decode step continue slots"
        (rows,), columns = inputs.slot.shape, 1
        chex.assert_shape([inputs.token, inputs.position], (rows,))
        sampled = tokens.at[inputs.slot].get(mode="clip")
        first, given = inputs.position, jnp.where(inputs.token < 0, sampled, inputs.token)
        length = (inputs.page_table[:, 0] < cache.num_pages).astype(jnp.int32)
        given = given[:, None]
    chex.assert_shape(inputs.page_table, (rows, None))
    slot = inputs.slot if has_states else None
    assert slot is not None or not has_states, "the model keeps states: inputs need their slots"
    placement, position = place_tokens(
        cache, inputs.page_table, first, length, columns, most_tokens, slot, is_chained=may_repeat
    )
    return placement, placement.by_token(given), position


def last_and_all(
    hidden: Float[Array, "T E"], inputs: PrefillInputs, placement: Placement | None = None
) -> tuple[Float[Array, "R E"], Float[Array, "R C E"]]:
    """The hidden state of each row's last valid token, and those of all tokens by row."""
    rows, columns = inputs.tokens.shape
    every = hidden.reshape(rows, columns, -1) if placement is None else placement.by_row(hidden)
    last = jnp.maximum(inputs.length - 1, 0)
    return jnp.take_along_axis(every, last[:, None, None], axis=1)[:, 0], every


def of_tokens(
    values: Shaped[Array, "R *rest"], inputs: PrefillInputs | DecodeInputs, placement: Placement
) -> Shaped[Array, "T *rest"]:
    """What is said of rows, for each of their tokens."""
    if isinstance(inputs, DecodeInputs):
        return values
    repeated = jnp.repeat(values, inputs.tokens.shape[1], axis=0)
    return repeated if placement.source is None else repeated[placement.source]
