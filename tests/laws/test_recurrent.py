"""Laws of a model with recurrent layers: a request's state is its own, and ends with it."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from folojax import LLM, SamplingParams
from folojax.backend import backend
from tests.conftest import check_is_empty
from tests.greedy_work import PARAMS, Work, begin, check_ends, check_orders, generate, make_work
from tests.reference import TIGHT, TINY_LIMITS

# Two rows of prompts in a call, so that rows of one prompt follow each other.
LIMITS = TINY_LIMITS | {"max_num_batched_tokens": 32, "check_integrity": True}


@pytest.fixture(
    scope="module",
    params=[
        "qwen3.5",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("nemotron-h", "lfm2", "falcon-h1")),
    ],
)
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return make_work(request.param, tmp_path_factory.mktemp("hybrid"), LIMITS)


OPTIONS: list[dict[str, Any]] = [
    {"max_num_seqs": 1},
    {"max_num_batched_tokens": 16},
    {"max_num_batched_tokens": 29, "prefill_row_len": 3},
    {"prefill_row_len": 128, "max_num_batched_tokens": 300},
    {"async_scheduling": False},
    {"max_decode_steps": 4},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_change_no_token(hybrid: Work, options: dict[str, Any]) -> None:
    model, prompts, expected = hybrid
    assert generate(LLM(model, **LIMITS | options), prompts) == expected


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_decode_steps": 4}], ids=str)
def test_programs_that_are_whole(
    hybrid: Work, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: one program a step, and tokens of prompts one behind the other."""
    whole = dataclasses.replace(backend.CPU, steps="whole")
    monkeypatch.setattr(backend, "CPU", whole)
    model, prompts, expected = hybrid
    llm = LLM(model, **LIMITS | options)
    assert llm.engine.runner.shapes.prefill_tokens is not None
    for _ in range(2):
        assert generate(llm, prompts) == expected


def test_preemption_forks_and_snapshots_change_no_token(hybrid: Work) -> None:
    """In an engine whose slots hold the states of others already, and after it has slept."""
    llm = LLM(hybrid.model, **LIMITS | TIGHT)
    check_orders(llm, hybrid)
    llm.sleep()
    llm.wake_up()
    check_orders(llm, hybrid)
    begin(llm, hybrid)
    snapshot = llm.snapshot("a")
    assert snapshot.kv is None, "without the states it would be of no use"
    llm.resume(snapshot, "c")
    check_ends(llm, hybrid)


def test_what_a_state_was_before_is_never_seen(hybrid: Work) -> None:
    """NaN in every state, as a request that went wrong leaves it."""
    model, prompts, expected = hybrid
    llm = LLM(model, **LIMITS | TIGHT)
    runner = llm.engine.runner
    cache = runner.state.cache
    states = [jax.tree.map(lambda leaf: leaf * np.nan, one) for one in cache.states]
    assert states
    runner.state = runner.state._replace(cache=cache.with_states(states))
    assert generate(llm, prompts) == expected


def test_states_are_in_the_memory_plan(hybrid: Work) -> None:
    model, _, _ = hybrid
    few, more = (LLM(model, **LIMITS | TIGHT | {"max_num_seqs": n}) for n in (2, 8))
    states = few.engine.runner.state.cache.states
    # Of two that run, two kept, and that of padding.
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(states)) // 5
    assert more.memory_plan.slots_bytes - few.memory_plan.slots_bytes == 12 * one
    pages = few.engine.runner.state.cache.pages
    is_beside = model[0].config.recurrent.is_beside
    assert sum(one.nbytes > 0 for one in pages) == (2 if is_beside else 1)
    assert sum(one.nbytes for one in pages) == few.memory_plan.pages_bytes


def test_a_prompt_is_found_where_a_state_was_kept(hybrid: Work) -> None:
    """At its last full page; where prompts part, from the third on; where that of a group ends."""
    model, prompts, expected = hybrid
    # In these limits, so that programs are those of the other tests.
    llm = LLM(model, **LIMITS | TIGHT)
    prompt, tokens = prompts[3], expected[3]  # 70 tokens, pages of 16

    def cached(given: list[int]) -> tuple[int, list[int]]:
        (output,) = llm.generate([given], PARAMS, use_tqdm=False)
        check_is_empty(llm)
        return output.num_cached_tokens, list(output.outputs[0].token_ids)

    assert cached(prompt) == (0, tokens)
    assert cached(prompt) == (64, tokens)
    longer = prompt + tokens[:12]
    for num_cached in (64, 80):
        found = cached(longer)
        assert (found[0], found[1][:18]) == (num_cached, tokens[12:])
    others = [prompt[:40] + prompts[4][i : i + 20] for i in range(3)]
    alone = LLM(model, **LIMITS | TIGHT | {"enable_prefix_caching": False})
    for other, num_cached in zip(others, (0, 32, 32), strict=True):
        assert cached(other) == (num_cached, generate(alone, [other])[0])
    sampled = SamplingParams(n=3, temperature=1, top_k=1, max_tokens=30, ignore_eos=True)
    stats = llm.engine.runner.stats
    before = stats.num_scheduled_tokens
    (output,) = llm.generate([prompts[1]], sampled, use_tqdm=False)
    assert [list(one.token_ids) for one in output.outputs] == [expected[1]] * 3
    assert stats.num_scheduled_tokens - before < 2 * len(prompts[1]) + 3 * 30
    # States of other weights are forgotten.
    llm.update_params(jax.tree.map(lambda leaf: leaf * 1.5, llm.params))
    changed = cached(prompt)
    assert changed[0] == 0
    assert changed[1] != tokens


@pytest.mark.slow
@pytest.mark.parametrize("num_states", [1, 2])
@pytest.mark.parametrize("options", [{}, TIGHT, {"max_num_batched_tokens": 16}], ids=str)
def test_few_kept_states_change_no_token(
    hybrid: Work, options: dict[str, Any], num_states: int
) -> None:
    model, prompts, expected = hybrid
    llm = LLM(model, **LIMITS | options | {"num_prefix_states": num_states})
    for _ in range(2):
        assert generate(llm, prompts) == expected
    longer = [prompt + tokens[:9] for prompt, tokens in zip(prompts, expected, strict=True)]
    found = generate(llm, longer)
    assert [one[:21] for one in found] == [tokens[9:] for tokens in expected]


def test_what_keeps_pages_alone_is_off_or_refused(hybrid: Work, tiny_model: tuple) -> None:
    model, _, _ = hybrid
    with pytest.raises(ValueError, match="num_host_pages is 4; the model has recurrent layers"):
        LLM(model, **LIMITS | {"num_host_pages": 4})
    with pytest.raises(ValueError, match="num_prefix_states is 4, and the model has no recurrent"):
        LLM(tiny_model, **LIMITS | {"num_prefix_states": 4})
    for options in ({"num_prefix_states": 0}, {"enable_prefix_caching": False}):
        config = LLM(model, **LIMITS | TIGHT | options).engine.scheduler.config
        assert not config.enable_prefix_caching
        assert config.num_prefix_states == 0
