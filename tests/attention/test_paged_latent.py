"""The kernels for latents, interpreted, against plain XLA in float32."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.attention import AttentionSpec, paged_decode, reference
from folojax.attention.paged_latent import attend_chunks
from folojax.kv import KVCache, PageFormat, place_tokens
from folojax.models.core.interface import Scoring

SIZE, PAGES, VALUE, TURNING = 64, 12, 32, 16
FORMAT = PageFormat(SIZE, "tokens", ("reference",))
SCALE = 0.2


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels run on a CPU, operation by operation; pieces are of one page."""
    monkeypatch.setattr(paged_decode, "_LATENT_PIECE", SIZE)
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        yield


def check(heads: int, first: Any, length: Any, columns: int, window: int | None) -> None:
    """Tokens lie one behind the other, where a row has several."""
    rows, num_tokens = len(first), None if columns == 1 else sum(length) + 3
    table = np.full((rows, 4), PAGES)  # outside
    free = np.random.default_rng(0).permutation(PAGES).tolist()
    for row in range(rows):
        for place in range(-(-(first[row] + length[row]) // SIZE)):
            table[row, place] = free.pop()
    dim, count = VALUE + TURNING, num_tokens or rows * columns
    keys = jax.random.split(jax.random.key(0), 3)
    shapes: list[Any] = [(count, heads, dim), (count, 1, dim), (PAGES, 1, SIZE, 1, dim)]
    query, key, pages = (
        jax.random.normal(one, shape).astype(jnp.bfloat16)
        for one, shape in zip(keys, shapes, strict=True)
    )
    of_rows = jnp.asarray(table), jnp.asarray(first), jnp.asarray(length)
    cache = KVCache((pages,), FORMAT)
    placement, _ = place_tokens(cache, *of_rows, columns, num_tokens)
    for row in range(rows):  # where its tokens will be, and behind them
        for place in range(first[row], 4 * SIZE):
            if table[row, place // SIZE] < PAGES:
                at = table[row, place // SIZE], 0, place % SIZE, 0, slice(VALUE, None)
                pages = pages.at[at].set(jnp.nan)
    float32, bfloat16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    scoring = Scoring(scale=SCALE, window=window, value_dim=VALUE)
    key = key.at[count // 2, 0, 3].set(jnp.inf)
    wide: Any = [one.astype(float32) for one in (query, key, pages)]
    spec = AttentionSpec(float32, float32, dim, FORMAT, scoring)
    _, exact = reference.KERNEL.attend(wide[0], wide[1], None, wide[2], placement, spec)
    spec = AttentionSpec(bfloat16, bfloat16, dim, FORMAT, scoring)
    stored, _ = reference.KERNEL.attend(query, key, None, pages, placement, spec)
    call = paged_decode.attend_single if columns == 1 else attend_chunks
    found_pages, out = jax.jit(
        functools.partial(call, window=window, scale=SCALE), static_argnums=2
    )(query, key, VALUE, pages, placement)
    np.testing.assert_array_equal(found_pages.astype(float32), stored.astype(float32))
    is_real = np.asarray(placement.page) < PAGES
    out, expected = np.asarray(out, np.float32), np.asarray(exact)
    np.testing.assert_allclose(out[is_real], expected[is_real], atol=0.02)
    assert np.isnan(out).any(), "one token's latent is broken"
    assert np.isfinite(out[~is_real]).all()


@pytest.mark.parametrize(
    ("heads", "window"),
    [(5, None), (5, 20), pytest.param(128, 70, marks=pytest.mark.slow)],
)
def test_single_tokens(heads: int, window: int | None) -> None:
    check(heads, [0, 150, 63, 0], [1, 1, 1, 0], 1, window)


@pytest.mark.parametrize(
    ("heads", "window"),
    [(5, None), (16, 20), pytest.param(128, None, marks=pytest.mark.slow)],
)
def test_chunks(heads: int, window: int | None) -> None:
    check(heads, [0, 40, 70, 0], [16, 3, 9, 0], 16, window)


@pytest.mark.parametrize(
    ("given", "is_taken"),
    [
        ((576, 128, 64, 9.0, 512), True),
        ((576, 16, 64, 8.0, 512), True),
        ((576, 16, 24, 9.0, 512), False),
        ((36, 4, 64, 9.0, 24), False),
        ((1088, 16, 64, 9.0, 1024), False),
    ],
)
def test_what_it_is_for(given: tuple[int, int, int, float, int], is_taken: bool) -> None:
    assert paged_decode.is_taken(*given) == is_taken
