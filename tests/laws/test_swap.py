"""K/V of preempted requests in host memory: the same tokens, and nothing computed again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import RequestOutput, SamplingParams
from folojax.backend.backend import CPU, GPU, Backend
from folojax.backend.swap_cost import NEVER, SwapRates, min_swap_tokens
from folojax.kv import KVCache, KVLayout, PageFormat, init_cache
from folojax.kv.page_copies import PageCopies
from folojax.runner.host_store import HostStore, TokenKV
from folojax.sched.host_pages import PageLoad, PageSave
from tests.conftest import check_is_empty
from tests.mixed_requests import check_same, make_llm, make_prompts, run
from tests.paged_sequences import write
from tests.reference import TIGHT


@pytest.mark.parametrize(
    ("num_host_pages", "options"),
    [
        (3, {"async_scheduling": False}),
        (3, {}),
        (100, {"enable_prefix_caching": False}),
        (100, {"max_decode_steps": 4}),
    ],
    ids=["sync", "async", "no-cache", "decode-steps"],
)
def test_tokens_are_the_same(
    tiny_model: tuple,
    mixed_outputs: list[RequestOutput],
    num_host_pages: int,
    options: dict[str, Any],
) -> None:
    llm = make_llm(
        tiny_model,
        **TIGHT,
        num_host_pages=num_host_pages,
        min_swap_tokens=0,
        check_integrity=True,
        **options,
    )
    check_same(run(llm), mixed_outputs)
    metrics = llm.metrics()
    assert metrics.num_preemptions > 0
    assert 0 < metrics.num_swapped_pages <= metrics.num_preemptions * TIGHT["num_pages"]


@pytest.mark.parametrize("running", ["recompute", "keep", "restart"])
def test_new_weights_while_a_request_is_moved_out(tiny_model: tuple, running: str) -> None:
    """What host memory holds of it is dropped: it goes on by the new weights alone."""
    module, params = tiny_model
    new = jax.tree.map(lambda leaf: leaf * 1.25, params)
    llm = make_llm(
        tiny_model,
        **TIGHT,
        num_host_pages=20,
        min_swap_tokens=0,
        enable_prefix_caching=False,
        check_integrity=True,
    )
    ask = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    prompts = [prompt[:37] for prompt in make_prompts() if len(prompt) >= 37][:3]
    for i, prompt in enumerate(prompts):
        llm.add_request(str(i), prompt, ask)
    for _ in range(200):
        llm.step()
        requests = [live.parts[0] for live in llm.engine.live.values()]
        moved = [request for request in requests if request.saved is not None]
        if moved:
            break
    assert moved
    llm.update_params(new, running=running)
    begins = {request.request_id: list(request.output_token_ids) for request in moved}
    outputs: dict[str, RequestOutput] = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.step()}
    clean = make_llm((module, new))
    for name, begin in begins.items():
        assert not begin or running != "restart"
        rest = dataclasses.replace(ask, max_tokens=60 - len(begin))
        (alone,) = clean.generate(prompts[int(name)] + begin, rest, use_tqdm=False)
        assert outputs[name].outputs[0].token_ids == begin + alone.outputs[0].token_ids
    check_is_empty(llm)


def test_with_room_for_all_less_is_computed_again(tiny_model: tuple) -> None:
    computed = {}
    for num_host_pages in (0, 100):
        llm = make_llm(
            tiny_model,
            **TIGHT,
            num_host_pages=num_host_pages,
            min_swap_tokens=0,
            enable_prefix_caching=False,
        )
        run(llm)
        computed[num_host_pages] = llm.metrics().num_scheduled_tokens
    assert computed[100] < computed[0]


def test_what_is_cheaper_to_compute_is_not_moved(tiny_model: tuple) -> None:
    llm = make_llm(tiny_model, **TIGHT, num_host_pages=100, min_swap_tokens=1000)
    run(llm)
    assert llm.metrics().num_preemptions > 0
    assert llm.metrics().num_swapped_pages == 0


def test_the_estimate_follows_the_machine() -> None:
    """By hand: 1 us against 0.4 us a token, and 6 ms to make up for."""
    rates = SwapRates(flops_per_s=1e12, bytes_per_s=1e10, overhead_s=6e-3)
    assert min_swap_tokens(500_000, 2_000, rates) == pytest.approx(10_001, abs=1)
    assert min_swap_tokens(100_000, 2_000, rates) == NEVER
    # The embedded model: moving wins from a few tokens on.
    assert min_swap_tokens(134_515_008, 2 * 30 * 3 * 64 * 4, CPU.swap_rates) < 16


# --- the store ------------------------------------------------------------------------------------


def make_layout(
    page_size: int, dtype: Any = jnp.float32, backend: Backend = CPU, storage_dtype: Any = None
) -> KVLayout:
    return KVLayout(
        num_pages=40,
        num_layers=2,
        num_kv_heads=3,
        head_dim=8,
        dtype=jnp.dtype(dtype),
        storage_dtype=jnp.dtype(storage_dtype or dtype),
        format=PageFormat(page_size, backend.page_order, backend.kernels),
    )


def make_store(layout: KVLayout, backend: Backend = CPU) -> HostStore:
    return HostStore(layout, PageCopies(backend.arrays_per_copy), backend)


def fill(layout: KVLayout, pages: list[int], kv: TokenKV) -> KVCache:
    """A cache into which tokens were written one by one."""
    cache = init_cache(layout)
    position = np.arange(kv.num_tokens)
    page = jnp.asarray(np.array(pages)[position // layout.page_size])
    offset = jnp.asarray(position % layout.page_size)
    for layer in range(layout.num_layers):
        key, value = jnp.asarray(kv.keys[layer]), jnp.asarray(kv.values[layer])
        cache = write(cache, layer, page, offset, key, value)
    return cache


def make_kv(num_tokens: int, dtype: Any = jnp.float32) -> TokenKV:
    rng = np.random.default_rng(num_tokens)
    keys, values = rng.normal(size=(2, 2, num_tokens, 3, 8)).astype(jnp.dtype(dtype))
    return TokenKV(keys, values)


def check_equal(found: TokenKV, wanted: TokenKV) -> None:
    np.testing.assert_array_equal(found.keys, wanted.keys)
    np.testing.assert_array_equal(found.values, wanted.values)


@pytest.mark.parametrize("backend", [CPU, GPU], ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 8, 150])
def test_pages_come_back_in_other_places(num_tokens: int, dtype: Any, backend: Backend) -> None:
    """150 tokens lie in 38 of 40 pages, more than are copied in one call."""
    layout = make_layout(4, dtype, backend, jnp.float32 if backend.stores_float32 else None)
    store = make_store(layout, backend)
    rng = np.random.default_rng(0)
    num_pages = -(-num_tokens // 4)
    pages, others = (rng.permutation(40)[:num_pages].tolist() for _ in range(2))
    kv = make_kv(num_tokens, dtype)
    cache = fill(layout, pages, kv)
    store.save(cache, [PageSave(7, tuple(pages))])
    check_equal(store.read(7, num_tokens), kv)
    cache = store.load(init_cache(layout), [PageLoad(7, 0, tuple(others))])
    assert len(store) == 0
    store.save(cache, [PageSave(8, tuple(others))])
    check_equal(store.read(8, num_tokens), kv)


def test_only_what_is_missing_is_loaded() -> None:
    layout = make_layout(4)
    store = make_store(layout)
    kv = make_kv(16)
    store.save(fill(layout, [0, 1, 2, 3], kv), [PageSave(1, (0, 1, 2, 3))])
    cache = store.load(init_cache(layout), [PageLoad(1, 2, (30, 5))])
    store.save(cache, [PageSave(2, (0, 1, 30, 5))])
    found = store.read(2, 16)
    check_equal(
        TokenKV(found.keys[:, 8:], found.values[:, 8:]), TokenKV(kv.keys[:, 8:], kv.values[:, 8:])
    )
    assert not found.keys[:, :8].any()


@pytest.mark.parametrize("page_size", [2, 4, 64])
def test_tokens_fit_any_page_size(page_size: int) -> None:
    kv = make_kv(13)
    store = make_store(make_layout(page_size))
    store.put(3, kv)
    check_equal(store.read(3, 13), kv)
    check_equal(store.read(3, 6), kv.take(6))


def test_tokens_of_another_model_are_refused() -> None:
    store = make_store(make_layout(4))
    for kv in (
        TokenKV(np.zeros((3, 5, 3, 8), np.float32), np.zeros((3, 5, 3, 8), np.float32)),
        TokenKV(np.zeros((2, 5, 3, 8), np.float16), np.zeros((2, 5, 3, 8), np.float16)),
    ):
        with pytest.raises(ValueError, match="use the engine's own model and dtype"):
            store.put(1, kv)
    assert len(store) == 0
