"""Weights as an argument: policies for what runs, versions, donation, low-rank updates."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import (
    LLM,
    RequestOutput,
    SamplingParams,
    init_lora,
    log_likelihood,
    merge_lora,
    run_for,
)
from tests.conftest import check_is_empty
from tests.random_numbers import normal
from tests.reference import TINY_LIMITS

PROMPT = list(range(5, 45))  # two full pages and a half
PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(seed=3, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def shared_llm(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, **TINY_LIMITS)


@pytest.fixture
def llm(shared_llm: LLM, tiny_model: tuple) -> Iterator[LLM]:
    shared_llm.update_params(tiny_model[1])
    yield shared_llm
    check_is_empty(shared_llm)


@pytest.fixture(scope="module")
def new_params(tiny_model: tuple) -> Any:
    return jax.tree.map(lambda leaf: leaf * 1.25, tiny_model[1])


def tokens(llm: LLM, params: SamplingParams = PARAMS) -> list[int]:
    (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    return output.outputs[0].token_ids


def finish(llm: LLM) -> dict[str, RequestOutput]:
    done: dict[str, RequestOutput] = {}
    while llm.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.step() if output.finished}
        llm.engine.scheduler.check()
    return done


def update_midway(llm: LLM, params: Any, running: str, asked: SamplingParams = PARAMS) -> Any:
    """Starts a request, updates after some tokens, and adds another with the same prompt."""
    llm.add_request("old", PROMPT, asked)
    seen = 0
    while seen < 6:
        seen = max([len(output.outputs[0].token_ids) for output in llm.step()], default=0)
    version = llm.weights_version
    llm.update_params(params, running=running)
    assert llm.weights_version == version + 1
    llm.engine.scheduler.check()
    llm.add_request("new", PROMPT, asked)
    done = finish(llm)
    return done["old"].outputs[0], done["new"], version


@pytest.mark.parametrize("running", ["recompute", "keep", "restart"])
def test_no_request_hits_what_old_weights_computed(llm: LLM, new_params: Any, running: str) -> None:
    """With the pages of the one that still runs, and those that it left in the cache."""
    before = tokens(llm)
    _, new, version = update_midway(llm, new_params, running)
    after = tokens(LLM((llm.model, new_params), **TINY_LIMITS))
    assert before != after
    assert new.outputs[0].token_ids == after
    assert set(new.outputs[0].weights_versions) == {version + 1}
    assert tokens(llm) == after


@pytest.mark.parametrize("asked", [PARAMS, SEEDED], ids=["greedy", "seeded"])
def test_running_requests_follow_the_policy(
    llm: LLM, new_params: Any, asked: SamplingParams
) -> None:
    before = tokens(llm, asked)
    found = {}
    for running in ("recompute", "keep", "restart"):
        old, new, version = update_midway(llm, new_params, running, asked)
        llm.update_params(jax.tree.map(lambda leaf: leaf / 1.25, new_params))
        found[running] = old.token_ids
        stamps = old.weights_versions
        assert len(stamps) == len(old.token_ids) == 24
        if running == "restart":
            assert old.token_ids == new.outputs[0].token_ids
            assert set(stamps) == {version + 1}
            continue
        split = stamps.index(version + 1)
        assert stamps == [version] * split + [version + 1] * (24 - split)
        assert split >= 6
        assert old.token_ids[:split] == before[:split]
    assert found["keep"] != found["recompute"]  # other keys and values


def test_keep_goes_on_with_old_keys_and_new_weights(llm: LLM, new_params: Any) -> None:
    """If the new weights are the old ones, nothing has happened at all; nor was it preempted."""
    before = tokens(llm)
    llm.add_request("a", PROMPT, PARAMS)
    for _ in range(8):
        llm.step()
    llm.update_params(llm.params, running="keep")
    output = finish(llm)["a"]
    assert output.outputs[0].token_ids == before
    assert output.metrics.num_preemptions == 0


def test_groups_survive_every_policy(llm: LLM, new_params: Any) -> None:
    """More samples than run at once: later ones may not take the pages of kept siblings."""
    asked = SamplingParams(n=6, seed=1, max_tokens=20, ignore_eos=True)
    (expected,) = LLM((llm.model, new_params), **TINY_LIMITS).generate(
        [PROMPT], asked, use_tqdm=False
    )
    for running in ("recompute", "keep", "restart"):
        llm.update_params(jax.tree.map(jnp.asarray, llm.params))
        llm.add_request("a", PROMPT, asked)
        for _ in range(6):
            llm.step()
        llm.update_params(new_params, running=running)
        output = finish(llm)["a"]
        late = output.outputs[4:] if running != "restart" else output.outputs
        for one in late:
            assert one.token_ids == expected.outputs[one.index].token_ids, running
        llm.update_params(new_params)


def test_forks_do_not_share_what_old_weights_computed(llm: LLM, new_params: Any) -> None:
    """A fork of a kept request computes its own keys and values, with the new weights."""
    llm.add_request("a", PROMPT, PARAMS)
    while not any(len(output.outputs[0].token_ids) >= 6 for output in llm.step()):
        pass
    llm.update_params(new_params, running="keep")
    llm.fork("a", "b", num_output_tokens=4)
    done = finish(llm)
    forked = done["b"].outputs[0].token_ids
    clean = LLM((llm.model, new_params), **TINY_LIMITS)
    asked = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (expected,) = clean.generate([PROMPT + forked[:4]], asked, use_tqdm=False)
    assert forked[4:] == expected.outputs[0].token_ids
    assert done["a"].outputs[0].token_ids != forked


def test_unknown_policies_are_refused(llm: LLM) -> None:
    version = llm.weights_version
    with pytest.raises(ValueError, match="running is 'forget'; it must be one of"):
        llm.update_params(llm.params, running="forget")
    assert llm.weights_version == version


def test_a_training_step_may_donate_the_weights(tiny_model: tuple) -> None:
    """One copy of the parameters in memory, shared by engine and trainer."""
    module, params = tiny_model
    llm = LLM((module, jax.tree.map(jnp.copy, params)), **TINY_LIMITS)
    expected = tokens(LLM((module, jax.tree.map(lambda leaf: leaf * 1.25, params)), **TINY_LIMITS))
    train = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 1.25, tree), donate_argnums=0)
    new = train(llm.params)
    llm.update_params(new)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(new)]
    assert pointers == [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(llm.params)]
    assert tokens(llm) == expected


# --- partial rollouts ---------------------------------------------------------------------------


def test_stragglers_are_carried_over_an_update(llm: LLM, new_params: Any) -> None:
    lengths = [3, 5, 30, 40]
    for i, length in enumerate(lengths):
        asked = SamplingParams(seed=i, max_tokens=length, ignore_eos=True)
        llm.add_request(str(i), [7 + i, 8, 9], asked)
    first = run_for(llm, num_finished=2)
    assert [output.request_id for output in first.finished] == ["0", "1"]
    assert sorted(output.request_id for output in first.unfinished) == ["2", "3"]
    version = llm.weights_version
    llm.update_params(new_params, running="keep")
    second = run_for(llm)
    assert not second.unfinished
    for output in second.finished:
        one = output.outputs[0]
        assert len(one.token_ids) == lengths[int(output.request_id)]
        assert set(one.weights_versions) == {version, version + 1}


def test_a_token_budget_ends_a_call_and_aborts_give_the_rest(llm: LLM) -> None:
    for i in range(3):
        llm.add_request(str(i), [5, 6], SamplingParams(seed=i, max_tokens=50, ignore_eos=True))
    some = run_for(llm, num_tokens=30)
    count = sum(len(output.outputs[0].token_ids) for output in some.unfinished)
    assert 30 <= count < 30 + 3
    more = run_for(llm, num_tokens=30)
    total = sum(len(output.outputs[0].token_ids) for output in more.unfinished)
    assert 30 <= total - count < 30 + 3
    aborted = llm.abort_request(["0", "1", "2"])
    assert all(output.outputs[0].finish_reason == "abort" for output in aborted)
    assert run_for(llm).finished == []


def test_a_token_budget_counts_every_sample(tiny_model: tuple) -> None:
    """Samples that wait give nothing; bursts and requests that were carried over count exactly."""
    llm = LLM(tiny_model, **TINY_LIMITS | {"max_num_seqs": 2, "max_decode_steps": 4})
    llm.add_request("a", PROMPT, SamplingParams(n=6, seed=1, max_tokens=40, ignore_eos=True))
    before = 0
    for _ in range(3):
        some = run_for(llm, num_tokens=10)
        total = sum(len(one.token_ids) for one in some.unfinished[0].outputs)
        assert 10 <= total - before < 10 + 2 * 4
        before = total
    llm.abort_request("a")


def test_a_token_budget_is_not_spent_by_what_was_there(llm: LLM) -> None:
    """A request that ended when new weights came is told now, but ran before."""
    llm.add_request("a", PROMPT, SamplingParams(seed=1, max_tokens=12, ignore_eos=True))
    while not any(len(output.outputs[0].token_ids) >= 11 for output in llm.step()):
        pass
    llm.update_params(llm.params)  # takes in the last token
    llm.add_request("b", PROMPT, SamplingParams(seed=2, max_tokens=30, ignore_eos=True))
    some = run_for(llm, num_tokens=6)
    assert [output.request_id for output in some.finished] == ["a"]
    assert len(some.unfinished[0].outputs[0].token_ids) == 6
    llm.abort_request("b")


def test_a_time_budget_ends_a_call(llm: LLM) -> None:
    llm.add_request("a", [5, 6], SamplingParams(seed=1, max_tokens=100, ignore_eos=True))
    some = run_for(llm, seconds=1e-9)
    assert not some.finished
    llm.abort_request("a")


@pytest.mark.parametrize(
    "budget",
    [
        {"num_tokens": 0},
        {"seconds": -1.0},
        {"num_finished": 0},
        {"num_tokens": True},
        {"seconds": "5"},
    ],
)
def test_budgets_must_be_positive(llm: LLM, budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it must be above 0"):
        run_for(llm, **budget)


# --- low-rank updates ---------------------------------------------------------------------------


def random_lora(params: Any) -> Any:
    lora = init_lora(jax.random.key(0), params, rank=2)
    seeds = itertools.count()
    return jax.tree.map(lambda leaf: 0.1 * normal(next(seeds), *leaf.shape), lora)


def test_merging_adds_the_product(tiny_model: tuple) -> None:
    module, params = tiny_model
    fresh = init_lora(jax.random.key(0), params, rank=2)
    jax.tree.map(np.testing.assert_array_equal, merge_lora(params, fresh), params)
    lora = random_lora(params)
    merged = merge_lora(params, lora, scale=0.5)
    a, b = lora["layers_1"]["o"]["a"], lora["layers_1"]["o"]["b"]
    expected = np.asarray(params["layers_1"]["o"]) + 0.5 * np.asarray(b) @ np.asarray(a)
    np.testing.assert_allclose(merged["layers_1"]["o"], expected, atol=1e-6)
    assert merged["embed"] is params["embed"]
    llm = LLM(tiny_model, **TINY_LIMITS)
    before = tokens(llm)
    llm.update_params(merged)
    assert tokens(llm) == tokens(LLM((module, merged), **TINY_LIMITS)) != before


def test_gradients_reach_the_low_rank_tree_alone(tiny_model: tuple) -> None:
    module, params = tiny_model
    sequence = jnp.array(PROMPT)
    mask = jnp.ones(len(PROMPT), bool)

    def loss(lora: Any) -> jax.Array:
        merged = merge_lora(params, lora)
        return log_likelihood(merged, sequence, mask, model=module).sum()

    lora = random_lora(params)
    loss_and_grads = jax.jit(jax.value_and_grad(loss))
    grads = loss_and_grads(lora)[1]
    pair = grads["layers_0"]["qkv"]
    # A direction's derivative, by differences.
    step = jax.tree.map(jnp.zeros_like, lora)
    step["layers_0"]["qkv"]["b"] = 1e-2 * pair["b"] / jnp.linalg.norm(pair["b"])
    moved = (jax.tree.map(lambda x, d, s=s: x + s * d, lora, step) for s in (1, -1))
    up, down = (loss_and_grads(one)[0] for one in moved)
    expected = 2 * 1e-2 * float(jnp.linalg.norm(pair["b"]))
    assert float(up - down) == pytest.approx(expected, rel=0.05)


def test_a_lora_that_does_not_fit_is_refused(tiny_model: tuple) -> None:
    _, params = tiny_model
    lora = random_lora(params)
    lora["layers_0"]["o"]["a"] = jnp.zeros((2, 3))
    lora["layers_9"] = {}
    lora["embed"] = jnp.zeros(3)
    lora["layers_1"] = jnp.zeros(3)
    with pytest.raises(ValueError, match="lora does not fit") as info:
        merge_lora(params, lora)
    for part in (
        "layers_0/o has a [2, 3]",
        "layers_9 is unknown",
        "embed is no pair",
        "layers_1 is no dict of",
    ):
        assert part in str(info.value)
    with pytest.raises(ValueError, match="no layer has a kernel named nothing"):
        init_lora(jax.random.key(0), params, 2, names=("nothing",))


def test_what_is_no_matrix_has_no_low_rank_update(tiny_model: tuple) -> None:
    with pytest.raises(ValueError, match=r"layers_0/attn_norm has shape \[64\]; .* leave it out"):
        init_lora(jax.random.key(0), tiny_model[1], 2, names=("o", "attn_norm"))


def test_a_product_of_half_precision_is_rounded_once() -> None:
    """To the kernel's dtype, not to that of the pair: bfloat16 has no 1 + 2 ** -9."""
    half = {"a": jnp.array([[1.0], [2**-9]], jnp.bfloat16), "b": jnp.ones((1, 2), jnp.bfloat16)}
    merged = merge_lora({"layers_0": {"o": jnp.zeros((1, 1))}}, {"layers_0": {"o": half}})
    assert merged["layers_0"]["o"].item() == 1 + 2**-9
