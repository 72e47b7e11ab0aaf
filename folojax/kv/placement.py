"""Where the tokens of a step lie: the page of each, and the pages that each row of tokens sees."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from folojax.kv.cache import KVCache


class Placement(NamedTuple):
    """The tokens of R rows, C of each, T = R * C: the same for every layer of a step.

    A row is a chunk of a prompt, or with C = 1 a token to continue from.
    """

    page: Int[Array, " T"]  # where each token's key and value go; P for a token of padding
    offset: Int[Array, " T"]
    page_table: Int[Array, "R N"]  # the pages of each row's request in order; P is padding
    first: Int[Array, " R"]  # position of the row's first token
    length: Int[Array, " R"]  # tokens of the row that are no padding


def place_tokens(
    cache: KVCache,
    page_table: Int[Array, "R N"],
    first: Int[Array, " R"],
    length: Int[Array, " R"],
    columns: int,
) -> tuple[Placement, Int[Array, " T"]]:
    """Finds page and offset of every token.

    Args:
        cache: Whose pages the table names.
        page_table: As in `Placement`.
        first: Likewise.
        length: Likewise.
        columns: C, tokens of a row.

    Returns:
        The placement, and the position of every token.
    """
    size = cache.page_size
    column = jnp.arange(columns)[None, :]
    position = first[:, None] + column
    index = jnp.minimum(position // size, page_table.shape[1] - 1)
    page = jnp.take_along_axis(page_table, index, axis=1)
    page = jnp.where(column < length[:, None], page, cache.num_pages)
    offset = position % size
    placement = Placement(page.reshape(-1), offset.reshape(-1), page_table, first, length)
    return placement, position.reshape(-1)
