"""Penalties, biases and bans through the engine: as transformers has them, and a row's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folojax import LLM, RequestOutput, SamplingParams
from tests import reference
from tests.reference import TIGHT, TINY_LIMITS

NUM_TOKENS = 24
PARAMS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4, "temperature": 0},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "top_p": 0.9, "seed": 1},
    {"logit_bias": {5: 4.0, 6: -4.0}, "seed": 2},
    {"allowed_token_ids": [10, 20, 30, 40, 50], "seed": 3, "frequency_penalty": 0.3},
    {"stop_token_ids": list(range(3, 128, 2)), "min_tokens": 10, "seed": 4},
    {"temperature": 0},
    {"repetition_penalty": 0.6, "temperature": 0.7, "seed": 6, "logprobs": 0},
]


def make_llm(model: tuple, **options: Any) -> LLM:
    return LLM(model, **TINY_LIMITS | options)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 128, length).tolist() for length in rng.integers(2, 60, len(PARAMS))]


def params() -> list[SamplingParams]:
    return [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **row) for row in PARAMS]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def alone(tiny_model: tuple) -> list[list[int]]:
    """Each request with nothing beside it, one after the other in the same slot."""
    llm = make_llm(tiny_model, max_num_seqs=1)
    pairs = zip(prompts(), params(), strict=True)
    return tokens([llm.generate(prompt, one, use_tqdm=False)[0] for prompt, one in pairs])


def test_edits_do_what_they_say(alone: list[list[int]]) -> None:
    assert set(alone[3]) <= {10, 20, 30, 40, 50}
    assert len(alone[4]) > 10
    assert not any(token % 2 and token >= 3 for token in alone[4][:10])


def test_neighbours_and_preemption_change_no_token(
    tiny_model: tuple, alone: list[list[int]]
) -> None:
    """Rows that rejoin are as they were."""
    llm = make_llm(tiny_model, **TIGHT)
    outputs = llm.generate(prompts(), params(), use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in outputs) >= 1
    assert tokens(outputs) == alone


def test_repetition_penalty_and_min_tokens_give_the_tokens_of_transformers(
    tiny_model: tuple, tiny_directory: Path
) -> None:
    import torch
    from transformers import GenerationConfig

    model = reference.load_model(tiny_directory)
    llm = make_llm(tiny_model, max_num_seqs=1)
    stop = list(range(3, 128, 3))
    one = SamplingParams(
        temperature=0,
        repetition_penalty=1.3,
        min_tokens=12,
        max_tokens=NUM_TOKENS,
        stop_token_ids=stop,
        ignore_eos=True,
    )
    outputs = llm.generate(prompts()[:4], one, use_tqdm=False)
    config = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.3,
        min_new_tokens=12,
        max_new_tokens=NUM_TOKENS,
        eos_token_id=stop,
        pad_token_id=0,
    )
    for prompt, found in zip(prompts()[:4], tokens(outputs), strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert found == out[0, len(prompt) :].tolist()
