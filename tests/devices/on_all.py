"""Engines whose layers two or four devices share: the tokens of one device."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from folojax import (
    LLM,
    RequestOutput,
    SamplingClass,
    SamplingParams,
    join_params,
)
from folojax.compile.programs import run as run_program
from tests import dense, mixed_requests
from tests.reference import MORE_LIMITS, TIGHT, save_tiny
from tests.user_functions import EDITS, PROCESSORS

DEVICES = jax.devices()
TWO = Mesh(np.array(DEVICES[:2]), ("x",))
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = [5, 17, 99, 3]
ASKED = [
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3, prompt_logprobs=2),
    SamplingParams(seed=3, top_p=0.9, max_tokens=8, ignore_eos=True, logprobs=3, record=True),
]


@pytest.fixture(scope="module")
def llm(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, **MORE_LIMITS, tensor_parallel_size=2)


@pytest.fixture(scope="module")
def alone(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, **MORE_LIMITS)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """One of whose vocabulary each of four devices has a block of the sampler."""
    directory = tmp_path_factory.mktemp("wide")
    save_tiny("llama", directory, vocab_size=512)
    return dense.load(directory)


@pytest.fixture(scope="module")
def expected(wide_model: tuple) -> list[RequestOutput]:
    return mixed_requests.run(mixed_requests.make_llm(wide_model, **TIGHT))


def tokens(llm: LLM, params: SamplingParams = GREEDY) -> Any:
    return llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids


def pieces(params: Any) -> list[int]:
    """Where every array's part on every device lies."""
    leaves = jax.tree.leaves(params)
    return [one.data.unsafe_buffer_pointer() for leaf in leaves for one in leaf.addressable_shards]


def over(params: Any, mesh: Mesh, axis: int = 0) -> Any:
    """As fully sharded training has them: every array by its first axis that can be cut."""

    def place(leaf: Any) -> Any:
        spec = [None] * axis + list(mesh.axis_names)
        is_even = leaf.ndim > axis and leaf.shape[axis] % mesh.size == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec if is_even else ())))

    return jax.tree.map(place, params)


def check_close(found: list[RequestOutput], known: list[RequestOutput]) -> None:
    """The same tokens, and log-probabilities and records within 1e-5."""
    mixed_requests.check_same(found, known)
    for ours, theirs in zip(found, known, strict=True):
        pairs: list[Any] = [(ours.prompt_logprobs or [], theirs.prompt_logprobs or [])]
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            pairs.append((one.logprobs or [], other.logprobs or []))
            for record, wanted in zip(one.record or [], other.record or [], strict=True):
                numbers = dataclasses.astuple(wanted)
                assert dataclasses.astuple(record) == pytest.approx(numbers, abs=1e-5)
        for entries, others in pairs:
            for a, b in zip(entries, others, strict=True):
                for token in (a or {}).keys() & (b or {}).keys():  # equals may change places
                    assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-5)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_requests_of_every_kind(
    wide_model: tuple, expected: list[RequestOutput], count: int
) -> None:
    """Penalties, bans, stops, samples; preempted for want of pages, with cached prefixes."""
    llm = mixed_requests.make_llm(wide_model, **TIGHT, tensor_parallel_size=count)
    check_close(mixed_requests.run(llm), expected)
    assert llm.metrics().num_preemptions > 0
    assert llm.metrics().num_prefix_hit_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_host_pages": 20, "min_swap_tokens": 1},
        {"deterministic": True},
        {"max_decode_steps": 4},
        {"logprobs_mode": "processed"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_requests_of_every_kind_in_other_ways(wide_model: tuple, options: dict[str, Any]) -> None:
    options = {**TIGHT, **options}
    known = mixed_requests.run(mixed_requests.make_llm(wide_model, **options))
    llm = mixed_requests.make_llm(wide_model, **options, tensor_parallel_size=2)
    check_close(mixed_requests.run(llm), known)


@pytest.mark.slow
def test_bits_of_deterministic_mode_do_not_depend_on_the_batch(tiny_model: tuple) -> None:
    """And scores have those that sampling had; those of another number of devices are others."""
    options: dict[str, Any] = MORE_LIMITS | {"deterministic": True}
    llm = LLM(tiny_model, **options, tensor_parallel_size=2)
    asked = SamplingParams(seed=5, max_tokens=8, ignore_eos=True, logprobs=0)
    (one,) = llm.generate(PROMPT, asked, use_tqdm=False)
    several = llm.generate([list(range(5, 45)), PROMPT, [9, 8]], asked, use_tqdm=False)
    entries = [one.outputs[0].logprobs, several[1].outputs[0].logprobs]
    assert entries[0] == entries[1]
    (scored,) = llm.score([PROMPT], [list(one.outputs[0].token_ids)], use_tqdm=False)
    assert scored.cumulative_logprob == one.outputs[0].cumulative_logprob
    llm.add_request("parent", PROMPT, asked)
    llm.step()
    taken = llm.snapshot("parent")
    llm.abort_request("parent")
    with pytest.raises(ValueError, match="on 2 devices, whose bits are"):
        LLM(tiny_model, **options).resume(taken, "child")


@pytest.mark.slow
def test_functions_and_taps(tiny_model: tuple) -> None:
    """What a user's function sees is whole on each device."""
    options: dict[str, Any] = MORE_LIMITS | {
        "activation_taps": (1, 0),
        "activation_edits": EDITS,
        "logits_processors": PROCESSORS,
    }
    asked = SamplingParams(
        seed=1,
        max_tokens=5,
        activations=True,
        activation_edits=["steer"],
        logits_processors=["odd"],
    )
    known, found = (
        LLM(tiny_model, **options, tensor_parallel_size=count).generate(
            PROMPT, asked, use_tqdm=False
        )
        for count in (1, 2)
    )
    check_close(found, known)
    ours, theirs = (one[0].outputs[0].activations for one in (found, known))
    assert ours is not None
    assert theirs is not None
    for layer in (0, 1):
        np.testing.assert_allclose(ours[layer], theirs[layer], atol=1e-4)


def test_each_device_has_its_part(llm: LLM, tiny_model: tuple, alone: LLM) -> None:
    module, params = tiny_model
    block, state = llm.params["layers_0"], llm.engine.runner.state
    assert block["qkv"].addressable_shards[1].data.shape == (1, 64, 64)
    assert block["o"].addressable_shards[1].data.shape == (64, 32)
    assert llm.params["embed"].addressable_shards[1].data.shape == (64, 64)
    assert state.cache.layers[0].addressable_shards[1].data.shape[2] == 1
    joined = join_params(llm.params, module.config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), joined, params))
    assert llm.model is module
    half, whole = llm.memory_plan, alone.memory_plan
    assert 2 * half.bytes_per_page == whole.bytes_per_page
    assert 0.5 <= half.weights_bytes / whole.weights_bytes < 0.51
    assert half.temporaries_bytes < whole.temporaries_bytes
    assert half.device is not None
    assert whole.device is not None
    assert half.device.limit_bytes == whole.device.limit_bytes // 2  # of one CPU


