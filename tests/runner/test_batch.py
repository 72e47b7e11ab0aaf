"""The batch's host arrays; and pages with several owners, from page tables to attention."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import SamplingParams
from folojax.attention import attend
from folojax.backend.backend import CPU, GPU, Backend
from folojax.kv import KVCache, KVLayout, PageFormat, init_cache, place_tokens
from folojax.requests.sampling_params import SamplingRequest
from folojax.runner.batch import Batch, Chunk
from folojax.sched.request import StopRule
from folojax.sched.step_plan import StepPlan
from folojax.steps.state import DecodeInputs

M, P, S, K, G, D, MAX_PAGES = 32, 40, 4, 2, 3, 8, 10


def request(name: str, num_tokens: int, pages: Sequence[int]) -> SamplingRequest:
    return SamplingRequest(
        name,
        tuple(range(num_tokens)),
        StopRule(max_tokens=1),
        num_computed_tokens=num_tokens - 1,
        page_ids=list(pages),
        sampling_params=SamplingParams(temperature=0),
    )


def plan(
    joining: dict[str, tuple[int, Sequence[int]]] | None = None,
    growing: dict[str, Sequence[int]] | None = None,
    finished: Sequence[str] = (),
    preempted: Sequence[str] = (),
) -> StepPlan:
    """A plan of requests that join with (tokens, pages) or are given more pages."""
    joining, growing = joining or {}, growing or {}
    return StepPlan(
        new_requests=tuple(request(name, count, pages) for name, (count, pages) in joining.items()),
        new_page_ids={name: list(pages) for name, pages in growing.items()},
        num_scheduled_tokens=dict.fromkeys((*joining, *growing), 1),
        total_num_scheduled_tokens=len(joining) + len(growing),
        sampled_request_ids=(),
        finished_request_ids=tuple(finished),
        preempted_request_ids=tuple(preempted),
    )


def make_batch() -> Batch:
    return Batch(M, MAX_PAGES, P, vocab_size=16)


def test_rows_join_grow_and_leave_without_a_trace() -> None:
    batch = make_batch()
    batch.update(plan({"a": (9, [3, 7, 1]), "b": (3, [0])}))
    batch.update(plan(growing={"b": [5, 6]}))
    slots = [batch.rows["b"].slot, batch.rows["a"].slot]
    batch.advance(slots, [1, 0])
    assert batch.num_row_pages[slots].tolist() == [3, 3]
    batch.check({"a": [3, 7, 1], "b": [0, 5, 6]})
    inputs = batch.decode_inputs(4, slots)
    np.testing.assert_array_equal(inputs.slot, [1, 0, M, M])
    np.testing.assert_array_equal(inputs.token, [-1, 8, -1, -1])  # "b" has sampled since
    np.testing.assert_array_equal(inputs.position, [3, 8, 0, 0])
    assert inputs.page_table.shape == (4, MAX_PAGES)
    expected = [[0, 5, 6, P], [3, 7, 1, P], [P] * 4, [P] * 4]
    np.testing.assert_array_equal(inputs.page_table[:, :4], expected)
    assert (inputs.page_table[:, 4:] == P).all()
    batch.update(plan({"c": (2, [0])}, finished=["b"], preempted=["a"]))
    assert batch.rows["c"].slot == 0
    batch.clear()
    batch.check_is_empty()


def test_an_id_may_be_used_again_in_the_step_that_drops_it() -> None:
    batch = make_batch()
    batch.update(plan({"a": (9, [3, 7, 1])}))
    batch.update(plan({"a": (2, [2])}, finished=["a"]))
    assert batch.num_row_pages[batch.rows["a"].slot] == 1
    batch.update(plan(finished=["a", "never seen"]))
    batch.check_is_empty()


def test_chunks_are_packed_into_rows() -> None:
    batch = make_batch()
    batch.update(plan({"a": (9, [3, 7, 1]), "b": (3, [0])}))
    a, b = batch.rows["a"], batch.rows["b"]
    chunks = [Chunk(a, 0, 4, False), Chunk(a, 4, 8, False), Chunk(b, 1, 3, True)]
    inputs = batch.prefill_inputs(4, 4, chunks)
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [1, 2, 0, 0], [0] * 4]
    np.testing.assert_array_equal(inputs.tokens, expected)
    np.testing.assert_array_equal(inputs.start, [0, 4, 1, 0])
    np.testing.assert_array_equal(inputs.length, [4, 4, 2, 0])
    expected = [[3, 7, 1, P], [3, 7, 1, P], [0, P, P, P], [P] * 4]
    np.testing.assert_array_equal(inputs.page_table[:, :4], expected)


def test_rows_may_be_tokens_of_one_request() -> None:
    """As in deterministic mode: known tokens are given, others are those that the slot sampled."""
    batch = make_batch()
    batch.update(plan({"a": (3, [3]), "b": (9, [0, 1, 2])}))
    a, b = batch.rows["a"].slot, batch.rows["b"].slot
    inputs = batch.decode_inputs(6, [b, b, a, a], [7, 8, 2, 3])
    np.testing.assert_array_equal(inputs.slot, [b, b, a, a, M, M])
    np.testing.assert_array_equal(inputs.token, [7, 8, 2, -1, -1, -1])
    np.testing.assert_array_equal(inputs.position, [7, 8, 2, 3, 0, 0])
    expected = [[0, 1, 2, P]] * 2 + [[3, P, P, P]] * 2 + [[P] * 4] * 2
    np.testing.assert_array_equal(inputs.page_table[:, :4], expected)


def test_rows_with_most_pages_go_first() -> None:
    batch = make_batch()
    batch.update(plan({"a": (2, [3]), "b": (9, [0, 1, 2]), "c": (9, [4, 5, 6]), "d": (5, [7, 8])}))
    assert [row.request_id for row in batch.longest_first("abcd")] == ["b", "c", "d", "a"]


# --- shared pages ---------------------------------------------------------------------------


def make_cache(rng: np.random.Generator, page_format: PageFormat) -> KVCache:
    layout = KVLayout(
        num_pages=P,
        num_layers=1,
        num_kv_heads=K,
        head_dim=D,
        dtype=jnp.float32,
        storage_dtype=jnp.float32,
        format=page_format,
    )
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)),
        init_cache(layout),
    )


@jax.jit
def attend_row_tokens(
    cache: KVCache, inputs: DecodeInputs, query: Any, key: Any, value: Any
) -> Any:
    is_there = (inputs.slot < M).astype(jnp.int32)
    placement, _ = place_tokens(cache, inputs.page_table, inputs.position, is_there, 1)
    return attend(placement, cache, 0, query, key, value)


def reference(cache: KVCache, pages: Sequence[int], position: int, query: Any) -> np.ndarray:
    """Attention of one query [H, D] to the tokens up to `position` of some pages, in float64."""
    held = np.asarray(cache.format.by_token(cache.layers[0]), np.float64)[np.array(pages)]
    key, value = (held[:, i].reshape(-1, K, D)[: position + 1] for i in range(2))
    out = []
    for head, q in enumerate(np.asarray(query, np.float64)):
        scores = key[:, head // G] @ q / np.sqrt(D)
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ value[:, head // G])
    return np.array(out)


@pytest.mark.parametrize("backend", [CPU, GPU], ids=lambda backend: backend.name)
@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("num_owners", [2, 9, 20])
def test_rows_that_share_pages_attend_like_plain_attention(
    num_owners: int, is_exact: bool, backend: Backend
) -> None:
    """Pages 7 and 30 belong to everybody, 2 to the even rows; each row ends in a page of its own.

    In the layout of each platform, and with the kernels of either mode.
    """
    rng = np.random.default_rng(num_owners)
    own = rng.permutation([page for page in range(P) if page not in (7, 30, 2)]).tolist()
    tables = {
        str(i): [7, 30, *([2] if i % 2 == 0 else []), own.pop()] for i in range(num_owners)
    } | {"alone": [own.pop(), own.pop()]}
    kernels = backend.exact_kernels if is_exact else backend.kernels
    cache = make_cache(rng, PageFormat(S, backend.page_order, kernels))
    batch = make_batch()
    # The last token stands anywhere in the last page.
    lengths = {name: len(pages) * S - i % S for i, (name, pages) in enumerate(tables.items())}
    batch.update(plan({name: (lengths[name], pages) for name, pages in tables.items()}))
    batch.check(tables)
    slots = [batch.rows[name].slot for name in tables]
    positions = [lengths[name] - 1 for name in tables]
    inputs = batch.decode_inputs(24, slots)
    assert inputs.position[: len(positions)].tolist() == positions
    query = rng.normal(size=(24, K * G, D)).astype(np.float32)
    key, value = rng.normal(size=(2, 24, K, D)).astype(np.float32)
    cache, out = attend_row_tokens(cache, inputs, query, key, value)
    for i, pages in enumerate(tables.values()):
        expected = reference(cache, pages, positions[i], query[i])
        np.testing.assert_allclose(out[i], expected, rtol=0, atol=2e-6)
    assert np.isfinite(out).all()
