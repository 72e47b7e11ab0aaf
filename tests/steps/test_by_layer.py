"""A step layer by layer is the same step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folojax import LLM, SamplingParams, kv
from folojax.backend.backend import CPU, GPU
from folojax.compile.programs import IN_GRAPH, Compiling
from folojax.compile.programs import run as run_program
from folojax.engine import build
from folojax.kv import KVCache
from folojax.models.core.decoder import Llama, init_params
from folojax.models.machine.row_sums import REORDERED
from folojax.sampling.rows import SlotState
from folojax.steps.by_layer import LayeredSteps, split_layers
from folojax.steps.executables import Executable
from folojax.steps.fused import WholeSteps
from folojax.steps.layers import join_layers, layer_of
from folojax.steps.row_by_row import RowSteps
from folojax.steps.state import CallInputs, DecodeInputs, EngineState, PrefillInputs
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


TOKENS = jnp.array([5, 6, 7, 8])
PREFILL, DECODE = Executable("prefill", 3, 4), Executable("decode", 3)


def call(steps: Any, one: Executable, module: Any, params: Any, run: Any = run_program) -> Any:
    """The cache and the hidden states that a step gives."""
    rows = prefill_inputs() if one.kind == "prefill" else decode_inputs()
    state = EngineState(random_cache(module), SlotState(TOKENS + 0))
    state, results = steps.call(one, params, state, CallInputs(rows), run)
    return state.cache, results.hidden, results.every


@pytest.mark.parametrize("one", [PREFILL, DECODE], ids=str)
def test_a_step(tiny_model: tuple, one: Executable) -> None:
    module, params = tiny_model
    assert module.config.num_layers > 1
    ways = WholeSteps(module), LayeredSteps(module)
    close(*(call(steps, one, module, params) for steps in ways))


@pytest.mark.parametrize("one", [PREFILL, DECODE], ids=str)
def test_the_cache_is_donated(tiny_model: tuple, one: Executable) -> None:
    module, params = tiny_model
    state = EngineState(random_cache(module), SlotState(TOKENS + 0))
    rows = prefill_inputs() if one is PREFILL else decode_inputs()
    LayeredSteps(module).call(one, params, state, CallInputs(rows))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


@pytest.mark.parametrize(("num_layers", "num_groups"), [(12, 1), (13, 2)])
def test_a_group_is_compiled_once_whatever_the_depth(
    tiny_model: tuple, num_layers: int, num_groups: int
) -> None:
    """And a deep model, of several groups, is the same model."""
    config = dataclasses.replace(tiny_model[0].config, num_layers=num_layers)
    module = Llama(config, jnp.float32)
    params = init_params(module, jax.random.key(0))
    layered, compiling = LayeredSteps(module), Compiling()
    shapes = call(layered, PREFILL, module, params, compiling)
    # Before the layers, groups that differ, after them.
    assert len(compiling.compiled) == 2 + num_groups
    results = [call(steps, PREFILL, module, params) for steps in (WholeSteps(module), layered)]
    close(*results)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, results[1])


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


def test_a_cache_in_layers_is_the_same_arrays(tiny_model: tuple) -> None:
    cache = random_cache(tiny_model[0])
    layers = [layer_of(cache, i) for i in range(tiny_model[0].config.num_layers)]
    assert all(one.num_pages == cache.num_pages and len(one.layers) == 1 for one in layers)
    joined = join_layers(layers)
    chex.assert_trees_all_equal_structs(joined, cache)
    assert all(new is old for new, old in zip(joined.layers, cache.layers, strict=True))


@pytest.mark.parametrize("backend", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_backend_makes_its_steps(tiny_model: tuple, backend: Any) -> None:
    kind = LayeredSteps if backend is CPU else WholeSteps
    assert isinstance(backend.make_steps(tiny_model[0]), kind)
    exact = backend.deterministic(tiny_model[0].config, jnp.float32)
    assert isinstance(exact.make_steps(tiny_model[0]), RowSteps)
    for one in (backend, exact):
        assert one.make_steps(tiny_model[0]).kind == one.steps


@pytest.mark.parametrize("kind", [WholeSteps, LayeredSteps, RowSteps])
def test_sums_may_be_reordered(tiny_model: tuple, kind: Any) -> None:
    """In the programs that attend; loops of whole ones stay in a GPU's graph."""
    module, params = tiny_model
    options: list[Any] = []

    def note(program: Any, args: Any, key: Any = None) -> Any:
        options.append(program.options["compiler_options"])
        return run_program(program, args, key)

    steps = kind(module)
    call(steps, Executable("rows", 3) if kind is RowSteps else DECODE, module, params, note)
    whole, layered = [REORDERED | IN_GRAPH], [None, REORDERED, None]
    rows = [None, None]  # the model, and logits: no sum may depend on the compiler's mood
    assert options == {WholeSteps: whole, LayeredSteps: layered, RowSteps: rows}[kind]


# A platform that runs a step as one program, as far as this machine can be one.
WHOLE = dataclasses.replace(
    GPU, memory_fraction=None, default_dtype="float32", kernels=("reference",), warms_up=False
)


@pytest.fixture
def as_whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Engines that are made from then on run whole steps."""

    def choose() -> None:
        monkeypatch.setattr(build, "choose_backend", lambda device: WHOLE)

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
    make_call = WholeSteps.call

    def count(self: WholeSteps, one: Executable, *args: Any) -> Any:
        kinds.append(one.kind)
        return make_call(self, one, *args)

    monkeypatch.setattr(WholeSteps, "call", count)
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
        assert kinds == ["prefill", "sample", *["decode"] * 5]
    check_is_empty(llm)
