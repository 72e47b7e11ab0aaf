"""Cases for kernels of attention: sequences in pages, run whole, in chunks and by token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from folojax.kv import KVCache
from folojax.models.core.interface import Scoring
from tests.paged_sequences import (
    WAYS,
    Chunk,
    Heads,
    Tokens,
    Way,
    decode,
    make_cache,
    place,
    random_sequences,
    run_rows,
    store,
)

LENGTHS = [1, 4, 5, 17, 30, 16]
ALL = list(range(len(LENGTHS)))
HEADS, PAGE_SIZE, NUM_PAGES = Heads(2, 3), 8, 16
LATENTS = Heads(1, 11, 24, value_dim=16)
OF_LATENTS = Scoring(scale=0.3, value_dim=16)
DIFFERENT_WAYS = pytest.mark.parametrize(
    "way", [way for way in WAYS if not way.is_twin], indirect=True, ids=str
)


class Case(NamedTuple):
    """Sequences in their pages, with all but the newest token of each cached."""

    sequences: list[Tokens]
    pages: list[list[int]]
    cache: KVCache


def make_case(
    way: Way,
    heads: Heads = HEADS,
    page_size: int = PAGE_SIZE,
    num_pages: int = NUM_PAGES,
    placement: int = 0,
    lengths: Sequence[int] = tuple(LENGTHS),
) -> Case:
    sequences = random_sequences(lengths, heads, dtype=way.dtype)
    usable = -(-sum(-(-length // page_size) for length in lengths) // 8) * 8
    pages = place(lengths, page_size, usable, placement)
    cache = make_cache(way, heads, page_size, max(usable, num_pages))
    return Case(sequences, pages, store(cache, [one.first(-1) for one in sequences], pages))


def whole(order: Sequence[int | None] = tuple(ALL)) -> list[Chunk]:
    return [Chunk(None) if i is None else Chunk(i, 0, LENGTHS[i]) for i in order]


def cut(index: int, columns: int) -> list[Chunk]:
    """A sequence in rows of so many tokens."""
    length = LENGTHS[index]
    return [
        Chunk(index, start, min(start + columns, length)) for start in range(0, length, columns)
    ]


def in_turn(columns: int) -> list[list[Chunk]]:
    """All sequences, a chunk of each in a call; those that are through are padding."""
    cuts = [cut(index, columns) for index in ALL]
    longest = max(map(len, cuts))
    return [[c[turn] if turn < len(c) else Chunk(None) for c in cuts] for turn in range(longest)]


def run_calls(
    case: Case, calls: list[list[Chunk]], columns: int, **options: Any
) -> tuple[KVCache, dict[int, np.ndarray]]:
    """Runs calls one after the other; returns the outputs of each sequence, joined."""
    cache = case.cache
    parts: dict[int, Any] = {}
    for chunks in calls:
        cache, out = run_rows(cache, case.sequences, case.pages, chunks, columns, **options)
        for chunk, part in zip(chunks, out, strict=True):
            if chunk.sequence is not None:
                parts.setdefault(chunk.sequence, []).append(part)
    return cache, {index: np.concatenate(part) for index, part in parts.items()}


def run_step(
    step: str, case: Case, order: Sequence[int | None] = tuple(ALL)
) -> dict[int, np.ndarray]:
    """A step for all of `order`: its output by sequence, and None's finite."""
    if step == "chunk":
        _, out = run_rows(case.cache, case.sequences, case.pages, whole(order), 32)
    else:
        _, out = decode(case.cache, case.sequences, case.pages, order)
    for index, found in zip(order, out, strict=True):
        assert index is not None or np.isfinite(found).all()
    return {index: one for index, one in zip(order, out, strict=True) if index is not None}


def check_close(
    way: Way, got: dict[int, np.ndarray], expected: Any, atol: float | None = None
) -> None:
    for index, out in got.items():
        found = out.astype(np.float64)
        np.testing.assert_allclose(found, expected[index], rtol=0, atol=atol or way.atol)


def check_same(got: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> None:
    for index, out in got.items():
        np.testing.assert_array_equal(out, expected[index])
