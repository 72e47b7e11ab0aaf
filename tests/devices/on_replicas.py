"""Several engines behind one LLM: the tokens of one, and where requests go."""

import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folojax import LLM, BeamSearchParams, SamplingClass, SamplingParams, init_lora, run_for
from folojax.adapters.ray_data import Generator
from folojax.engine import replicas
from folojax.runner.results import arrays_of
from tests import api_calls, mixed_requests
from tests.letters import make_letters_tokenizer
from tests.reference import MORE_LIMITS, TIGHT

DEVICES = jax.devices()
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
DRAWN = SamplingParams(n=2, max_tokens=6, ignore_eos=True)
PROMPTS = [[5, 17, 99, 3], [7, 8], list(range(5, 20)), [9, 8, 7], [12], [44, 3, 17]]
LONG = list(range(3, 43))  # two full pages and some


@pytest.fixture(scope="module")
def alone(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, make_letters_tokenizer(), **MORE_LIMITS)


@pytest.fixture(scope="module")
def llm(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, make_letters_tokenizer(), **MORE_LIMITS, data_parallel_size=2)


def places(llm: LLM) -> list[set[Any]]:
    """The devices of each engine."""
    trees = [(one.runner.params, one.runner.state) for one in llm.engines]
    return [set().union(*(leaf.devices() for leaf in jax.tree.leaves(tree))) for tree in trees]


def counts(llm: LLM) -> list[int]:
    """Unfinished requests of each engine."""
    return [len(one.live) for one in llm.engines]


def tokens(outputs: list[Any]) -> list[list[list[int]]]:
    return [[one.token_ids for one in output.outputs] for output in outputs]


@pytest.mark.slow
def test_requests_of_every_kind(tiny_model: tuple) -> None:
    """Those of every other engine have the tokens of one, preempted for want of pages or not."""
    known = mixed_requests.run(mixed_requests.make_llm(tiny_model, **TIGHT))
    llm = mixed_requests.make_llm(tiny_model, **TIGHT, data_parallel_size=2, check_integrity=True)
    mixed_requests.check_same(mixed_requests.run(llm), known)
    each = [one.metrics() for one in llm.engines]
    assert min(one.num_decode_calls for one in each) > 0
    assert llm.metrics().num_decode_calls == sum(one.num_decode_calls for one in each)
    assert llm.metrics().num_pages == 2 * TIGHT["num_pages"]


def test_tokens_and_seeds_are_those_of_one_engine(llm: LLM, alone: LLM) -> None:
    """Seeds that nobody has given are drawn in the order of requests, wherever these run."""
    llm.engine._seeds.bit_generator.state = alone.engine._seeds.bit_generator.state
    asked = [GREEDY, DRAWN] * 3
    pair = [one.generate(PROMPTS, asked, use_tqdm=False) for one in (llm, alone)]
    assert tokens(pair[0]) == tokens(pair[1])
    seeds = [[one.outputs[0].seed for one in outputs] for outputs in pair]
    assert seeds[0] == seeds[1]
    assert places(llm) == [{DEVICES[0]}, {DEVICES[1]}]
    streams = [list(each.stream(PROMPTS, GREEDY)) for each in (llm, alone)]
    ends = [sorted(tokens([one for one in some if one.finished])) for some in streams]
    assert ends[0] == ends[1]
    assert len(streams[0]) == len(streams[1])
    assert not llm.has_unfinished_requests()


@pytest.mark.slow
def test_other_calls(llm: LLM, alone: LLM) -> None:
    chats = [one.chat(api_calls.CHAT, GREEDY, use_tqdm=False) for one in (llm, alone)]
    assert tokens(chats[0]) == tokens(chats[1])
    search = BeamSearchParams(beam_width=2, max_tokens=4)
    beams = [one.beam_search(PROMPTS[:3], search) for one in (llm, alone)]
    for ours, theirs in zip(*beams, strict=True):
        assert [one.tokens for one in ours.sequences] == [one.tokens for one in theirs.sequences]
    assert not llm.has_unfinished_requests()


