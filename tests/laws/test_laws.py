"""What a request generates is its own: no neighbour, order, budget or pool changes it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, RequestOutput, SamplingParams
from tests import dense
from tests.conftest import check_is_empty
from tests.reference import MORE_LIMITS, TIGHT

pytestmark = pytest.mark.usefixtures("optimised")

NUM_REQUESTS = 10


def make_prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 128, length).tolist() for length in rng.integers(1, 85, NUM_REQUESTS)]


KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 30},
    {"top_k": 100, "max_tokens": 25},
    {"temperature": 0.8, "top_k": 20, "max_tokens": 40},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.01, "max_tokens": 35},
    {"frequency_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {5: 4.0}, "max_tokens": 20},
    {"allowed_token_ids": range(40), "presence_penalty": 1.0, "max_tokens": 20},
    {"stop_token_ids": range(3, 128, 2), "min_tokens": 10, "max_tokens": 30},
]


def make_params(index: int) -> SamplingParams:
    """Greedy and seeded requests, with every kind of truncation and edit, of different lengths."""
    return SamplingParams(**{"seed": index, "logprobs": 0} | KINDS[index % len(KINDS)])


def make_llm(model: tuple, **options: Any) -> LLM:
    return LLM(model, **MORE_LIMITS | options)


def run(llm: LLM, order: Sequence[int], arrivals: int = NUM_REQUESTS) -> dict[int, RequestOutput]:
    """Runs requests in an order, `arrivals` of them before each step; checks what is left after."""
    prompts, waiting = make_prompts(), list(order)
    outputs: dict[int, RequestOutput] = {}
    while waiting or llm.has_unfinished_requests():
        for index in waiting[:arrivals]:
            llm.add_request(str(index), prompts[index], make_params(index))
        waiting = waiting[arrivals:]
        for output in llm.step():
            outputs[int(output.request_id)] = output
        llm.engine.scheduler.check()
    check_is_empty(llm)
    assert sorted(outputs) == sorted(order)
    return outputs


def check_same(found: dict[int, RequestOutput], expected: dict[int, RequestOutput]) -> None:
    """Tokens equal, log-probabilities to rounding (other shapes may add up in another order)."""
    for index, output in found.items():
        ours, theirs = output.outputs[0], expected[index].outputs[0]
        assert ours.token_ids == theirs.token_ids, f"request {index}"
        assert ours.finish_reason == theirs.finish_reason
        chex.assert_trees_all_close(
            np.array(ours.cumulative_logprob), np.array(theirs.cumulative_logprob), atol=1e-3
        )


@pytest.fixture(scope="module")
def alone(tiny_model: tuple) -> dict[int, RequestOutput]:
    """Each request by itself in an engine of its own, every step read before the next."""
    outputs: dict[int, RequestOutput] = {}
    for index in range(NUM_REQUESTS):
        outputs |= run(make_llm(tiny_model, max_num_seqs=1, async_scheduling=False), [index])
    return outputs


@pytest.mark.parametrize(
    ("max_num_seqs", "budget"),
    [(4, 16), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((2, 64), (8, 256)))],
)
def test_batch_and_budget_change_no_token(
    tiny_model: tuple, alone: dict, budget: int, max_num_seqs: int
) -> None:
    llm = make_llm(tiny_model, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    check_same(run(llm, range(NUM_REQUESTS)), alone)


@pytest.mark.parametrize("seed", range(3))
def test_arrival_order_changes_no_token(tiny_model: tuple, alone: dict, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(NUM_REQUESTS).tolist()
    check_same(run(make_llm(tiny_model), order, arrivals=1 + seed), alone)


@pytest.mark.parametrize("budget", [16, 64])
def test_preemption_changes_no_token(tiny_model: tuple, alone: dict, budget: int) -> None:
    llm = make_llm(tiny_model, **TIGHT, max_num_batched_tokens=budget)
    outputs = run(llm, range(NUM_REQUESTS))
    assert sum(output.metrics.num_preemptions for output in outputs.values()) >= 1
    check_same(outputs, alone)


def test_priority_changes_the_order_and_no_token(tiny_model: tuple, alone: dict) -> None:
    llm = make_llm(tiny_model, max_num_seqs=2, scheduling_policy="priority")
    prompts = make_prompts()
    for index in range(NUM_REQUESTS):
        llm.add_request(str(index), prompts[index], make_params(index), priority=-index)
    outputs: dict[int, RequestOutput] = {}
    while llm.has_unfinished_requests():
        outputs |= {int(output.request_id): output for output in llm.step()}
    check_same(outputs, alone)
    starts = [outputs[i].metrics.first_scheduled_time_s or 0.0 for i in range(NUM_REQUESTS)]
    assert starts == sorted(starts, reverse=True)


def test_chunked_prefill_off_changes_no_token(tiny_model: tuple, alone: dict) -> None:
    llm = make_llm(tiny_model, max_num_batched_tokens=256, enable_chunked_prefill=False)
    check_same(run(llm, range(NUM_REQUESTS)), alone)


def test_a_cap_on_long_prompts_changes_no_token(tiny_model: tuple, alone: dict) -> None:
    llm = make_llm(tiny_model, long_prefill_token_threshold=24)
    check_same(run(llm, range(NUM_REQUESTS)), alone)


def test_rows_in_bfloat16_are_their_own_too(tiny_directory: Path) -> None:
    """A float32 cache and a least shape of two rows, on CPU."""
    model = dense.load(tiny_directory, jnp.bfloat16)
    llm = make_llm(model, max_num_seqs=2, max_num_batched_tokens=16)
    prompt, params = make_prompts()[0], make_params(2)
    single, _ = llm.generate(
        [prompt, [3]], [params, dataclasses.replace(params, max_tokens=1)], use_tqdm=False
    )
    double = llm.generate([prompt, prompt], params, use_tqdm=False)
    for output in double:
        assert output.outputs[0].token_ids == single.outputs[0].token_ids


def test_real_model_is_unmoved_by_its_neighbours(real_llm: LLM) -> None:
    prompts = ["The sea is", "Once upon a time there was a king who"]
    params = [
        SamplingParams(temperature=0, max_tokens=16),
        SamplingParams(temperature=0.9, top_p=0.8, seed=8, max_tokens=16),
    ]
    together = real_llm.generate(prompts, params, use_tqdm=False)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        single = real_llm.generate(prompt, one, use_tqdm=False)[0]
        assert single.outputs[0].token_ids == output.outputs[0].token_ids
