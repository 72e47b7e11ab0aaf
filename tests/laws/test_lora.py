"""Adapters of requests, unmerged: what comes out is what merged models give, whoever is beside."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from folojax import LLM, LoRARequest, RequestOutput, SamplingParams, init_lora
from folojax.steps.executables import Executable
from tests.conftest import CompileCounter, check_is_empty
from tests.families import save_family
from tests.lora_adapters import Adapted, save_adapter
from tests.reference import MORE_LIMITS, TIGHT, TINY_LIMITS, greedy, load_model

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0)
ROOM: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
PROMPTS = [list(range(5, 45)), [70, 3, 9], list(range(5, 40)), [101, 55]]


class Bed(NamedTuple):
    """A base, adapters of it, and the requests that name these."""

    directory: Path
    base: Any  # of transformers
    adapters: dict[str, Adapted]
    requests: dict[str, LoRARequest]


def make_bed(base: Any, directory: Path, root: Path, count: int = 3) -> Bed:
    kinds: list[dict[str, Any]] = [
        {"rank": 4},
        {"rank": 8, "use_rslora": True, "alpha": 4},
        {"rank": 2, "targets": ["q_proj", "down_proj", "c_attn", "qkv_proj"]},
    ]
    adapters = {
        f"a{i}": save_adapter(base, root / f"a{i}", seed=i, **kinds[i % 3]) for i in range(count)
    }
    requests = {
        name: LoRARequest(name, number, str(one.directory))
        for number, (name, one) in enumerate(adapters.items(), start=1)
    }
    return Bed(directory, base, adapters, requests)


@pytest.fixture(scope="module")
def bed(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return make_bed(load_model(tiny_directory), tiny_directory, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def shared_llm(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, **TINY_LIMITS, **ROOM, check_integrity=True)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    yield shared_llm
    for one in shared_llm.list_loras():
        shared_llm.remove_lora(one.lora_name)
    check_is_empty(shared_llm)


def tree_of(llm: LLM, seed: int, rank: int = 8) -> Any:
    """A random adapter in memory, made without a program."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), llm.params, rank))
    return jax.tree.map(lambda one: rng.normal(0, 0.1, one.shape).astype(np.float32), shapes)


def check_rows(
    base: Any,
    adapters: Mapping[str, Adapted],
    outputs: list[RequestOutput],
    wanted: list[tuple[Any, Any]],
) -> None:
    """Outputs are those of transformers' models, base or merged."""
    for output, (prompt, name) in zip(outputs, wanted, strict=True):
        model = base if name is None else adapters[name].merged
        tokens, logprobs, _ = greedy(model, prompt, 10)
        one = output.outputs[0]
        assert one.token_ids == tokens, name
        assert one.logprobs is not None
        found = [entry[token].logprob for entry, token in zip(one.logprobs, tokens, strict=True)]
        np.testing.assert_allclose(found, logprobs, atol=1e-4)
        assert (output.lora_request and output.lora_request.lora_name) == name
        assert one.lora_versions == (None if name is None else [0] * 10)


def run_mixed(llm: LLM, bed: Bed) -> None:
    wanted = [(prompt, name) for prompt in PROMPTS for name in (None, *bed.adapters)]
    several = [None if name is None else bed.requests[name] for _, name in wanted]
    outputs = llm.generate([prompt for prompt, _ in wanted], GREEDY, False, several)
    check_rows(bed.base, bed.adapters, outputs, wanted)


def test_rows_with_adapters_and_none_are_those_of_merged_models(llm: LLM, bed: Bed) -> None:
    """Three adapters, room for two, four prompts of which two begin alike, in chunks."""
    run_mixed(llm, bed)
    # Each found what was cached with its own adapter, and no more.
    again = llm.generate(PROMPTS[0], GREEDY, False, bed.requests["a0"])
    assert again[0].num_cached_tokens == 32
    check_rows(bed.base, bed.adapters, again, [(PROMPTS[0], "a0")])
    fresh = llm.load_lora("fresh", tree_of(llm, 0))
    assert llm.generate(PROMPTS[0], GREEDY, False, fresh)[0].num_cached_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["gpt2", "phi3", "qwen3-moe", "gemma2", "deepseek-v3", "glm4-moe", "qwen3.5"]
)
def test_families(case: str, tmp_path: Path) -> None:
    base = save_family(case, tmp_path / "base")
    bed = make_bed(base, tmp_path / "base", tmp_path)
    limits = TINY_LIMITS | {"max_num_batched_tokens": 64}
    llm = LLM(tmp_path / "base", dtype="float32", skip_tokenizer_init=True, **limits, **ROOM)
    run_mixed(llm, bed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"max_decode_steps": 4},
        {"deterministic": True},
        {"num_pages": 20},
        {"async_scheduling": False, "enable_prefix_caching": False},
        {"max_loras": 3, "scheduling_policy": "priority"},
        {"max_loras": 1, "enable_chunked_prefill": False, "max_num_batched_tokens": 128},
    ],
    ids=str,
)
def test_in_every_kind_of_engine(options: dict[str, Any], tiny_model: tuple, bed: Bed) -> None:
    llm = LLM(tiny_model, **TINY_LIMITS | ROOM | options, check_integrity=True)
    run_mixed(llm, bed)
    check_is_empty(llm)


