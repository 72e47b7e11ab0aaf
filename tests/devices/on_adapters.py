"""Adapters of requests where several devices share each layer: the tokens of one device."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from folojax import LLM, LoRARequest, RequestOutput, SamplingParams, init_lora
from folojax.models.core.adapted import ADAPTED
from tests import dense
from tests.devices.on_all import check_close, programs_of
from tests.families import save_family
from tests.reference import MORE_LIMITS

ROOM: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 4}
ASKED = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
PROMPTS = [list(range(5, 17)), [70, 3, 9], list(range(5, 21)), [70, 3, 9]]


def trees_of(params: Any) -> list[Any]:
    """Adapters of every kernel that may have one, and of one layer alone."""
    rng = np.random.default_rng(0)

    def shapes(rank: int) -> Any:
        names = tuple(sorted(ADAPTED))
        return jax.eval_shape(lambda: init_lora(jax.random.key(0), params, rank, names))

    every = [
        jax.tree.map(lambda one: rng.normal(0, 0.1, one.shape).astype(np.float32), shapes(rank))
        for rank in (4, 2, 3)
    ]
    return [*every[:2], {"layers_1": every[2]["layers_1"]}]


def run(model: Any, count: int) -> tuple[LLM, list[RequestOutput]]:
    llm = LLM(model, **MORE_LIMITS, **ROOM, tensor_parallel_size=count)
    requests: list[LoRARequest | None] = [
        llm.load_lora(f"a{number}", tree, scale=1.0)
        for number, tree in enumerate(trees_of(model[1]))
    ]
    outputs = llm.generate(PROMPTS, ASKED, False, [*requests, None])
    llm.update_lora("a1", trees_of(model[1])[0])
    return llm, outputs + llm.generate(PROMPTS[1:2], ASKED, False, [requests[1]])


def check(model: Any, count: int) -> LLM:
    (_, known), (llm, found) = run(model, 1), run(model, count)
    check_close(found, known)
    likely = {one.outputs[0].cumulative_logprob for one in found[1:]}
    assert len(likely) == 4  # each adapter does something
    return llm


def test_rows_with_adapters_and_none(tiny_model: tuple) -> None:
    """With no sums beside those of the base, and each device has its part of the updates."""
    llm = check(tiny_model, 2)
    (policy,) = [one for one in llm.list_loras() if one.lora_name == "a0"]
    texts = [one.as_text() for one in programs_of(llm, ASKED, policy)]
    sums = [len(re.findall(r" all-reduce(?:-start)?\(", text)) for text in texts]
    assert set(sums) == {0, 1, 4}  # of sampling, of the embedding, of both layers
    adapters = llm.engine.runner.adapters
    assert adapters is not None
    stacks = adapters._stacks["layers_0"]
    for name, (of_a, of_b) in {"qkv": (64, 32), "o": (32, 64), "down": (None, 64)}.items():
        a, b = stacks[name].a, stacks[name].b[0]
        assert of_a in (None, a.addressable_shards[1].data.shape[3])
        assert b.addressable_shards[1].data.shape[2] == of_b


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("qwen2", 4),
        ("gpt2", 2),
        ("phi3", 2),
        ("deepseek-v3", 4),
        ("glm4-moe", 2),
        ("llama", 4),
        ("qwen3.5", 2),
        ("bamba", 4),
        ("lfm2", 2),
        ("falcon-h1", 2),
        ("falcon-h1", 4),
        ("nemotron-h", 4),
        ("granite-hybrid", 4),
        ("qwen3-next", 2),
        ("gemma4", 2),
        ("gemma4-moe", 4),
    ],
)
def test_families(family: str, count: int, tmp_path: Path) -> None:
    """Fewer heads of keys and values than devices, latents, shared experts, biases, states."""
    save_family(family, tmp_path)
    check(dense.load(tmp_path), count)
