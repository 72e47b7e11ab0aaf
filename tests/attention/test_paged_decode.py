"""The kernel for single tokens, interpreted, against softmax in NumPy."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.attention import paged_decode

SIZE, PAGES, DIM = 16, 90, 16
ENDS = [1, 0, 16, 17, 700, 1300]


@pytest.fixture(autouse=True)
def interpreted() -> Any:
    """Kernels run on a CPU, operation by operation."""
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        yield


def make(heads: int, kv_heads: int) -> tuple[Any, Any, np.ndarray]:
    keys = jax.random.split(jax.random.key(0), 2)
    query = jax.random.normal(keys[0], (len(ENDS), heads, DIM)).astype(jnp.bfloat16)
    pages = jax.random.normal(keys[1], (PAGES * 2, 2, SIZE, kv_heads, DIM)).astype(jnp.bfloat16)
    free = np.random.default_rng(0).permutation(PAGES * 2).tolist()
    table = np.full((len(ENDS), PAGES), 10**6)  # far outside: nothing there is read
    for row, end in enumerate(ENDS):
        for place in range(-(-end // SIZE)):
            table[row, place] = free.pop()
        if end % SIZE:
            last = table[row, end // SIZE]
            pages = pages.at[last, 0, end % SIZE :].set(jnp.nan)
    return query, pages, table


def softmax(query: Any, pages: Any, table: Any, window: int | None, scale: float) -> np.ndarray:
    query, pages = (np.asarray(x, np.float64) for x in (query, pages))
    out = np.zeros_like(query)
    groups = query.shape[1] // pages.shape[3]
    for row, end in enumerate(ENDS):
        first = 0 if window is None else max(0, end - window)
        own = pages[table[row, : -(-end // SIZE)]]  # [N, 2, S, K, D]
        keys, values = (own[:, i].reshape(-1, *pages.shape[3:])[first:end] for i in (0, 1))
        for head in range(query.shape[1] if end else 0):
            scores = keys[:, head // groups] @ query[row, head] * scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ values[:, head // groups]
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window"),
    [(4, 4, None), (6, 2, 20), (8, 1, 1), (32, 1, None), (6, 2, 600)],
)
def test_it_is_softmax(heads: int, kv_heads: int, window: int | None) -> None:
    query, pages, table = make(heads, kv_heads)
    assert paged_decode.is_taken(DIM, heads // kv_heads, SIZE, 8.0)
    given = query, pages, jnp.asarray(table), jnp.asarray(ENDS), window, 0.3
    out = np.asarray(paged_decode.attend_single(*given).astype(jnp.float32))
    np.testing.assert_allclose(out, softmax(query, pages, table, window, 0.3), atol=0.02)


def test_a_row_has_its_bits_in_any_company() -> None:
    query, pages, table = make(4, 2)
    of_rows = (query, jnp.asarray(table), jnp.asarray(ENDS))
    together = paged_decode.attend_single(query, pages, *of_rows[1:], None, 0.3)
    for row in range(len(ENDS)):
        alone, its_table, its_end = (one[row : row + 1] for one in of_rows)
        found = paged_decode.attend_single(alone, pages, its_table, its_end, None, 0.3)
        np.testing.assert_array_equal(found[0], together[row])


@pytest.mark.parametrize(
    ("given", "is_taken"),
    [
        ((128, 4, 64, 8.0), True),
        ((80, 4, 64, 9.0), False),
        ((128, 4, 24, 9.0), False),
        ((8, 4, 64, 9.0), False),
        ((128, 128, 64, 9.0), False),
        ((256, 4, 64, 8.9), False),
        ((256, 4, 64, 9.0), True),
    ],
)
def test_what_it_is_for(given: tuple[int, int, int, float], is_taken: bool) -> None:
    assert paged_decode.is_taken(*given) == is_taken
