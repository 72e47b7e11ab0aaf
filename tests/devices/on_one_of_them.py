"""An engine on one of four devices: that of its params, whatever mesh the caller has."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folojax import LLM, SamplingClass, SamplingParams
from tests import mixed_requests
from tests.letters import make_letters_tokenizer
from tests.reference import MORE_LIMITS, TIGHT

FIRST, SECOND, THIRD, FOURTH = jax.devices()
MESH = Mesh(np.array([FIRST, SECOND]), ("x",))
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = [5, 17, 99, 3]


@pytest.fixture(scope="module")
def second(tiny_model: tuple) -> tuple:
    module, params = tiny_model
    return module, jax.device_put(params, SECOND)


@pytest.fixture(scope="module")
def llm(second: tuple) -> LLM:
    return LLM(second, **MORE_LIMITS)


def pointers(params: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]


def tokens(llm: LLM, params: SamplingParams = GREEDY) -> Any:
    return llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids


def devices(tree: Any) -> set[Any]:
    return set().union(*(leaf.devices() for leaf in jax.tree.leaves(tree)))


def in_mesh() -> Any:
    return jax.set_mesh(MESH)


def test_all_lies_where_the_params_are(llm: LLM, second: tuple) -> None:
    assert pointers(llm.params) == pointers(second[1])
    assert devices((llm.params, llm.engine.runner.state)) == {SECOND}
    assert tokens(llm) == tokens(LLM((second[0], jax.device_put(second[1], FIRST)), **MORE_LIMITS))
    edited = SamplingParams(temperature=0, max_tokens=4, repetition_penalty=1.5)
    tokens(llm, edited)
    assert devices(llm.engine.runner.state) == {SECOND}


@pytest.mark.slow
def test_requests_of_every_kind_with_copies_and_a_host_store(
    second: tuple, tiny_model: tuple
) -> None:
    options = TIGHT | {"num_host_pages": 20, "min_swap_tokens": 1}
    found, expected = (
        mixed_requests.run(mixed_requests.make_llm(model, **options))
        for model in (second, tiny_model)
    )
    mixed_requests.check_same(found, expected)


@pytest.mark.slow
def test_nothing_compiles_after_a_warm_up_on_the_device(llm: LLM, counter: Any) -> None:
    plan: Any = {"sampling": [SamplingClass.GREEDY], "logprobs": False}
    llm.warm_up(**plan)
    before = counter.count
    tokens(llm)
    llm.warm_up(**plan)
    assert counter.count == before


def test_sleep_and_snapshots_stay_on_the_device(llm: LLM) -> None:
    expected = tokens(llm)
    llm.sleep()
    llm.wake_up()
    assert devices(llm.engine.runner.state) == {SECOND}
    llm.add_request("parent", PROMPT, GREEDY)
    for _ in range(3):
        llm.step()
    taken = llm.snapshot("parent")
    assert taken.kv is not None
    llm.abort_request("parent")
    llm.resume(taken, "again")
    outputs = [one for _ in range(12) for one in llm.step() if one.finished]
    assert [one.outputs[0].token_ids for one in outputs] == [expected]


@pytest.mark.parametrize(
    ("of_build", "of_call"),
    [
        (contextlib.nullcontext, in_mesh),
        (in_mesh, contextlib.nullcontext),
        pytest.param(in_mesh, in_mesh, marks=pytest.mark.slow),
    ],
)
def test_the_mesh_of_the_caller_does_not_matter(
    second: tuple, llm: LLM, of_build: Callable[..., Any], of_call: Callable[..., Any]
) -> None:
    """Sizes of its own, so that each of them compiles."""
    limits = MORE_LIMITS | {"page_size": 8 * (1 + [in_mesh, of_build].index(of_build))}
    limits["prefill_row_len"] = 3 + [in_mesh, of_call].index(of_call)
    with of_build():
        made = LLM(second, make_letters_tokenizer(), **limits)
    with of_call():
        assert tokens(made) == tokens(llm)
        streamed = [one.outputs[0].token_ids for one in made.stream(PROMPT, GREEDY)]
        made.update_params(second[1])
        (scored,) = made.score([PROMPT], [[3, 4]], use_tqdm=False)
    assert streamed[-1] == tokens(llm)
    assert pointers(made.params) == pointers(second[1])
    assert np.isfinite(scored.cumulative_logprob)


@pytest.mark.parametrize("kind", ["sharded", "whole on each", "on two devices", "another"])
def test_what_would_have_to_be_copied_is_refused(llm: LLM, second: tuple, kind: str) -> None:
    module, params = second
    spec = PartitionSpec("x") if kind == "sharded" else PartitionSpec()
    embed = jax.device_put(params["embed"], NamedSharding(MESH, spec))
    if kind in ("on two devices", "another"):
        embed = jax.device_put(params["embed"], THIRD)
    bad = params | {"embed": embed}
    if kind == "another":
        bad = jax.device_put(params, THIRD)
    else:
        with pytest.raises(ValueError, match=r"do not lie on .* alone: .* has .*Sharding"):
            LLM((module, bad), **MORE_LIMITS)
    with pytest.raises(ValueError, match=r"do not lie on .*id=1.* alone: embed has .*Sharding"):
        llm.update_params(bad)
    assert pointers(llm.params) == pointers(params)


def test_new_params_are_taken_as_they_are(llm: LLM, second: tuple) -> None:
    expected = tokens(llm)
    new = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf) * 1.5, second[1]), SECOND)
    llm.update_params(new)
    assert pointers(llm.params) == pointers(new)
    assert tokens(llm) != expected
    from_host = jax.tree.map(np.asarray, second[1])
    llm.update_params(from_host)
    assert devices(llm.params) == {SECOND}
    assert tokens(llm) == expected
    llm.update_params(second[1])


def test_a_mesh_of_one_device_is_that_device(second: tuple) -> None:
    module, params = second
    mesh = Mesh(np.array([SECOND]), ("x",))
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    llm = LLM((module, placed), **MORE_LIMITS)
    assert pointers(llm.params) == pointers(placed)


def test_a_default_device_takes_models_from_files(tiny_directory: Any, llm: LLM) -> None:
    with jax.default_device(FOURTH):
        made = LLM(tiny_directory, make_letters_tokenizer(), dtype="float32", **MORE_LIMITS)
    assert devices((made.params, made.engine.runner.state)) == {FOURTH}
    assert tokens(made) == tokens(llm)