def test_arrays_that_lie_right_are_taken_as_they_are(tiny_model: tuple, llm: LLM) -> None:
    module, params = tiny_model
    made = LLM((module, llm.params), mesh=TWO, **MORE_LIMITS)
    assert pieces(made.params) == pieces(llm.params)
    made.update_params(llm.params)
    assert pieces(made.params) == pieces(llm.params)
    # Of arrays as the module has them, those that need not be cut otherwise.
    plain = over(params, TWO) | {"embed": llm.params["embed"]}
    made.update_params(plain)
    assert pieces(made.params["embed"]) == pieces(llm.params["embed"])
    assert tokens(made) == tokens(llm)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_params_of_a_trainer_are_moved_by_one_function(
    tiny_model: tuple, llm: LLM, counter: Any, kind: str
) -> None:
    module, params = tiny_model
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("fsdp",), types, devices=DEVICES[:2])
    trained = over(jax.tree.map(lambda leaf: leaf * 1.25, params), mesh)
    known = LLM((module, jax.tree.map(lambda leaf: leaf * 1.25, params)), **MORE_LIMITS)
    with jax.set_mesh(mesh):
        made = LLM((module, trained), tensor_parallel_size=2, **MORE_LIMITS)
        assert tokens(made) == tokens(known) != tokens(llm)
        made.update_params(over(params, mesh))
        before = counter.count
        made.update_params(trained)
        assert counter.count == before
        assert tokens(made) == tokens(known)
    made.update_params(jax.tree.map(np.asarray, params))  # and of the host
    assert tokens(made) == tokens(llm)


def test_saved_weights_and_snapshots_are_those_of_one_device(
    llm: LLM, alone: LLM, tmp_path: Path
) -> None:
    assert llm.engine.weights == alone.engine.weights
    llm.save_pretrained(tmp_path)
    saved = dense.load(tmp_path)[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), saved, alone.params))
    known = tokens(alone)
    for giver, taker in ((llm, alone), (alone, llm)):
        giver.add_request("parent", PROMPT, GREEDY)
        for _ in range(3):
            giver.step()
        taken = giver.snapshot("parent")
        giver.abort_request("parent")
        assert taken.kv is not None
        taker.resume(taken, "child")
        outputs = [one for _ in range(12) for one in taker.step() if one.finished]
        assert [one.outputs[0].token_ids for one in outputs] == [known]


