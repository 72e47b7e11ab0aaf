"""What cuDNN is given, with an imitation of it that runs anywhere; and what it is not for.

cuDNN itself is in `test_attention_kernels`, where there is a card.
"""

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.attention import KERNELS, AttentionSpec, choose_kernel, cudnn
from folojax.backend import choose_backend
from folojax.backend.backend import GPU
from folojax.backend.devices import Devices
from folojax.config import EngineConfig
from folojax.kv import PageFormat
from folojax.models.core.interface import PLAIN, Scoring
from tests.paged_sequences import (
    Chunk,
    Heads,
    Way,
    attend_rows,
    decode,
    make_cache,
    place,
    random_sequences,
    reference,
    run_rows,
    store,
)

HEADS, SIZE, NUM_PAGES = Heads(2, 3, 8), 8, 24
LENGTHS = [1, 5, 17, 30, 16, 24]
WAY = Way("cudnn", "tokens")
SCORINGS = [
    PLAIN,
    Scoring(scale=0.2),
    *(Scoring(window=window) for window in (1, 3, 8, 9, 20, 200)),
]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What is asked once a process is asked anew."""
    yield
    cudnn.problem.cache_clear()


class Imitation:
    """cuDNN's call in plain JAX, and what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        query: Any,
        keys: Any,
        values: Any,
        lengths: tuple[Any, Any],
        tables: Any,
        bias: Any,
        scale: float,
        *,
        is_causal: bool = False,
        window: int | None = None,
        has_mass: bool = False,
    ) -> Any:
        rows, columns, heads, _ = query.shape
        if tables is not None:
            num_pages = None if bias is None else bias.shape[-1] // keys.shape[1]
            assert tables[0].shape == tables[1].shape
            assert tables[0].shape[:2] == (rows, 1)
            assert num_pages in (None, tables[0].shape[2])
            # A page outside of the pool is nothing that one may read.
            keys, values = (
                pages.at[table[:, 0, :, 0]]
                .get(mode="fill", fill_value=jnp.nan)
                .reshape(rows, -1, *pages.shape[2:])
                for pages, table in zip((keys, values), tables, strict=True)
            )
        self.calls.append(
            {
                "columns": columns,
                "keys": keys.shape[1],
                "is_paged": tables is not None,
                "has_bias": bias is not None,
                "is_causal": is_causal,
                "window": window,
                "has_mass": has_mass,
            }
        )
        assert is_causal or window is None
        keys, values = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (keys, values))
        scores = jnp.einsum("rchd,rthd->rhct", query, keys) * scale
        scores = scores if bias is None else scores + bias
        column = jnp.arange(columns)[None, :, None]
        token = jnp.arange(keys.shape[1])[None, None, :]
        query_length, length = (one[:, None, None] for one in lengths)
        is_seen = (token < length) & (column >= 0)
        if is_causal:  # from the top left: query 0 sees key 0
            is_seen &= token <= column
        if window is not None:
            is_seen &= token > column - window
        is_seen = is_seen[:, None]
        scores = jnp.where(is_seen, scores, -jnp.inf)
        most = scores.max(axis=-1, keepdims=True)
        weights = jnp.where(is_seen, jnp.exp(scores - most), 0.0)
        total = weights.sum(axis=-1, keepdims=True)
        # A key behind the row has no part in the sum, whatever its value; a masked one has.
        is_there = (token < length)[:, 0, :, None, None]
        out = jnp.einsum("rhct,rthd->rchd", weights / total, jnp.where(is_there, values, 0))
        has_result = ((column < query_length) & (length > 0))[..., None]
        out = jnp.where(has_result, out, jnp.nan if has_mass else 0.0).astype(query.dtype)
        mass = (most + jnp.log(total))[..., 0]
        return (out, jnp.where(has_result[:, None, :, 0, 0], mass, jnp.nan)) if has_mass else out


@pytest.fixture
def imitation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Imitation]:
    """In place of cuDNN, for any dtype."""
    found = Imitation()
    monkeypatch.setattr(cudnn, "_call", found)
    monkeypatch.setattr(type(cudnn.KERNEL), "refusal", lambda self, spec: None)
    jitted: Any = attend_rows
    jitted.clear_cache()  # of what was traced with another test's imitation
    yield found
    jitted.clear_cache()