@pytest.mark.slow
def test_programs_that_are_whole(
    tiny_model: tuple, bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step with its sampling is one program."""
    from folojax.backend import backend

    whole = backend.dataclasses.replace(backend.CPU, steps="whole")
    monkeypatch.setattr(backend, "CPU", whole)
    llm = LLM(tiny_model, **TINY_LIMITS, **ROOM)
    assert llm.engine.runner.steps.kind == "whole"
    run_mixed(llm, bed)


@pytest.mark.slow
def test_many_rows_are_each_as_alone(
    tiny_model: tuple, tiny_directory: Path, tmp_path: Path
) -> None:
    """32 rows with eight adapters and none: shuffled, preempted, cached; greedy and drawn."""
    bed = make_bed(load_model(tiny_directory), tiny_directory, tmp_path, 8)
    rng = np.random.default_rng(0)
    common = rng.integers(3, 98, 40).tolist()
    prompts = [
        common * (i % 2) + rng.integers(3, 98, int(rng.integers(2, 40))).tolist() for i in range(32)
    ]
    params = [
        SamplingParams(temperature=i % 3 / 2, seed=i or None, max_tokens=20, ignore_eos=True)
        for i in range(32)
    ]
    loras = [[None, *bed.requests.values()][i % 9] for i in range(32)]
    room = ROOM | {"max_loras": 8}
    ample = LLM(tiny_model, **MORE_LIMITS, **room)
    alone = [
        ample.generate([one], [how], False, lora)[0].outputs[0].token_ids
        for one, how, lora in zip(prompts, params, loras, strict=True)
    ]
    for limits in (MORE_LIMITS, MORE_LIMITS | TIGHT, MORE_LIMITS | {"max_num_seqs": 3}):
        llm = LLM(tiny_model, **limits, **room | {"max_loras": min(8, limits["max_num_seqs"])})
        order = rng.permutation(32).tolist()
        for _ in range(2):  # the second time much is cached
            outputs = llm.generate(
                [prompts[i] for i in order],
                [params[i] for i in order],
                False,
                [loras[i] for i in order],
            )
            assert [one.outputs[0].token_ids for one in outputs] == [alone[i] for i in order]
        if limits["num_pages"] == TIGHT["num_pages"]:
            assert any(one.metrics.num_preemptions for one in outputs)
        check_is_empty(llm)


@pytest.mark.slow
def test_bits_do_not_depend_on_the_neighbours_adapters(tiny_model: tuple, bed: Bed) -> None:
    llm = LLM(tiny_model, **MORE_LIMITS, **ROOM | {"max_loras": 3}, deterministic=True)
    mine = bed.requests["a1"]
    (alone,) = llm.generate(PROMPTS[0], GREEDY, False, mine)
    for others in ([None] * 3, list(bed.requests.values()), [mine, None, bed.requests["a2"]]):
        for slot in range(3):  # wherever it lies
            llm.remove_lora("a1")
            for number in range(slot):
                llm.generate(
                    PROMPTS[1], GREEDY, False, llm.load_lora(f"x{number}", tree_of(llm, 1))
                )
            outputs = llm.generate(PROMPTS, GREEDY, False, [mine, *others])
            assert outputs[0].outputs[0].logprobs == alone.outputs[0].logprobs
            for number in range(slot):
                llm.remove_lora(f"x{number}")
    (score,) = llm.score(PROMPTS[0], [alone.outputs[0].token_ids], False, mine)
    assert alone.outputs[0].logprobs is not None
    sampled = [next(iter(entry.values())).logprob for entry in alone.outputs[0].logprobs]
    assert score.logprobs == sampled


def test_nothing_is_compiled_when_adapters_come_go_and_change(
    llm: LLM, bed: Bed, counter: CompileCounter
) -> None:
    run_mixed(llm, bed)
    before = counter.count
    for rank in (1, 3, 8):
        one = llm.load_lora(f"rank-{rank}", tree_of(llm, rank, rank))
        llm.generate(PROMPTS, GREEDY, False, [one, None, bed.requests["a0"], None])
        llm.update_lora(one.lora_name, tree_of(llm, 9, rank), scale=0.5)
        llm.generate(PROMPTS, GREEDY, False, one)
        llm.remove_lora(one.lora_name)
    assert counter.count == before


def test_steps_without_adapters_are_the_plain_programs(
    llm: LLM, bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Executable] = []
    steps: Any = llm.engine.runner.steps
    call = steps.call

    def note(one: Executable, *args: Any, **more: Any) -> Any:
        called.append(one)
        return call(one, *args, **more)

    monkeypatch.setattr(steps, "call", note)
    llm.generate(PROMPTS, GREEDY, False)
    assert not any(one.is_adapted for one in called)
    llm.generate(PROMPTS, GREEDY, False, [bed.requests["a0"], None, None, None])
    assert any(one.is_adapted for one in called)
    planned = [entry.executable for entry in llm.plan().entries]
    assert set(called) <= set(planned)


def test_an_update_drops_what_was_cached_with_that_adapter_alone(llm: LLM) -> None:
    first, second = tree_of(llm, 1), tree_of(llm, 2)
    one, other = llm.load_lora("one", first), llm.load_lora("other", second)
    for lora in (one, other, None):
        llm.generate(PROMPTS[0], GREEDY, False, lora)
    llm.update_lora("one", second)
    found = llm.generate([PROMPTS[0]] * 3, GREEDY, False, [one, other, None])
    assert [output.num_cached_tokens for output in found] == [0, 32, 32]
    assert found[0].outputs[0].token_ids == found[1].outputs[0].token_ids
    assert found[0].outputs[0].lora_versions == [1] * 10
    assert found[1].outputs[0].lora_versions == [0] * 10
    assert found[0].outputs[0].weights_versions == [0] * 10


@pytest.mark.parametrize("running", ["recompute", "keep", "restart"])
def test_requests_that_run_go_on_with_the_update(running: str, llm: LLM) -> None:
    first, second = tree_of(llm, 1), tree_of(llm, 2)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    one = llm.load_lora("one", first)
    bystander = llm.load_lora("bystander", second)
    expected = llm.generate(PROMPTS[0], params, False, one)[0].outputs[0].token_ids
    beside = llm.generate(PROMPTS[1], params, False, bystander)[0].outputs[0].token_ids
    llm.add_request("mine", PROMPTS[0], params, lora_request=one)
    llm.add_request("beside", PROMPTS[1], params, lora_request=bystander)
    num_told = 0
    while num_told < 6:
        told = {output.request_id: output for output in llm.step()}
        num_told = len(told["mine"].outputs[0].token_ids) if "mine" in told else 0
    llm.update_lora("one", second, running=running)
    done: dict[str, RequestOutput] = {}
    while llm.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.step() if output.finished}
    assert done["beside"].outputs[0].token_ids == beside
    assert done["beside"].metrics.num_preemptions == 0
    mine = done["mine"].outputs[0]
    num_old = mine.lora_versions.index(1) if mine.lora_versions else -1
    assert mine.lora_versions == [0] * num_old + [1] * (16 - num_old)
    if running == "restart":
        assert num_old == 0
        fresh = llm.generate(PROMPTS[0], params, False, one)[0].outputs[0].token_ids
        assert mine.token_ids == fresh
    else:
        assert num_old >= 6
        assert mine.token_ids[:num_old] == expected[:num_old]
    if running == "recompute":
        prompt = [*PROMPTS[0], *mine.token_ids[:num_old]]
        rest = SamplingParams(temperature=0, max_tokens=16 - num_old, ignore_eos=True)
        (fresh_output,) = llm.generate([prompt], rest, False, one)
        assert mine.token_ids[num_old:] == fresh_output.outputs[0].token_ids


def test_forks_snapshots_scores_beams_and_streams_have_it_too(llm: LLM) -> None:
    one = llm.load_lora("one", tree_of(llm, 1))
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0)
    (expected,) = llm.generate(PROMPTS[0], params, False, one)
    tokens = expected.outputs[0].token_ids
    assert [*llm.stream(PROMPTS[0], params, one)][-1].outputs[0].token_ids == tokens
    (score,) = llm.score(PROMPTS[0], [tokens], False, one)
    (plain,) = llm.score(PROMPTS[0], [tokens], False)
    assert expected.outputs[0].logprobs is not None
    sampled = [next(iter(entry.values())).logprob for entry in expected.outputs[0].logprobs]
    np.testing.assert_allclose(score.logprobs, sampled, atol=1e-4)
    assert np.abs(np.subtract(plain.logprobs, sampled)).max() > 0.1
    llm.add_request("parent", PROMPTS[0], params, lora_request=one)
    while not any(len(output.outputs[0].token_ids) >= 3 for output in llm.step()):
        pass
    llm.fork("parent", "child")
    snapshot = llm.snapshot("parent")
    llm.resume(snapshot, "later")
    done: dict[str, RequestOutput] = {}
    while llm.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.step() if output.finished}
    assert {name: output.outputs[0].token_ids for name, output in done.items()} == dict.fromkeys(
        ("parent", "child", "later"), tokens
    )
    assert done["later"].num_cached_tokens > 0
    llm.update_lora("one", tree_of(llm, 2))
    with pytest.raises(ValueError, match="computed with other weights"):
        llm.resume(snapshot, "too late")


def test_what_is_refused(llm: LLM, tiny_model: tuple, bed: Bed, tmp_path: Path) -> None:
    tree = tree_of(llm, 0)
    one = llm.load_lora("one", tree)
    with pytest.raises(ValueError, match="adapter 'one' is known: update_lora replaces it"):
        llm.load_lora("one", tree)
    with pytest.raises(ValueError, match="have one name"):
        llm.generate(PROMPTS[0], GREEDY, False, LoRARequest("one", 7))
    with pytest.raises(ValueError, match="have one number"):
        llm.generate(PROMPTS[0], GREEDY, False, LoRARequest("two", one.lora_int_id, "somewhere"))
    with pytest.raises(ValueError, match="'two' is not known, and lora_path is empty"):
        llm.generate(PROMPTS[0], GREEDY, False, LoRARequest("two", 2))
    with pytest.raises(ValueError, match="lora_request has 1 entries for 4 prompts"):
        llm.generate(PROMPTS, GREEDY, False, [one])
    with pytest.raises(ValueError, match="lora_request is 'one'; it must be a LoRARequest"):
        llm.generate(PROMPTS, GREEDY, False, "one")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora_int_id is 0; it must be an integer of at least 1"):
        LoRARequest("one", 0)
    with pytest.raises(ValueError, match="adapter 'none' is not known; there are"):
        llm.update_lora("none", tree)
    bad = {
        "layers_0": {"qkv": {"a": np.zeros((2, 9)), "b": np.zeros((128, 2))}},
        "layers_9": {"o": {}},
        "layers_1": {"embed": {}, "o": {"a": np.zeros((99, 64)), "b": np.zeros((64, 99))}},
    }
    with pytest.raises(ValueError, match="does not fit the model") as info:
        llm.update_lora("one", bad)
    told = str(info.value)
    assert "layers_0/qkv has a [2, 9] and b [128, 2], the kernel is [128, 64]" in told
    assert "layers_9 is no layer of the model" in told
    assert "layers_1/embed has no updates here" in told
    assert "layers_1/o has rank 99; it must be from 1 to max_lora_rank, 8" in told
    llm.add_request("busy", PROMPTS[0], GREEDY, lora_request=one)
    with pytest.raises(ValueError, match=r"requests \['busy'\] go on with adapter 'one'"):
        llm.remove_lora("one")
    llm.abort_request("busy")
    config = bed.adapters["a0"].directory / "adapter_config.json"
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(json.loads(config.read_text()) | {"use_dora": True})
    )
    with pytest.raises(ValueError, match="use_dora"):
        llm.generate(PROMPTS, GREEDY, False, [one, None, LoRARequest("d", 5, str(tmp_path)), None])
    plain = LLM(tiny_model, **TINY_LIMITS)
    with pytest.raises(ValueError, match="pass enable_lora=True to LLM"):
        plain.generate(PROMPTS, GREEDY, False, bed.requests["a0"])
