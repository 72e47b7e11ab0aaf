"""Where the tokens of a step lie: the page of each, and the pages that each row of tokens sees."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from folojax.kv.cache import KVCache
from folojax.models.core.recurrence import Rows, count_before


class Placement(NamedTuple):
    """The tokens of R rows, at most C of each: the same for every layer of a step.

    A row is a chunk of a prompt, or with C = 1 a token to continue from. Either T is R * C, tokens
    of padding included, or the T tokens are those that are no padding, one behind the other::

        rows     a b c .  |  d . . .  |  e f . .        place   0 1 2 .  3 . . .  4 5 . .
        tokens   a b c d e f                            source  0 1 2 4 8 9
    """

    page: Int[Array, " T"]  # where each token's key and value go; P for a token of padding
    offset: Int[Array, " T"]
    page_table: Int[Array, "R N"]  # the pages of each row's request in order; P is padding
    first: Int[Array, " R"]  # position of the row's first token
    length: Int[Array, " R"]  # tokens of the row that are no padding
    source: Int[Array, " T"] | None = None  # of each token, where it is among the R * C
    place: Int[Array, "R C"] | None = None  # the inverse; of padding, that of some other token
    # Where layers keep a state of each request: whose, and how many of its tokens come in the call
    # before a row (`folojax.models.core.recurrence.Rows`).
    slot: Int[Array, " R"] | None = None
    before: Int[Array, " R"] | None = None

    @property
    def columns(self) -> int:
        """C, tokens of a row."""
        return (
            self.page.shape[0] // self.first.shape[0] if self.place is None else self.place.shape[1]
        )

    @property
    def rows(self) -> Rows:
        """The rows, as recurrences know them."""
        assert self.slot is not None, "rows of a model with recurrent layers come with their slots"
        return Rows(self.slot, self.first, self.length, self.before)

    def by_row(self, tokens: Array) -> Array:
        """Lays an array of tokens, [T, ...], out by rows, [R, C, ...]; padding holds anything."""
        if self.place is None:
            return tokens.reshape(self.first.shape[0], -1, *tokens.shape[1:])
        return tokens[self.place]

    def by_token(self, rows: Array) -> Array:
        """The inverse of `by_row`: an array by rows, [R, C, ...], to one of tokens, [T, ...]."""
        flat = rows.reshape(-1, *rows.shape[2:])
        return flat if self.source is None else flat[self.source]


def place_tokens(
    cache: KVCache,
    page_table: Int[Array, "R N"],
    first: Int[Array, " R"],
    length: Int[Array, " R"],
    columns: int,
    num_tokens: int | None = None,
    slot: Int[Array, " R"] | None = None,
    *,
    is_chained: bool = False,
) -> tuple[Placement, Int[Array, " T"]]:
    """Finds page and offset of every token.

    Args:
        cache: Whose pages the table names.
        page_table: As in `Placement`, like the next two.
        first: Position of each row's first token.
        length: Tokens of each row that are no padding.
        columns: C, tokens of a row.
        num_tokens: T, if the tokens are to lie one behind the other: at least as many as are no
            padding. None: they are all there.
        slot: Of each row's request; None where no layer keeps a state.
        is_chained: Whether several rows may be of one request, one behind the other.

    Returns:
        The placement, and the position of every token.
    """
    size = cache.page_size
    column = jnp.arange(columns)[None, :]
    position = first[:, None] + column
    index = jnp.minimum(position // size, page_table.shape[1] - 1)
    page = jnp.take_along_axis(page_table, index, axis=1)
    is_real = column < length[:, None]
    page = jnp.where(is_real, page, cache.num_pages).reshape(-1)
    position = position.reshape(-1)
    source = place = None
    if num_tokens is not None and num_tokens < page.shape[0]:
        place = jnp.where(is_real, jnp.cumsum(is_real).reshape(is_real.shape) - 1, 0)
        (source,) = jnp.nonzero(is_real.reshape(-1), size=num_tokens, fill_value=0)
        is_token = jnp.arange(num_tokens) < length.sum()
        page = jnp.where(is_token, page[source], cache.num_pages)
        position = position[source]
    before = None
    if slot is not None and is_chained:
        before = count_before(slot, first, length)
    placement = Placement(
        page, position % size, page_table, first, length, source, place, slot, before
    )
    return placement, position
