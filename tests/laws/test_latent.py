"""Laws of a model whose cache keeps latents: one key a token, of which a part is its values."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from folojax import LLM, SamplingParams, load_snapshot
from folojax.backend import backend
from tests import dense, reference
from tests.conftest import check_is_empty
from tests.families import save_family
from tests.reference import TIGHT, TINY_LIMITS

PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
LIMITS = TINY_LIMITS | {"check_integrity": True}


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, prompts, and the tokens that transformers finds likeliest behind them."""
    directory: Path = tmp_path_factory.mktemp("latent")
    theirs = save_family("deepseek-v3", directory)
    model = dense.load(directory)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 128, n).tolist() for n in (1, 84, 17, 70, 33, 5)]
    prompts[4][:20] = prompts[3][:20]
    found = generate(LLM(model, **LIMITS | TIGHT), prompts)
    for prompt, tokens in zip(prompts, found, strict=True):
        logits = reference.logits(theirs, prompt + tokens)[len(prompt) - 1 : -1]
        assert tokens == logits.argmax(axis=-1).tolist()
    return model, prompts, found


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Greedily, all at once; nothing is left behind."""
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    check_is_empty(llm)
    return [list(output.outputs[0].token_ids) for output in outputs]


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
def test_options_change_no_token(latent: Any, options: dict[str, Any]) -> None:
    model, prompts, expected = latent
    llm = LLM(model, **LIMITS | options)
    assert generate(llm, prompts) == expected
    assert generate(llm, prompts[::-1]) == expected[::-1]
    if "num_host_pages" in options:
        assert llm.metrics().num_swapped_pages > 0


@pytest.mark.slow
def test_programs_that_are_whole(latent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one program a step, pages in the order of tokens, in plain XLA."""
    whole = dataclasses.replace(
        backend.CPU, steps="whole", page_order="tokens", kernels=("reference",)
    )
    monkeypatch.setattr(backend, "CPU", whole)
    model, prompts, expected = latent
    assert generate(LLM(model, **LIMITS), prompts) == expected


def test_preemption_forks_and_snapshots_change_no_token(latent: Any, tmp_path: Path) -> None:
    """What a snapshot has of the cache is written to a file, and fits pages of another size."""
    model, prompts, expected = latent
    llm = LLM(model, **LIMITS | TIGHT)
    for order in ([3, 0, 5, 1, 4, 2], [1, 2, 3, 4, 5, 0]):
        found = generate(llm, [prompts[i] for i in order])
        assert found == [expected[i] for i in order]
        assert llm.metrics().num_preemptions > 0
    (again,) = llm.generate([prompts[3]], PARAMS, use_tqdm=False)
    assert again.num_cached_tokens >= 32
    assert list(again.outputs[0].token_ids) == expected[3]
    llm.add_request("a", prompts[2], PARAMS)
    for _ in range(12):
        llm.step()
    llm.fork("a", "b")
    snapshot = llm.snapshot("a")
    assert snapshot.kv is not None
    config = model[0].config
    assert snapshot.kv.keys.shape[0::2] == (config.num_layers, 1)
    assert snapshot.kv.keys.shape[3] == config.key_dim == config.kv_rank + config.rotary_dim
    assert snapshot.kv.values.size == 0
    snapshot.save(tmp_path / "snapshot")
    llm.resume(load_snapshot(tmp_path / "snapshot"), "c")
    found = []
    while llm.has_unfinished_requests():
        found += [list(one.outputs[0].token_ids) for one in llm.step() if one.finished]
    assert found == [expected[2]] * 3
    sampled = SamplingParams(n=3, temperature=1, top_k=1, max_tokens=30, ignore_eos=True)
    (output,) = llm.generate([prompts[4]], sampled, use_tqdm=False)
    assert [list(one.token_ids) for one in output.outputs] == [expected[4]] * 3
    check_is_empty(llm)


def test_a_token_takes_its_latent_and_what_turns(latent: Any) -> None:
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