def check(out: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_a_token_that_continues_a_row_is_one_call(imitation: Imitation, scoring: Scoring) -> None:
    """Over its pages, or those that its window touches; the first token of a row too."""
    sequences = random_sequences(LENGTHS, HEADS)
    pages = place(LENGTHS, SIZE, NUM_PAGES)
    cache = make_cache(WAY, HEADS, SIZE, NUM_PAGES)
    cache = store(cache, [one.first(-1) for one in sequences], pages)
    order: list[int | None] = [None, *range(len(LENGTHS)), None]
    _, out = decode(cache, sequences, pages, order, scoring)
    for found, index in zip(out, order, strict=True):
        if index is None:
            assert np.isfinite(found).all()
        else:
            check(found, reference(sequences[index], scoring)[-1])
    window, all_pages = scoring.window, 64 // SIZE
    num_pages = all_pages if window is None else min((window + SIZE - 2) // SIZE + 1, all_pages)
    assert imitation.calls == [
        {
            "columns": 1,
            "keys": num_pages * SIZE,
            "is_paged": True,
            "has_bias": window is not None,
            "is_causal": False,
            "window": None,
            "has_mass": False,
        }
    ]


# Chunks and windows below a page, of a page and above, each way around.
@pytest.mark.parametrize(
    ("columns", "scoring"),
    [
        (8, PLAIN),
        (32, Scoring(scale=0.2)),
        *((columns, Scoring(window=w)) for columns, w in [(5, 1), (8, 3), (8, 8), (5, 9)]),
        *((columns, Scoring(window=w)) for columns, w in [(8, 20), (32, 20), (5, 200)]),
    ],
    ids=str,
)
def test_a_chunk_is_a_call_over_its_own_keys_and_one_over_the_pages_before(
    imitation: Imitation, scoring: Scoring, columns: int
) -> None:
    """From the first on, behind prefixes that end anywhere, and beside rows of padding."""
    sequences = random_sequences(LENGTHS, HEADS)
    pages = place(LENGTHS, SIZE, NUM_PAGES)
    cache = make_cache(WAY, HEADS, SIZE, NUM_PAGES)
    for first in range(0, max(LENGTHS), columns):
        chunks = [
            Chunk(i, first, min(first + columns, length)) if first < length else Chunk(None)
            for i, length in enumerate(LENGTHS)
        ]
        cache, out = run_rows(
            cache, sequences, pages, [*chunks, Chunk(None)], columns, scoring=scoring
        )
        for found, chunk in zip(out, [*chunks, Chunk(None)], strict=True):
            assert np.isfinite(found).all()
            if chunk.sequence is not None:
                expected = reference(sequences[chunk.sequence], scoring)
                check(found, expected[chunk.start : chunk.end])
    own, before = imitation.calls
    window = scoring.window
    is_cut = window is not None and window < columns
    assert own == {
        "columns": columns,
        "keys": columns,
        "is_paged": False,
        "has_bias": False,
        "is_causal": True,
        "window": window if is_cut else None,
        "has_mass": True,
    }
    assert before["is_paged"]
    assert before["has_mass"]
    assert not before["is_causal"]
    assert before["has_bias"] == (window is not None)
    assert before["keys"] <= 64
    if window is not None:
        assert before["keys"] < window + 2 * SIZE


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_numbers_do_not_reach_earlier_tokens_of_their_row(
    imitation: Imitation, bad: float
) -> None:
    """A chunk's own values are as its pages would have them: a weight of zero hides no NaN."""
    (sequence,) = random_sequences([16], HEADS)
    sequence.value[9, :, 3] = bad
    pages = place([16], SIZE, NUM_PAGES)
    cache = make_cache(WAY, HEADS, SIZE, NUM_PAGES)
    _, (out,) = run_rows(cache, [sequence], pages, [Chunk(0, 0, 16)], 16)
    check(out[:9], reference(sequence.first(9)))
    assert np.isnan(out[9:]).any(axis=(1, 2)).all()


@pytest.mark.parametrize("scoring", [PLAIN, Scoring(window=3)], ids=str)
def test_what_hides_is_finite_in_half_precision(imitation: Imitation, scoring: Scoring) -> None:
    """A row whose every key is hidden would be NaN in cuDNN."""
    way = WAY._replace(dtype=np.float16)
    sequences = random_sequences(LENGTHS, HEADS, dtype=np.float16)
    pages = place(LENGTHS, SIZE, NUM_PAGES)
    cache = make_cache(way, HEADS, SIZE, NUM_PAGES)
    cache = store(cache, sequences, pages)
    chunks = [Chunk(i, length // 2, length) for i, length in enumerate(LENGTHS)]
    _, out = run_rows(cache, sequences, pages, chunks, 16, scoring=scoring)
    for index, found in enumerate(out):
        expected = reference(sequences[index], scoring)[LENGTHS[index] // 2 :]
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=0, atol=0.03)


SPEC = AttentionSpec(
    jnp.dtype(jnp.bfloat16),
    jnp.dtype(jnp.bfloat16),
    128,
    PageFormat(64, "tokens", ("cudnn",), 9.0),
    PLAIN,
)
AMPERE = PageFormat(64, "tokens", ("cudnn",), 8.9)


def change(**fields: Any) -> AttentionSpec:
    return AttentionSpec(**{**vars(SPEC), **fields})


@pytest.fixture
def with_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 90000)
    cudnn.problem.cache_clear()


FLOAT32 = jnp.dtype(jnp.float32)
FLOAT16 = jnp.dtype(jnp.float16)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (SPEC, None),
        (change(dtype=FLOAT16, storage_dtype=FLOAT16, head_dim=64, page_format=AMPERE), None),
        (change(head_dim=256), None),
        (change(scoring=Scoring(window=16, scale=0.2), page_format=AMPERE), None),
        (change(page_format=PageFormat(64, "heads", ("cudnn",), 9.0)), "order of tokens"),
        (change(dtype=FLOAT32, storage_dtype=FLOAT32), "takes bfloat16 and float16"),
        (change(storage_dtype=FLOAT32), "takes bfloat16 and float16"),
        (change(scoring=Scoring(softcap=30.0)), "does not cap scores"),
        (change(head_dim=20), "multiples of 8 up to 256 here"),
        (change(head_dim=256, page_format=AMPERE), "multiples of 8 up to 128 here"),
        (
            change(page_format=PageFormat(64, "tokens", ("cudnn",), 7.5)),
            "needs an NVIDIA GPU of the Ampere generation or later",
        ),
        (change(page_format=PageFormat(64, "tokens", ("cudnn",))), "needs an NVIDIA GPU"),
    ],
)
def test_what_it_is_not_for(spec: AttentionSpec, reason: str | None, with_cudnn: None) -> None:
    found = KERNELS["cudnn"].refusal(spec)
    if reason is None:
        assert found is None
        assert choose_kernel(spec)[0] == "cudnn"
    else:
        assert reason in str(found)
        with pytest.raises(ValueError, match=f"cudnn .*{reason}"):
            choose_kernel(spec)


@pytest.mark.parametrize(
    ("platform", "fields", "capability"),
    [
        ("gpu", {"compute_capability": "8.9"}, 8.9),
        ("gpu", {"compute_capability": "gfx942"}, 0.0),
        ("tpu", {}, 0.0),
    ],
)
def test_the_backend_knows_the_card(
    platform: str, fields: dict[str, str], capability: float
) -> None:
    tell: Any = {"process_index": 0, "memory_stats": lambda: None}
    device: Any = types.SimpleNamespace(platform=platform, **tell, **fields)
    devices = Devices((device,))
    backend = choose_backend(devices)
    assert (backend.name, backend.capability) == (platform, capability)
    known: dict[str, Any] = {"name": platform, "capability": capability, "devices": devices}
    assert backend == dataclasses.replace(GPU, **known)


@pytest.mark.parametrize(("gigabytes", "budget"), [(18, 4096), (60, 8192), (None, 4096)])
def test_a_large_card_computes_more_tokens_in_a_step(gigabytes: int | None, budget: int) -> None:
    stats = None if gigabytes is None else {"bytes_limit": gigabytes * 2**30}
    tell: Any = {"process_index": 0, "memory_stats": lambda: stats}
    device: Any = types.SimpleNamespace(platform="gpu", compute_capability="9.0", **tell)
    backend = choose_backend(Devices((device,)))
    assert EngineConfig().resolve(4096, backend).max_num_batched_tokens == budget
    assert EngineConfig(max_num_batched_tokens=512).resolve(4096, backend).prefill_row_len == 128


def test_it_needs_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def fail() -> None:
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused, "check_cudnn_version", fail)
    cudnn.problem.cache_clear()
    assert cudnn.KERNEL.refusal(SPEC) == "is not to be had: cuDNN is not detected."


def test_a_jax_whose_call_is_another_is_refused(
    monkeypatch: pytest.MonkeyPatch, with_cudnn: None
) -> None:
    """By its arguments: it is private to JAX, and may change at any time."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(jax, "__version__", "0.99.1")
    assert cudnn.problem() is None
    monkeypatch.setattr(fused, "_dot_product_attention", lambda query, key, value: None)
    cudnn.problem.cache_clear()
    assert "in JAX 0.99.1" in str(cudnn.KERNEL.refusal(SPEC))
    monkeypatch.delattr(fused, "_dot_product_attention")
    cudnn.problem.cache_clear()
    assert "is not to be had" in str(cudnn.KERNEL.refusal(SPEC))
