"""The batch's host arrays; and pages with several owners, from page tables to attention."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folojax.buckets import DecodeShape
from folojax.kv_cache import KVCache, KVLayout

from folojax import SamplingParams, kv_cache
from folojax.attention import attend_tokens, plan_tokens
from folojax.batch import Batch
from folojax.models.platforms import tracing_for
from folojax.row_params import RowParams
from folojax.sched.plan import NewRequest, SchedulerOutput
from folojax.state import DecodeInputs

M, P, S, K, G, D, MAX_PAGES = 32, 40, 4, 2, 3, 8, 10
GREEDY = RowParams(SamplingParams(temperature=0), 0)


def plan(
    joining: dict[str, tuple[int, Sequence[int]]] | None = None,
    growing: dict[str, Sequence[int]] | None = None,
    finished: Sequence[str] = (),
    preempted: Sequence[str] = (),
) -> SchedulerOutput:
    """A plan of requests that join with (tokens, pages) or are given more pages."""
    joining, growing = joining or {}, growing or {}
    return SchedulerOutput(
        new_requests=tuple(
            NewRequest(name, tuple(range(count)), (), GREEDY, count - 1, tuple(pages))
            for name, (count, pages) in joining.items()
        ),
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
    assert batch.extent[slots].tolist() == [7, 8]
    batch.check({"a": [3, 7, 1], "b": [0, 5, 6]})
    inputs = batch.decode_inputs(DecodeShape(4, 1, 4), slots)
    np.testing.assert_array_equal(inputs.slot, [1, 0, M, M])
    np.testing.assert_array_equal(inputs.token, [-1, 8, -1, -1])  # "b" has sampled since
    np.testing.assert_array_equal(inputs.position, [3, 8, 0, 0])
    np.testing.assert_array_equal(inputs.page_table, [[0, 5, 6, P], [3, 7, 1, P], [P] * 4, [P] * 4])
    assert inputs.shared is None
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


# --- shared pages ---------------------------------------------------------------------------


def make_cache(rng: np.random.Generator) -> KVCache:
    layout = KVLayout(
        segments=(24, P - 24),
        page_size=S,
        num_layers=1,
        num_kv_heads=K,
        head_dim=D,
        dtype=jnp.dtype(jnp.float32),
    )
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)),
        kv_cache.init_cache(layout),
    )


@jax.jit
def attend(cache: KVCache, inputs: DecodeInputs, query: Any, key: Any, value: Any) -> Any:
    return attend_tokens(plan_tokens(inputs, cache), cache, 0, query, key, value)


def reference(cache: KVCache, pages: Sequence[int], position: int, query: Any) -> np.ndarray:
    """Attention of one query [H, D] to the tokens up to `position` of some pages, in float64."""
    every = jnp.arange(kv_cache.num_pages(cache))
    pages_of = kv_cache.gather_pages(cache, 0, every, jnp.dtype("float32"))
    keys, values = (np.asarray(part, np.float64) for part in pages_of)
    key = np.concatenate([keys[page].transpose(2, 0, 1) for page in pages])[: position + 1]
    value = np.concatenate([values[page].transpose(1, 0, 2) for page in pages])[: position + 1]
    out = []
    for head, q in enumerate(np.asarray(query, np.float64)):
        scores = key[:, head // G] @ q / np.sqrt(D)
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ value[:, head // G])
    return np.array(out)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
@pytest.mark.parametrize("num_owners", [2, 9, 10, 20])
def test_rows_that_share_pages_attend_like_plain_attention(num_owners: int, name: str) -> None:
    """Pages 7 and 30 belong to everybody, 2 to the even rows; each row ends in a page of its own.

    The parameter lets an item of 8 further owners be partly full, full, and overflow; in the
    layout of each platform.
    """
    with tracing_for(name):
        check_shared(num_owners)


def check_shared(num_owners: int) -> None:
    rng = np.random.default_rng(num_owners)
    own = rng.permutation([page for page in range(P) if page not in (7, 30, 2)]).tolist()
    tables = {
        str(i): [7, 30, *([2] if i % 2 == 0 else []), own.pop()] for i in range(num_owners)
    } | {"alone": [own.pop(), own.pop()]}
    batch, cache = make_batch(), make_cache(rng)
    # The last token stands anywhere in the last page.
    lengths = {name: len(pages) * S - i % S for i, (name, pages) in enumerate(tables.items())}
    batch.update(plan({name: (lengths[name], pages) for name, pages in tables.items()}))
    batch.check(tables)
    slots = [batch.rows[name].slot for name in tables]
    items = batch.num_shared_items(slots, lanes=8)
    sharing = [num_owners, num_owners, -(-num_owners // 2)]
    assert items == sum(-(-(count - 1) // 8) for count in sharing)

    shape = DecodeShape(24, 2, 4, shared_items=16, shared_lanes=8)
    positions = [lengths[name] - 1 for name in tables]
    inputs = batch.decode_inputs(shape, slots)
    assert inputs.position[: len(positions)].tolist() == positions
    query = rng.normal(size=(24, K * G, D)).astype(np.float32)
    key, value = rng.normal(size=(2, 24, K, D)).astype(np.float32)
    cache, out = attend(cache, inputs, query, key, value)
    for i, pages in enumerate(tables.values()):
        expected = reference(cache, pages, positions[i], query[i])
        np.testing.assert_allclose(out[i], expected, rtol=0, atol=2e-6)
    assert np.isfinite(out).all()


def test_without_shared_pages_there_are_no_items() -> None:
    batch = make_batch()
    batch.update(plan({"a": (9, [3, 7, 1]), "b": (3, [0])}))
    assert batch.num_shared_items([0, 1], lanes=8) == 0
    batch.update(plan({"c": (9, [3, 7, 2])}))
    assert batch.num_shared_items([0, 1, 2], lanes=8) == 2
    # The sharing row takes no part in this step.
    assert batch.num_shared_items([0, 1], lanes=8) == 0