class NotDone:
    """An array that a device is still computing."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def is_ready(self) -> bool:
        return False

    def block_until_ready(self) -> None:
        self.done.wait()


def test_no_engine_waits_for_another(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second goes through all of its steps while the first is not done with one."""
    first, second = llm.engines
    slow = NotDone()
    monkeypatch.setattr(
        replicas,
        "arrays_of",
        lambda pending: [slow] if pending is first.awaited else arrays_of(pending),
    )
    for number in range(4):
        llm.add_request(str(number), [number + 5, 3], GREEDY)
    assert counts(llm) == [2, 2]
    outputs = []
    while second.live:
        outputs += llm.step()
    assert {one.request_id for one in outputs} == {"1", "3"}
    assert counts(llm) == [2, 0]
    assert len(first.runner.batch.rows) == 2  # their plans are under way
    slow.done.set()
    monkeypatch.undo()
    assert set(api_calls.finish(llm)) == {"0", "2"}


def test_engines_hand_over_at_the_same_time(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """And if one of them fails, the others do not."""

    def add_requests() -> None:
        for number in range(4):
            llm.add_request(str(number), [number + 5, 3], GREEDY)

    add_requests()
    meeting = threading.Barrier(2, timeout=60)
    for engine in llm.engines:
        dispatch: Any = engine.runner.dispatch

        def meet(plan: Any, dispatch: Any = dispatch) -> Any:
            meeting.wait()
            return dispatch(plan)

        monkeypatch.setattr(engine.runner, "dispatch", meet)
    llm.step()
    monkeypatch.undo()
    api_calls.finish(llm)

    def fail(plan: Any) -> Any:
        raise OSError("the driver is gone")

    add_requests()
    monkeypatch.setattr(llm.engines[1].runner, "dispatch", fail)
    with pytest.raises(OSError, match="the driver is gone"):
        llm.step()
    monkeypatch.undo()
    last = api_calls.finish(llm)
    ends = {name: one.outputs[0].finish_reason for name, one in last.items()}
    assert ends == {"0": "length", "1": "abort", "2": "length", "3": "abort"}


def test_requests_go_where_their_prefix_is(llm: LLM) -> None:
    """Unless there is too much in their way."""

    def place(request_id: str) -> int:
        return llm.engines.index(llm.replicas.engine_of(request_id))

    llm.reset_prefix_cache()
    llm.generate(LONG, GREEDY, use_tqdm=False)
    assert [one.scheduler.memory.cache.num_pages for one in llm.engines] == [2, 0]
    llm.add_request("busy", [7], SamplingParams(max_tokens=40, temperature=0))
    llm.add_request("alike", [*LONG, 9], GREEDY)
    assert place("busy") == place("alike") == 0
    llm.add_request("other", [9, 9], GREEDY)
    assert place("other") == 1
    for number in range(5):
        llm.add_request(f"much {number}", [*LONG, number + 5], SamplingParams(max_tokens=80))
    assert [place(f"much {number}") for number in range(5)] == [0, 1, 0, 0, 1]
    llm.abort_request([*llm.replicas.live])
    assert counts(llm) == [0, 0]


@pytest.mark.slow
def test_a_group_computes_its_prompt_once(tiny_model: tuple) -> None:
    """Scores behind a prompt, samples of one: all of a group are in one engine."""
    # With room for all first ones of groups, none begins beside one that it could wait for.
    limits: dict[str, Any] = MORE_LIMITS | {"max_num_seqs": 8}
    alone, llm = (
        LLM(tiny_model, make_letters_tokenizer(), **limits, data_parallel_size=n) for n in (1, 2)
    )
    prompts = [[first, *LONG] for first in (50, 60, 70, 80)]
    for one in (llm, alone):
        one.reset_prefix_cache()
    before = [one.metrics().num_prefix_hit_tokens for one in (llm, alone)]
    asked = [prompt for prompt in prompts for _ in range(4)]
    ends = [[number + 5, 7] for number in range(16)]
    found, known = (one.score(asked, ends, use_tqdm=False) for one in (llm, alone))
    for ours, theirs in zip(found, known, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    hits = [one.metrics().num_prefix_hit_tokens for one in (llm, alone)]
    assert hits[0] - before[0] == hits[1] - before[1] == 4 * 3 * len(LONG)
    assert all(one.scheduler.memory.cache.num_pages >= 4 for one in llm.engines)
    many = SamplingParams(n=4, seed=1, max_tokens=4)
    for number, prompt in enumerate(prompts):
        llm.add_request(str(number), prompt, many)
    assert sorted(len(one.live) for one in llm.engines) == [2, 2]
    api_calls.finish(llm)


def test_forks_and_snapshots(llm: LLM, alone: LLM) -> None:
    """A fork shares pages with its parent, so it is in the same engine; a snapshot goes to any."""
    (known,) = tokens(alone.generate(PROMPTS[:1], GREEDY, use_tqdm=False))
    for number in range(2):
        llm.add_request(str(number), PROMPTS[0], GREEDY)
    for _ in range(4):
        llm.step()
    assert counts(llm) == [1, 1]
    for number in (1, 0):
        llm.fork(str(number), f"fork {number}")
        engine = llm.replicas.engine_of(str(number))
        assert {str(number), f"fork {number}"} == set(engine.live)
    taken = llm.snapshot("1")
    assert taken.kv is not None
    llm.abort_request(["0", "1"])
    for number in range(2):
        llm.resume(taken, f"resumed {number}")
    assert counts(llm) == [2, 2]
    found = api_calls.finish(llm)
    assert len(found) == 4
    assert [one for output in found.values() for one in tokens([output])] == [known] * 4
    with pytest.raises(ValueError, match="there is no unfinished request 'gone'"):
        llm.snapshot("gone")


def test_ids_are_of_all_engines(llm: LLM) -> None:
    for number in range(2):
        llm.add_request(str(number), [5, 6], GREEDY)
    for number in range(2):
        with pytest.raises(ValueError, match=f"'{number}' belongs to an unfinished request"):
            llm.add_request(str(number), [5, 6], GREEDY)
    assert [one.request_id for one in llm.abort_request(["1", "none", "0"])] == ["1", "0"]
    llm.add_request("0", [5, 6], GREEDY)
    assert set(api_calls.finish(llm)) == {"0"}
    assert llm.replicas._backlog == [0, 0]  # type: ignore[union-attr]
    assert not llm.replicas._placed  # type: ignore[union-attr]
    assert not llm.replicas._groups  # type: ignore[union-attr]


def test_what_is_done_to_one_engine_is_done_to_all(
    llm: LLM, alone: LLM, tiny_model: tuple, counter: Any
) -> None:
    plan: Any = {"sampling": [SamplingClass.GREEDY], "logprobs": False}
    assert llm.warm_up(**plan) == len(llm.plan(**plan))
    for number in range(2):
        llm.add_request(str(number), [5, 6], GREEDY)
    llm.step()
    assert not llm.reset_prefix_cache()
    assert llm.reset_prefix_cache(reset_running_requests=True)
    llm.sleep()
    left = jax.tree.leaves([one.runner.state for one in llm.engines])
    assert all(leaf.is_deleted() for leaf in left)
    with pytest.raises(RuntimeError, match="the engine sleeps"):
        llm.step()
    llm.wake_up()
    before = counter.count
    rollouts = run_for(llm, num_finished=1)
    assert len(rollouts.finished) >= 1
    api_calls.finish(llm)
    assert counter.count == before
    assert places(llm) == [{DEVICES[0]}, {DEVICES[1]}]
    module, params = tiny_model
    changed = jax.tree.map(lambda leaf: leaf * 1.25, params)
    known = LLM((module, changed), make_letters_tokenizer(), **MORE_LIMITS)
    over = NamedSharding(Mesh(np.array(DEVICES), ("x",)), PartitionSpec())
    for new in (changed, jax.device_put(changed, over), jax.tree.map(np.asarray, changed)):
        llm.update_params(new)
        asked: list[Any] = [PROMPTS, GREEDY, False]
        assert tokens(llm.generate(*asked)) == tokens(known.generate(*asked))
        assert places(llm) == [{DEVICES[0]}, {DEVICES[1]}]
        llm.update_params(params)
        assert tokens(llm.generate(*asked)) == tokens(alone.generate(*asked))
    with pytest.raises(ValueError, match="embed is float32"):
        llm.update_params(params | {"embed": params["embed"][:7]})
    assert llm.weights_version == 6
    assert [one.weights_version for one in llm.engines] == [6, 6]


@pytest.mark.slow
def test_each_engine_on_several_devices(
    tiny_directory: Path, tiny_model: tuple, alone: LLM
) -> None:
    """Of a file, of a pair on one device, and of arrays over all devices."""
    module, params = tiny_model
    mesh = Mesh(np.array(DEVICES[::-1]), ("x",))
    over = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    known = tokens(alone.generate(PROMPTS, GREEDY, use_tqdm=False))
    options: dict[str, Any] = {**MORE_LIMITS, "data_parallel_size": 2}
    tokenizer = make_letters_tokenizer()
    first = LLM(tiny_directory, tokenizer, dtype="float32", **options, tensor_parallel_size=2)
    second = LLM((module, over), tokenizer, **options, mesh=mesh)
    for llm, devices in ((first, DEVICES), (second, DEVICES[::-1])):
        assert places(llm) == [set(devices[:2]), set(devices[2:])]
        assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == known
        block = llm.engines[1].runner.params["layers_0"]
        assert block["o"].addressable_shards[1].data.shape == (64, 32)
        llm.update_params(over)
        assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == known
    device = first.memory_plan.device
    assert device is not None
    assert alone.memory_plan.device is not None
    assert device.limit_bytes == alone.memory_plan.device.limit_bytes // 4  # of one CPU


def test_a_step_that_fails_takes_the_requests_of_its_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        llm.add_request(str(number), [5, 6 + number], GREEDY)
    second = llm.engines[1]

    def fail(pending: Any) -> Any:
        raise OSError("the device is gone")

    monkeypatch.setattr(second.runner, "collect", fail)
    monkeypatch.setattr(replicas, "arrays_of", lambda pending: [])  # both are to be read
    with pytest.raises(OSError, match="the device is gone"):
        llm.step()  # which has read the first engine's by then
    monkeypatch.undo()
    last = api_calls.finish(llm)
    ends = {name: one.outputs[0].finish_reason for name, one in last.items()}
    assert ends == {"0": "length", "1": "abort", "2": "length", "3": "abort"}


@pytest.mark.slow
def test_a_job_of_ray_on_several_devices(tiny_model: tuple) -> None:
    options: dict[str, Any] = {
        "model": tiny_model,
        "tokenizer": make_letters_tokenizer(),
        **MORE_LIMITS,
    }
    batch = {"prompt": np.array(["The sea is", "Rivers", "No"], object)}
    params = {"temperature": 0, "max_tokens": 6}
    known = list(Generator(params, **options)(batch)["output_text"])
    for name in ("tensor_parallel_size", "data_parallel_size"):
        assert list(Generator(params, **options | {name: 2})(batch)["output_text"]) == known


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"data_parallel_size": 5}, "data_parallel_size is 5, with 1 devices for each engine"),
        ({"data_parallel_size": 4, "tensor_parallel_size": 2}, "is 4, with 2 devices for each"),
        ({"data_parallel_size": 0}, "data_parallel_size is 0; it must be"),
        ({"data_parallel_size": 3, "mesh": Mesh(np.array(DEVICES), ("x",))}, "mesh has 4 devices"),
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


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"deterministic": True}])
def test_engines_of_other_kinds(tiny_model: tuple, options: dict[str, Any]) -> None:
    new = jax.tree.map(lambda leaf: leaf * 1.25, tiny_model[1])
    pair = [LLM(tiny_model, **MORE_LIMITS, **options, data_parallel_size=n) for n in (2, 1)]
    for llm in pair:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        llm.update_params(new)
    found, known = (one.generate(PROMPTS, GREEDY, use_tqdm=False) for one in pair)
    assert tokens(found) == tokens(known)
    assert places(pair[0]) == [{DEVICES[0]}, {DEVICES[1]}]


