"""Tokens as rows and back: the kernels, interpreted, are what plain JAX computes."""

import functools
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.attention import row_layout
from folojax.attention.row_layout import Part
from folojax.kv import KVLayout, PageFormat, Placement, init_cache, place_tokens
from tests.random_numbers import normal

HEADS, KV_HEADS, DIM, COLUMNS, TOKENS = 6, 2, 8, 32, 80
LENGTHS, FIRST = [32, 0, 7, 20, 1], [0, 0, 5, 64, 1]
TABLE = [[0, 5, 9, 9, 9, 9], [9] * 6, [3, 9, 9, 9, 9, 9], [1, 2, 4, 6, 7, 8], [9] * 6]  # 9: dropped


def draw(number: int, *shape: int) -> Any:
    return normal(number, *shape, dtype=jnp.bfloat16)


def placement(num_tokens: int | None) -> Placement:
    layout = KVLayout(
        num_pages=9,
        num_layers=1,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=jnp.bfloat16,
        storage_dtype=jnp.bfloat16,
        format=PageFormat(16, "tokens", ("cudnn",)),
    )
    of_rows = jnp.array(TABLE), jnp.array(FIRST), jnp.array(LENGTHS)
    return place_tokens(init_cache(layout), *of_rows, COLUMNS, num_tokens)[0]


PAGES = draw(8, 9, 2, 16, KV_HEADS, DIM)


@pytest.fixture(autouse=True)
def interpreted() -> Any:
    """Kernels run on a CPU, operation by operation."""
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        yield


def test_tokens_are_laid_out_by_row() -> None:
    given = [draw(i, TOKENS, heads, DIM) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    given[2] = given[2].at[3, 1, 2].set(jnp.nan).at[40, 0, 0].set(-jnp.inf)
    where = placement(TOKENS)
    query, key, value = given
    pages, *out = row_layout._lay_out_in_one(query, key, value, PAGES, where)
    stored, *expected = row_layout._lay_out_plain(query, key, value, PAGES, where)
    np.testing.assert_array_equal(pages.astype(jnp.float32), stored.astype(jnp.float32))
    assert bool(jnp.isnan(pages[0, 0, 3, 1, 2])), "the first row begins with page 0"
    for place, (one, other) in enumerate(zip(out, expected, strict=True)):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        assert one.shape == other.shape
        assert bool(jnp.isfinite(one).all()) == (place != 1), "a key tells of a bad value"
        for row, length in enumerate(LENGTHS):
            np.testing.assert_array_equal(one[row, :length], other[row, :length])
            assert not one[row, length:].any()


@pytest.mark.parametrize("num_tokens", [TOKENS, None])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_parts_are_joined_by_token(num_tokens: int | None, window: int | None) -> None:
    shape = (len(FIRST), COLUMNS, HEADS, DIM)
    parts = []
    for number in range(2):
        out, mass = draw(number, *shape), 3 * draw(5 + number, shape[0], HEADS, COLUMNS)
        is_padding = np.arange(COLUMNS)[None, :] >= np.array(LENGTHS)[:, None]
        if number:  # with nothing before it a row has no result
            is_padding |= np.array(FIRST)[:, None] == 0
        out = jnp.where(is_padding[:, :, None, None], jnp.nan, out)
        mass = jnp.where(is_padding[:, None, :], jnp.nan, mass.astype(jnp.float32))
        parts.append(Part(out, mass))
    where = placement(num_tokens)
    found = row_layout._join_in_one(parts[0], parts[1], where, window).astype(jnp.float32)
    expected = row_layout._join_plain(parts[0], parts[1], where, window).astype(jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=1e-6)
    assert bool(jnp.isfinite(found).all())
