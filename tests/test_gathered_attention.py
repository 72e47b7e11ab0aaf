"""Both ways of attending to gathered pages, against plain attention in float64.

cuDNN itself is not here: `scripts/gpu_check.py prefill` compares it on a card. `jax.nn` takes the
same arguments for its XLA implementation, which runs anywhere.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folojax.gathered_attention import attend_gathered, choose_way

from folojax import gathered_attention
from folojax.models.interface import PLAIN, Scoring

ROWS, COLUMNS, PAGES, SIZE = 3, 8, 4, 8
KV_HEADS, GROUPS, DIM = 2, 3, 16
START = np.array([0, 17, 24])
LENGTH = np.array([5, 8, 0])  # the last row is padding


def arrays() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    query = rng.normal(scale=2, size=(ROWS, COLUMNS, KV_HEADS * GROUPS, DIM))
    keys = rng.normal(size=(ROWS, PAGES, KV_HEADS, DIM, SIZE))
    values = rng.normal(size=(ROWS, PAGES, KV_HEADS, SIZE, DIM))
    return tuple(x.astype(np.float32) for x in (query, keys, values))


def expected(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, row: int, column: int, scoring: Scoring
) -> np.ndarray:
    """One token's output [H, D]."""
    last = START[row] + column
    first = 0 if scoring.window is None else max(0, last + 1 - scoring.window)
    key = np.moveaxis(keys[row], -1, 1).reshape(PAGES * SIZE, KV_HEADS, DIM)[first : last + 1]
    value = np.moveaxis(values[row], 2, 1).reshape(PAGES * SIZE, KV_HEADS, DIM)[first : last + 1]
    out = np.zeros((KV_HEADS * GROUPS, DIM))
    for head in range(KV_HEADS * GROUPS):
        products = key[:, head // GROUPS].astype(np.float64) @ query[row, column, head]
        scores = products * (DIM**-0.5 if scoring.scale is None else scoring.scale)
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ value[:, head // GROUPS]
    return out


def attend(keys: np.ndarray, scoring: Scoring = PLAIN) -> np.ndarray:
    query, _, values = arrays()
    position = START[:, None] + np.arange(COLUMNS)[None, :]
    # A function of its own, or another way's program is found.
    jitted = jax.jit(functools.partial(attend_gathered, scoring=scoring))
    return np.asarray(jitted(query, keys, values, position, START + LENGTH))


@pytest.fixture(params=["plain", "xla"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(gathered_attention, "choose_way", lambda *args: request.param)
    return request.param


@pytest.mark.parametrize(
    "scoring", [PLAIN, Scoring(scale=0.1), Scoring(window=4), Scoring(window=20)], ids=str
)
def test_attends_like_plain_attention(way: str, scoring: Scoring) -> None:
    query, keys, values = arrays()
    out = attend(keys, scoring)
    for row in range(ROWS):
        for column in range(LENGTH[row]):
            np.testing.assert_allclose(
                out[row, column],
                expected(query, keys, values, row, column, scoring),
                rtol=0,
                atol=3e-6,
            )


def test_what_an_earlier_owner_left_is_nothing(way: str) -> None:
    _, keys, _ = arrays()
    left = keys.copy()
    position = np.arange(PAGES * SIZE).reshape(PAGES, SIZE)
    for row in range(ROWS):
        is_left = position >= START[row] + LENGTH[row]
        left[row] = np.where(is_left[:, None, None, :], np.nan, left[row])
    clean, spoilt = attend(keys), attend(left)
    for row in range(ROWS):
        real = slice(0, LENGTH[row])
        np.testing.assert_array_equal(spoilt[row, real], clean[row, real])


def test_a_row_does_not_see_the_others(way: str) -> None:
    _, keys, _ = arrays()
    spoilt = keys.copy()
    spoilt[1] = np.nan
    clean, out = attend(keys), attend(spoilt)
    np.testing.assert_array_equal(out[0], clean[0])
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "head_dim", "scoring", "expected_way"),
    [
        ("gpu", "9.0", jnp.bfloat16, 128, PLAIN, "cudnn"),
        ("gpu", "8.0", jnp.float16, 64, Scoring(window=16, scale=0.2), "cudnn"),
        ("gpu", "9.0", jnp.float32, 128, PLAIN, "plain"),
        ("gpu", "9.0", jnp.bfloat16, 256, PLAIN, "plain"),
        ("gpu", "9.0", jnp.bfloat16, 20, PLAIN, "plain"),
        ("gpu", "9.0", jnp.bfloat16, 128, Scoring(softcap=30.0), "plain"),
        ("gpu", "7.5", jnp.bfloat16, 128, PLAIN, "plain"),
        ("gpu", "gfx942", jnp.bfloat16, 128, PLAIN, "plain"),
        ("cpu", None, jnp.bfloat16, 128, PLAIN, "plain"),
    ],
)
def test_cudnn_is_for_what_it_can(
    platform: str,
    capability: str | None,
    dtype: Any,
    head_dim: int,
    scoring: Scoring,
    expected_way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {} if capability is None else {"compute_capability": capability}
    device = types.SimpleNamespace(platform=platform, **fields)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert choose_way(dtype, head_dim, scoring) == expected_way