def test_keys_and_values_of_fewer_heads_than_devices_are_those_of_the_model(
    tiny_model: tuple, alone: LLM
) -> None:
    four = LLM(tiny_model, **MORE_LIMITS, tensor_parallel_size=4)
    assert four.memory_plan.bytes_per_page * 2 == alone.memory_plan.bytes_per_page
    found: list[Any] = []
    for one in (alone, four):
        one.add_request("parent", PROMPT, GREEDY)
        for _ in range(3):
            one.step()
        found.append(one.snapshot("parent").kv)
        one.abort_request("parent")
    np.testing.assert_allclose(found[0].keys, found[1].keys, atol=1e-4)
    np.testing.assert_allclose(found[0].values, found[1].values, atol=1e-4)


@pytest.mark.slow
def test_nothing_compiles_after_a_warm_up(llm: LLM, counter: Any) -> None:
    llm.warm_up([SamplingClass.GREEDY], logprobs=False)
    llm.sleep()
    llm.wake_up()
    before = counter.count
    tokens(llm)
    assert counter.count == before


def programs_of(llm: LLM, params: Any = GREEDY, adapter: Any = None) -> list[Any]:
    """What the steps of two rows run, and in which order."""
    found: list[Any] = []

    def listen(program: Any, args: Any, key: Any = None) -> Any:
        found.append(program.compile(*args))
        return run_program(program, args, key)

    steps: Any = llm.engine.runner.steps
    call = steps.call
    steps.call = lambda *args: call(*args, listen)
    llm.generate([PROMPT, PROMPT], params, False, adapter)
    return found


def test_a_layer_sums_twice_and_copies_no_pages(tiny_model: tuple) -> None:
    """And embedding and head are one sum and one gather a step."""
    llm = LLM(tiny_model, **MORE_LIMITS | {"page_size": 32}, tensor_parallel_size=2)
    texts = [one.as_text() for one in programs_of(llm)]
    sums = [len(re.findall(r" all-reduce(?:-start)?\(", text)) for text in texts]
    gathers = [len(re.findall(r" all-gather(?:-start)?\(", text)) for text in texts]
    others = "all-to-all", "collective-permute", "reduce-scatter"
    assert not any(name in text for text in texts for name in others)
    assert set(sums) == {0, 1, 4}  # of sampling, of the embedding, of both layers
    assert set(gathers) == {0, 1}
    pages = llm.engine.runner.state.cache.layers[0].addressable_shards[0].data.shape
    shape = ",".join(map(str, pages))
    assert any(shape in text for text in texts)
    assert not any(re.search(rf"f32\[{shape}\]\S* copy\(", text) for text in texts)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tensor_parallel_size": 3}, "num_heads is 4, not a multiple.*num_kv_heads is 2, neither"),
        ({"tensor_parallel_size": 8}, "tensor_parallel_size is 8, and there are"),
        ({"tensor_parallel_size": 4, "mesh": TWO}, "is 4, and mesh has 2 devices"),
        (
            {"tensor_parallel_size": 4, "quantization": "int4"},
            r"o would be \[64, 16\] on each, and must be multiples of 64 outputs and 32 inputs",
        ),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; it must be"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_allocated(
    tiny_model: tuple, options: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("it was allocated")

    monkeypatch.setattr("folojax.runner.runner.init_state", never)
    with pytest.raises(ValueError, match=told):
        LLM(tiny_model, **MORE_LIMITS, **options)


def test_params_of_other_devices_are_refused(tiny_model: tuple, llm: LLM) -> None:
    module, params = tiny_model
    others = Mesh(np.array(DEVICES[2:]), ("x",))
    elsewhere = over(params, others)
    with pytest.raises(ValueError, match=r"do not lie on the devices .*: embed has NamedSharding"):
        LLM((module, elsewhere), mesh=TWO, **MORE_LIMITS)
    with pytest.raises(ValueError, match=r"do not lie on the devices"):
        llm.update_params(elsewhere)
    made = LLM((module, elsewhere), tensor_parallel_size=2, **MORE_LIMITS)  # where they lie
    assert {one.id for one in made.params["embed"].devices()} == {2, 3}
    with pytest.raises(ValueError, match="embed is float32"):
        llm.update_params(params | {"embed": params["embed"][:7]})
    block = llm.params["layers_0"]
    wrong = llm.params | {"layers_0": block | {"qkv": block["qkv"][:, :-1]}}
    for call in (llm.update_params, lambda params: LLM((module, params), mesh=TWO, **MORE_LIMITS)):
        with pytest.raises(ValueError, match=r"qkv is float32\[2, 63, 64\], the model has"):
            call(wrong)
    with pytest.raises(ValueError, match="are those of an engine on 2 devices, and this one has 4"):
        LLM((module, llm.params), tensor_parallel_size=4, **MORE_LIMITS)
    assert tokens(llm) == tokens(made)
