"""Laws of a model whose cache keeps latents: one key a token, of which a part is its values."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from folojax import LLM, load_snapshot
from folojax.backend import backend
from tests.greedy_work import PARAMS, Work, begin, check_ends, check_orders, generate, make_work
from tests.reference import TIGHT, TINY_LIMITS

LIMITS = TINY_LIMITS | {"check_integrity": True}


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return make_work("deepseek-v3", tmp_path_factory.mktemp("latent"), LIMITS)


OPTIONS: list[dict[str, Any]] = [
    {"max_num_seqs": 1},
    {"max_num_batched_tokens": 64, "max_num_seqs": 8},
    {"max_num_batched_tokens": 29, "prefill_row_len": 3},
    {"async_scheduling": False, "enable_prefix_caching": False},
    {"max_decode_steps": 4},
    {"deterministic": True},
    {"num_host_pages": 20, "min_swap_tokens": 0} | TIGHT,
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_change_no_token(latent: Work, options: dict[str, Any]) -> None:
    model, prompts, expected = latent
    llm = LLM(model, **LIMITS | options)
    assert generate(llm, prompts) == expected
    assert generate(llm, prompts[::-1]) == expected[::-1]
    if "num_host_pages" in options:
        assert llm.metrics().num_swapped_pages > 0


@pytest.mark.slow
def test_programs_that_are_whole(latent: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one program a step, pages in the order of tokens, in plain XLA."""
    whole = dataclasses.replace(
        backend.CPU, steps="whole", page_order="tokens", kernels=("reference",)
    )
    monkeypatch.setattr(backend, "CPU", whole)
    model, prompts, expected = latent
    assert generate(LLM(model, **LIMITS), prompts) == expected


def test_preemption_forks_and_snapshots_change_no_token(latent: Work, tmp_path: Path) -> None:
    """What a snapshot has of the cache is written to a file, and fits pages of another size."""
    model, prompts, expected = latent
    llm = LLM(model, **LIMITS | TIGHT)
    check_orders(llm, latent)
    (again,) = llm.generate([prompts[3]], PARAMS, use_tqdm=False)
    assert again.num_cached_tokens >= 32
    assert list(again.outputs[0].token_ids) == expected[3]
    begin(llm, latent)
    snapshot = llm.snapshot("a")
    assert snapshot.kv is not None
    config = model[0].config
    assert snapshot.kv.keys.shape[0::2] == (config.num_layers, 1)
    assert snapshot.kv.keys.shape[3] == config.key_dim == config.kv_rank + config.rotary_dim
    assert snapshot.kv.values.size == 0
    snapshot.save(tmp_path / "snapshot")
    llm.resume(load_snapshot(tmp_path / "snapshot"), "c")
    check_ends(llm, latent)


def test_a_token_takes_its_latent_and_what_turns(latent: Work) -> None:
    """In the memory plan and in the arrays, of one head, however many the model has."""
    model, _, _ = latent
    llm = LLM(model, **LIMITS | TIGHT)
    config, plan = model[0].config, llm.memory_plan
    of_token = config.num_layers * (config.kv_rank + config.rotary_dim)
    assert plan.bytes_per_page == 4 * plan.page_size * of_token
    pages = jax.tree.leaves(llm.engine.runner.state.cache)
    assert sum(one.nbytes for one in pages) == plan.pages_bytes
    of_heads = config.num_layers * config.num_heads * (config.head_dim + config.value_dim)
    assert 4 * of_token < of_heads
