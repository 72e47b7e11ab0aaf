"""The kernel for single tokens, interpreted, against softmax in NumPy."""

import functools
from typing import Any, NamedTuple
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.attention import paged_decode
from folojax.kv import Placement
from tests.random_numbers import normal

SIZE, PAGES, DIM = 16, 9, 16
ENDS = [1, 0, 16, 17, 70, 130]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels run on a CPU, operation by operation; pieces are of two pages."""
    monkeypatch.setattr(paged_decode, "_PIECE_TOKENS", 2 * SIZE)
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        yield


class Case(NamedTuple):
    """Rows with a token each, and what lies in their pages."""

    query: Any
    key: Any
    value: Any
    pages: Any
    placement: Placement


def make(heads: int, kv_heads: int) -> Case:
    shapes: list[Any] = [(len(ENDS), n, DIM) for n in (heads, kv_heads, kv_heads)]
    shapes.append((PAGES * 2, 2, SIZE, kv_heads, DIM))
    query, key, value, pages = (
        normal(i, *shape, dtype=jnp.bfloat16) for i, shape in enumerate(shapes)
    )
    free = np.random.default_rng(0).permutation(PAGES * 2).tolist()
    table = np.full((len(ENDS), PAGES), 10**6)  # far outside: nothing there is read
    for row, end in enumerate(ENDS):
        for place in range(-(-end // SIZE)):
            table[row, place] = free.pop()
        if end:  # where its own token will be, and behind it
            pages = pages.at[table[row, (end - 1) // SIZE], 0, (end - 1) % SIZE :].set(jnp.nan)
    ends = jnp.asarray(ENDS)
    nowhere = jnp.zeros(len(ENDS), jnp.int32)
    of_rows = jnp.asarray(table), jnp.maximum(ends - 1, 0), (ends > 0).astype(jnp.int32)
    return Case(query, key, value, pages, Placement(nowhere, nowhere, *of_rows))


def softmax(case: Case, pages: Any, window: int | None, scale: float) -> np.ndarray:
    query, pages = (np.asarray(x, np.float64) for x in (case.query, pages))
    table, out = np.asarray(case.placement.page_table), np.zeros_like(query)
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


def wide(x: Any) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "programs"),  # for at most five pieces
    [
        (6, 2, None, 64),
        (6, 2, 20, 2),
        pytest.param(8, 1, 1, 64, marks=pytest.mark.slow),
        pytest.param(32, 1, 60, 2, marks=pytest.mark.slow),
    ],
)
def test_it_is_softmax(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    window: int | None,
    programs: int,
) -> None:
    monkeypatch.setattr(paged_decode, "_MOST_PROGRAMS", programs)
    case = make(heads, kv_heads)
    assert paged_decode.is_taken(DIM, heads // kv_heads, SIZE, 8.0)
    pages, out = paged_decode.attend_single(*case, window, 0.3)
    np.testing.assert_allclose(wide(out), softmax(case, pages, window, 0.3), atol=0.02)
    # Each row's token is stored, and nothing else.
    expected = case.pages
    for row, end in enumerate(ENDS):
        if end:
            page = int(case.placement.page_table[row, (end - 1) // SIZE])
            for half, one in enumerate((case.key, case.value)):
                expected = expected.at[page, half, (end - 1) % SIZE].set(one[row])
    np.testing.assert_array_equal(wide(pages), wide(expected))


def test_a_value_that_is_not_finite_is_told_by_its_key() -> None:
    case = make(4, 2)
    case = case._replace(value=case.value.at[3, 1, 5].set(jnp.inf))
    pages, out = paged_decode.attend_single(*case, None, 0.3)
    assert bool(jnp.isfinite(pages[:, 1]).all())
    is_told = ~np.isfinite(wide(out)).all(axis=-1)
    np.testing.assert_array_equal(np.argwhere(is_told), [[3, 2], [3, 3]])  # of the second kv head


def test_a_row_has_its_bits_in_any_company() -> None:
    case = make(4, 2)
    _, together = paged_decode.attend_single(*case, None, 0.3)
    for row in (3, 5):
        query, key, value = (one[row : row + 1] for one in case[:3])
        placement = Placement(*(one[row : row + 1] for one in case.placement[:5]))
        _, found = paged_decode.attend_single(query, key, value, case.pages, placement, None, 0.3)
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
