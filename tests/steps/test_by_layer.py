"""A step layer by layer is the same step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from folojax import LLM, SamplingParams, kv
from folojax.backend.backend import CPU, GPU
from folojax.compile.programs import IN_GRAPH
from folojax.engine import build
from folojax.kv import KVCache
from folojax.kv.cache import join_layers
from folojax.models.core.decoder import Llama, init_params
from folojax.models.machine.row_sums import REORDERED
from folojax.runner.batch import ints
from folojax.steps.by_layer import LayeredSteps, make_steps, split_layers
from folojax.steps.fused import WholeSteps
from folojax.steps.state import DecodeInputs, PrefillInputs
from tests.conftest import check_is_empty
from tests.mixed_requests import check_same, make_llm, make_prompts, run

NUM_PAGES, PAGE_SIZE = 8, 8


def random_cache(module: Any) -> KVCache:
    layout = CPU.kv_layout(module.config, module.dtype, NUM_PAGES, PAGE_SIZE)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), kv.init_cache(layout)
    )


def prefill_inputs() -> PrefillInputs:
    tokens: Any = np.random.default_rng(1).integers(3, 128, (3, 4)).astype(np.int32)
    table: Any = np.array([[0, 5], [7, 2], [8, 8]], np.int32)
    start: Any = np.array([0, 9, 0], np.int32)
    length: Any = np.array([4, 3, 0], np.int32)  # a full row, a short one, padding
    return PrefillInputs(tokens, start, length, table)


def decode_inputs() -> DecodeInputs:
    table: Any = np.array([[0, 5], [7, 2], [8, 8]], np.int32)
    slot: Any = np.array([0, 2, 4], np.int32)
    token: Any = np.array([-1, 17, -1], np.int32)
    position: Any = np.array([3, 12, 0], np.int32)
    return DecodeInputs(slot, token, position, table)


def close(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


def test_a_prefill(tiny_model: tuple) -> None:
    module, params = tiny_model
    assert module.config.num_layers > 1
    results = [
        steps.prefill(params, random_cache(module), prefill_inputs())
        for steps in (WholeSteps(module), LayeredSteps(module))
    ]
    close(*results)


def test_a_decode(tiny_model: tuple) -> None:
    module, params = tiny_model
    tokens = jnp.array([5, 6, 7, 8])
    results = [
        steps.decode(params, random_cache(module), tokens, decode_inputs())
        for steps in (WholeSteps(module), LayeredSteps(module))
    ]
    close(*results)


def test_the_cache_is_donated(tiny_model: tuple) -> None:
    module, params = tiny_model
    cache = random_cache(module)
    LayeredSteps(module).decode(params, cache, ints(4), decode_inputs())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(("num_layers", "num_groups"), [(12, 1), (13, 2)])
def test_a_group_is_compiled_once_whatever_the_depth(
    tiny_model: tuple, num_layers: int, num_groups: int
) -> None:
    """And a deep model, of several groups, is the same model."""
    config = dataclasses.replace(tiny_model[0].config, num_layers=num_layers)
    module = Llama(config, jnp.float32)
    params = init_params(module, jax.random.key(0))
    layered = LayeredSteps(module)
    calls = layered.prefill_calls(params, random_cache(module), prefill_inputs())
    assert len(calls) == 2 + num_groups  # before the layers, groups that differ, after them
    results = [
        steps.prefill(params, random_cache(module), prefill_inputs())
        for steps in (WholeSteps(module), layered)
    ]
    close(*results)


WANTED = st.sampled_from([3, 6])


@given(kinds=st.lists(st.sampled_from("ab"), min_size=1, max_size=70), wanted=WANTED)
def test_groups_are_all_layers_in_order(kinds: list[str], wanted: int) -> None:
    groups = split_layers(kinds, wanted)
    assert [layer for group in groups for layer in group] == list(range(len(kinds)))
    assert all(1 <= len(group) <= 8 for group in groups)


@given(pattern=st.text("ab", min_size=4, max_size=8), times=st.integers(1, 12), wanted=WANTED)
def test_layers_that_repeat_are_few_programs(pattern: str, times: int, wanted: int) -> None:
    kinds = pattern * times
    programs = {kinds[group.start : group.stop] for group in split_layers(kinds, wanted)}
    assert len(programs) == 1, "the pattern itself would do"


def test_a_cache_in_layers(tiny_model: tuple) -> None:
    cache = random_cache(tiny_model[0])
    layers = [cache.layer(i) for i in range(tiny_model[0].config.num_layers)]
    close(join_layers(layers), cache)


class Opaque(nn.Module):
    """A model that cannot be cut."""


@pytest.mark.parametrize("backend", [CPU, GPU], ids=["cpu", "gpu"])
def test_who_is_run_in_layers(tiny_model: tuple, backend: Any) -> None:
    kind = LayeredSteps if backend is CPU else WholeSteps
    assert isinstance(make_steps(tiny_model[0], backend.is_layered), kind)
    opaque: Any = Opaque()
    assert isinstance(make_steps(opaque, backend.is_layered), WholeSteps)
    assert dataclasses.is_dataclass(tiny_model[0].alone(0))


@pytest.mark.parametrize("kind", [WholeSteps, LayeredSteps])
def test_sums_may_be_reordered(tiny_model: tuple, kind: Any) -> None:
    """In the programs that attend; loops of whole ones stay in a GPU's graph."""
    module, params = tiny_model
    calls = kind(module).decode_calls(params, random_cache(module), ints(8), decode_inputs())
    options = [call.program.options["compiler_options"] for call in calls]
    whole = [REORDERED | IN_GRAPH]
    assert options == (whole if kind is WholeSteps else [None, REORDERED, None])