@pytest.mark.slow
def test_adapters_are_those_of_all_engines(tiny_model: tuple) -> None:
    """What is cached with one is found where it lies, and goes with it in every engine."""
    options: dict[str, Any] = {**MORE_LIMITS, "enable_lora": True, "max_lora_rank": 4}
    pair = [LLM(tiny_model, **options, data_parallel_size=count) for count in (2, 1)]
    tree = init_lora(jax.random.key(3), pair[0].params, rank=4)
    trees = [jax.tree.map(lambda leaf: leaf + 0.1, tree), tree]
    outputs: list[Any] = [[], []]
    for llm, found in zip(pair, outputs, strict=True):
        policy = llm.load_lora("policy", trees[0], scale=0.5)
        adapters = [policy, None] * 3
        found += llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=adapters)
        long = [[*LONG, number] for number in range(5, 11)]
        found += llm.generate(LONG, GREEDY, use_tqdm=False, lora_request=policy)
        found += llm.generate(long, GREEDY, use_tqdm=False, lora_request=adapters)
        llm.update_lora("policy", trees[1], scale=0.5)
        found += llm.generate(long, GREEDY, use_tqdm=False, lora_request=adapters)
    assert tokens(outputs[0]) == tokens(outputs[1])
    assert min(one.num_steps for one in pair[0].engines) > 0
