"""Attention in the order of positions, interpreted: against softmax in NumPy, and bit by bit."""

import functools
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.attention import paged_ordered
from folojax.kv import KVCache, PageFormat, place_tokens
from tests.random_numbers import normal

PAGES, DIM, TABLE = 40, 16, 9


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels run on a CPU, operation by operation; blocks are of 16 positions, pieces of two."""
    monkeypatch.setattr(paged_ordered, "_BLOCK", 16)
    monkeypatch.setattr(paged_ordered, "_PIECE_BLOCKS", 2)
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        yield


class Requests:
    """Keys, values and queries of whole requests, computed in calls of any kind."""

    def __init__(self, lengths: list[int], heads: int, kv_heads: int, size: int) -> None:
        self.lengths, self.size = lengths, size
        shapes = [(n, count, DIM) for n in lengths for count in (heads, kv_heads, kv_heads)]
        found = [normal(i, *one, dtype=jnp.bfloat16) for i, one in enumerate(shapes)]
        self.query, self.key, self.value = found[0::3], found[1::3], found[2::3]
        # What earlier owners left: keys of NaN, values of any finite number.
        self.pages = jnp.full((PAGES, 2, size, kv_heads, DIM), jnp.nan, jnp.bfloat16)
        self.pages = self.pages.at[:, 1].set(7.0)
        free = np.random.default_rng(0).permutation(PAGES).tolist()
        self.table = np.full((len(lengths), TABLE * 16 // size), PAGES, np.int32)
        for row, length in enumerate(lengths):
            for place in range(-(-length // size)):
                self.table[row, place] = free.pop()

    def call(
        self,
        chunks: list[tuple[int, int, int]],  # request, first token, end
        columns: int,
        window: int | None,
        most_tokens: int | None = None,
    ) -> list[np.ndarray]:
        """Attention of the tokens of chunks, with padding behind them.

        The interpreter needs that much: what a mask leaves out it writes back as it was.
        """
        cache = KVCache((self.pages,), PageFormat(self.size, "tokens", ("ordered",)))
        spare = -(-64 // columns)
        whose, low, high = (np.array(one) for one in zip(*chunks, strict=True))
        table = np.pad(self.table[whose], ((0, spare), (0, 0)), constant_values=PAGES)
        first, length = (
            jnp.asarray(np.pad(one, (0, spare)), jnp.int32) for one in (low, high - low)
        )
        placement, _ = place_tokens(cache, jnp.asarray(table), first, length, columns, most_tokens)

        def laid(given: list[Any]) -> Any:
            rows = [given[one][low:high] for one, low, high in chunks] + [given[0][:0]] * spare
            rows = [jnp.pad(row, ((0, columns - len(row)), (0, 0), (0, 0))) for row in rows]
            return placement.by_token(jnp.stack(rows))

        query, key, value = map(laid, (self.query, self.key, self.value))
        self.pages, out = paged_ordered.attend_in_order(
            query, key, value, self.pages, placement, window, 0.3
        )
        assert bool(jnp.isfinite(out).all()), "padding is finite"
        by_row = np.asarray(placement.by_row(out.astype(jnp.float32)))
        return [row[: high - low] for row, (_, low, high) in zip(by_row, chunks, strict=False)]

    def expected(self, request: int, window: int | None) -> np.ndarray:
        """Softmax in float64."""
        query, key, value = (
            np.asarray(x[request].astype(jnp.float32), np.float64)
            for x in (self.query, self.key, self.value)
        )
        groups = query.shape[1] // key.shape[1]
        key, value = (np.repeat(x, groups, axis=1) for x in (key, value))
        scores = np.einsum("qhd,khd->hqk", query, key) * 0.3
        index = np.arange(len(query))
        distance = index[:, None] - index[None, :]
        is_seen = (distance >= 0) & (distance < (window or len(query)))
        scores = np.where(is_seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), value)


LENGTHS = [40, 1, 33]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window", "ways", "first_alone"),
    [
        (4, 2, 16, None, [(48, 0), (1, 2**26)], 39),
        pytest.param(3, 1, 8, 20, [(48, 0), (1, 0)], 36, marks=pytest.mark.slow),
        pytest.param(8, 1, 32, 1, [(48, 0), (32, 0), (1, 2**26)], 36, marks=pytest.mark.slow),
        pytest.param(6, 2, 16, 40, [(32, 0), (1, 2**26), (1, 0)], 36, marks=pytest.mark.slow),
    ],
)
def test_it_is_softmax_in_chunks_and_by_token(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
    ways: list[tuple[int, int]],  # columns, bytes for the sums of pieces
    first_alone: int,
) -> None:
    """And the last tokens of the requests have the same bits one by one."""
    found = []
    for columns, most_bytes in ways:
        monkeypatch.setattr(paged_ordered, "_MOST_PARTIAL_BYTES", most_bytes)
        requests = Requests(LENGTHS, heads, kv_heads, size)
        chunked = columns if columns > 1 else first_alone  # the last tokens one by one
        first, outs = 0, [np.zeros((0, heads, DIM))] * len(LENGTHS)
        while first < max(LENGTHS):
            now = chunked if first < first_alone else columns
            chunks = [
                (one, first, min(first + now, length))
                for one, length in enumerate(LENGTHS)
                if first < length
            ]
            most = sum(high - low for _, low, high in chunks) + 64 if now > 1 else None
            given = zip(chunks, requests.call(chunks, now, window, most), strict=True)
            for (one, _, _), out in given:
                outs[one] = np.concatenate([outs[one], out])
            first += now
        for one, out in enumerate(outs):
            np.testing.assert_allclose(out, requests.expected(one, window), atol=0.03)
        found.append(outs)
    for outs in found[1:]:
        np.testing.assert_array_equal(outs[0][first_alone:], found[0][0][first_alone:])