# A platform that runs a step as one program, as far as this machine can be one.
WHOLE = dataclasses.replace(
    GPU, memory_fraction=None, default_dtype="float32", kernels=("reference",), warms_up=False
)


@pytest.fixture
def as_whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Engines that are made from then on run whole steps."""

    def choose() -> None:
        monkeypatch.setattr(build, "choose_backend", lambda: WHOLE)

    return choose


def test_an_engine_of_whole_steps_gives_the_same(
    tiny_model: tuple, as_whole: Callable[[], None]
) -> None:
    """Requests of every kind, and scores of given tokens."""
    layered = make_llm(tiny_model)
    as_whole()
    whole = make_llm(tiny_model)
    assert isinstance(layered.engine.runner.steps, LayeredSteps)
    assert isinstance(whole.engine.runner.steps, WholeSteps)
    check_same(run(whole), run(layered))
    prompts = make_prompts()[1:6:2]
    top_p = SamplingParams(seed=5, top_p=0.7, max_tokens=12, ignore_eos=True)
    score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    for params in (top_p, score):
        found, expected = (
            llm.generate(prompts, params, use_tqdm=False) for llm in (whole, layered)
        )
        check_same(found, expected)
    heads, tails = [one[:5] for one in prompts], [one[5:12] for one in prompts]
    scores, expected_scores = (
        [x for one in llm.score(heads, tails, use_tqdm=False) for x in one.logprobs]
        for llm in (whole, layered)
    )
    assert scores == pytest.approx(expected_scores, abs=1e-3)
    for llm in (whole, layered):
        check_is_empty(llm)


def test_a_decode_step_of_an_engine_of_whole_steps_is_one_call(
    tiny_model: tuple, as_whole: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and sampler, whatever the sampling."""
    as_whole()
    llm: LLM = make_llm(tiny_model, async_scheduling=False)
    kinds: list[str] = []
    run_one = WholeSteps._run

    def count(self: WholeSteps, key: Any, call: Any) -> Any:
        kinds.append(key[0])
        return run_one(self, key, call)

    monkeypatch.setattr(WholeSteps, "_run", count)
    fields: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 3, "top_p": 0.9, "logprobs": 2},
        {"temperature": 0, "repetition_penalty": 1.3},
    ]
    for one in fields:
        kinds.clear()
        params = SamplingParams(**one, max_tokens=6, ignore_eos=True)
        (output,) = llm.generate([3, 4, 5], params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 6
        assert kinds == ["prefill", *["sampled"] * 5]
    check_is_empty(llm)
