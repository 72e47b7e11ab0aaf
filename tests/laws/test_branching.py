"""Fork, snapshot and resume: the tokens of an undisturbed request, and nothing computed twice."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from folojax import LLM, RequestOutput, SamplingParams, Snapshot, load_snapshot
from tests.conftest import check_is_empty
from tests.mixed_requests import check_same, make_llm, make_prompts
from tests.reference import TIGHT

SEEDED = SamplingParams(
    temperature=0.9, seed=5, max_tokens=30, ignore_eos=True, logprobs=2, presence_penalty=0.6
)
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=2)


def prompt() -> list[int]:
    return make_prompts()[1][:37]


def make(model: tuple, **options: Any) -> LLM:
    return make_llm(model, check_integrity=True, **options)


def finish(llm: LLM) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.step()}
    check_is_empty(llm)
    return outputs


def run_until(llm: LLM, request_id: str, num_tokens: int) -> None:
    for _ in range(100):
        for output in llm.step():
            if output.request_id == request_id and len(output.outputs[0].token_ids) >= num_tokens:
                return
    raise AssertionError("it never got there")


@pytest.fixture(scope="module")
def expected(tiny_model: tuple) -> dict[bool, RequestOutput]:
    """Undisturbed, greedy or not."""
    llm = make(tiny_model)
    greedy, seeded = llm.generate([prompt()] * 2, [GREEDY, SEEDED], use_tqdm=False)
    return {True: greedy, False: seeded}


@pytest.mark.parametrize("options", [{}, {"enable_prefix_caching": False}, {"max_decode_steps": 4}])
def test_a_fork_goes_on_as_the_other_does(
    tiny_model: tuple, expected: dict[bool, RequestOutput], options: dict[str, Any]
) -> None:
    """With its parameters and seed, penalties and log-probabilities included."""
    llm = make(tiny_model, **options)
    llm.add_request("parent", prompt(), SEEDED)
    run_until(llm, "parent", 11)
    computed = llm.metrics().num_scheduled_tokens
    llm.fork("parent", "child")
    outputs = finish(llm)
    check_same([outputs["parent"], outputs["child"]], [expected[False]] * 2)
    # The child computes its own tokens, the first of which is the last that was known.
    assert llm.metrics().num_scheduled_tokens - computed <= 2 * 20 + 4
    assert outputs["child"].num_cached_tokens >= len(prompt()) + 10


def test_a_fork_may_ask_for_something_else(
    tiny_model: tuple, expected: dict[bool, RequestOutput]
) -> None:
    """Other parameters, several samples, an earlier token; the parent never notices."""
    llm = make(tiny_model)
    llm.add_request("parent", prompt(), GREEDY)
    run_until(llm, "parent", 11)
    warm = SamplingParams(temperature=2.0, seed=3, n=3, max_tokens=20, ignore_eos=True)
    llm.fork("parent", "others", warm, num_output_tokens=8)
    llm.fork("parent", "again", dataclasses.replace(GREEDY, max_tokens=15), num_output_tokens=0)
    outputs = finish(llm)
    check_same([outputs["parent"]], [expected[True]])
    tokens = expected[True].outputs[0].token_ids
    assert outputs["again"].outputs[0].token_ids == tokens[:15]
    samples = [one.token_ids for one in outputs["others"].outputs]
    assert all(one[:8] == tokens[:8] and len(one) == 20 for one in samples)
    # Each is what a request with those tokens as its prompt gives: draws depend on the position.
    for index, one in enumerate(samples):
        ask = SamplingParams(temperature=2.0, seed=3 + index, max_tokens=12, ignore_eos=True)
        (alone,) = llm.generate([prompt() + tokens[:8]], ask, use_tqdm=False)
        assert one[8:] == alone.outputs[0].token_ids


def test_one_of_several_samples_is_forked_and_copied(tiny_model: tuple) -> None:
    """With the seed of that sample; also when another of them has ended."""
    llm = make(tiny_model)
    params = SamplingParams(n=2, seed=4, max_tokens=25, ignore_eos=True)
    (free,) = llm.generate([prompt()], params, use_tqdm=False)
    first, second = (one.token_ids for one in free.outputs)
    end = next(token for token in first[3:] if token not in second)
    params = dataclasses.replace(params, stop_token_ids=[end])
    llm.add_request("parent", prompt(), params)
    while not any(output.outputs[0].finished for output in llm.step()):
        pass
    llm.fork("parent", "fork", index=1)
    llm.resume(llm.snapshot("parent", 1), "copy")
    outputs = finish(llm)
    assert [len(one.token_ids) < 25 for one in outputs["parent"].outputs] == [True, False]
    for name in ("fork", "copy"):
        (one,) = outputs[name].outputs
        assert (one.token_ids, one.seed) == (second, 5), name


def test_a_fork_outlives_its_parent(tiny_model: tuple, expected: dict[bool, RequestOutput]) -> None:
    llm = make(tiny_model, max_num_seqs=1, enable_prefix_caching=False)
    llm.add_request("parent", prompt(), GREEDY)
    run_until(llm, "parent", 5)
    llm.fork("parent", "child")
    (gone,) = llm.abort_request("parent")
    assert gone.outputs[0].finish_reason == "abort"
    check_same([finish(llm)["child"]], [expected[True]])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"parent_id": "nobody"}, "no unfinished request 'nobody'"),
        ({"request_id": "parent"}, "belongs to an unfinished request"),
        ({"index": 1}, "samples 0 to 0"),
        ({"index": True}, "samples 0 to 0"),
        ({"num_output_tokens": 99}, "give a number from 0"),
        ({"num_output_tokens": -1}, "give a number from 0"),
        ({"sampling_params": SamplingParams(max_tokens=3)}, "raise max_tokens"),
    ],
)
def test_bad_forks_are_refused(tiny_model: tuple, change: dict[str, Any], text: str) -> None:
    llm = make(tiny_model)
    llm.add_request("parent", prompt(), GREEDY)
    run_until(llm, "parent", 5)
    with pytest.raises(ValueError, match=text):
        llm.fork(**{"parent_id": "parent", "request_id": "child", **change})
    assert list(finish(llm)) == ["parent"]


def test_log_probabilities_that_are_not_known_are_refused(tiny_model: tuple) -> None:
    llm = make(tiny_model)
    llm.add_request("parent", prompt(), dataclasses.replace(GREEDY, logprobs=None))
    run_until(llm, "parent", 5)
    with pytest.raises(ValueError, match="came without"):
        llm.fork("parent", "child", GREEDY)
    llm.fork("parent", "child", GREEDY, num_output_tokens=0)  # none is missing
    assert len(finish(llm)["child"].outputs[0].logprobs or ()) == 30


# --- snapshots --------------------------------------------------------------------------------


def take(llm: LLM, params: SamplingParams, num_tokens: int = 11) -> Snapshot:
    """A snapshot of a request that is then dropped."""
    llm.add_request("x", prompt(), params)
    run_until(llm, "x", num_tokens)
    snapshot = llm.snapshot("x")
    llm.abort_request("x")
    finish(llm)
    return snapshot


@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize("options", [{}, {"page_size": 8, "num_pages": 90}, {"max_num_seqs": 1}])
def test_a_snapshot_is_resumed_in_another_engine(
    tiny_model: tuple,
    expected: dict[bool, RequestOutput],
    tmp_path: Path,
    options: dict[str, Any],
    is_greedy: bool,
) -> None:
    """Through a file; with other pages; and only what was not computed is computed there."""
    params = GREEDY if is_greedy else SEEDED
    snapshot = take(make(tiny_model), params)
    snapshot.save(tmp_path / "x.safetensors")
    loaded = load_snapshot(tmp_path / "x.safetensors")
    assert (loaded.sampling_params, loaded.progress) == (
        snapshot.sampling_params,
        snapshot.progress,
    )
    model = jax.tree.map(lambda leaf: leaf + 0, tiny_model[1])  # the same weights elsewhere
    llm = make((tiny_model[0], model), min_swap_tokens=0, **options)
    llm.resume(loaded, "y")
    output = finish(llm)["y"]
    check_same([output], [expected[is_greedy]])
    num_known = len(snapshot.output_token_ids)
    assert llm.metrics().num_scheduled_tokens <= 30 - num_known + 2
    assert output.num_cached_tokens >= len(prompt()) + num_known - 2


def test_a_file_keeps_every_parameter(tiny_model: tuple, tmp_path: Path) -> None:
    params = dataclasses.replace(
        GREEDY, logit_bias={5: 1.0}, allowed_token_ids=list(range(40)), bad_words=["x"]
    )
    snapshot = take(make(tiny_model), params)
    snapshot.save(tmp_path / "x.safetensors")
    assert load_snapshot(tmp_path / "x.safetensors").sampling_params == snapshot.sampling_params


def test_keys_and_values_of_several_weights_are_in_no_snapshot(tiny_model: tuple) -> None:
    """Of a request that went on with those of the old weights: it is computed again by the new."""
    llm = make(tiny_model, min_swap_tokens=0)
    llm.add_request("x", prompt(), GREEDY)
    run_until(llm, "x", 7)
    llm.update_params(jax.tree.map(lambda leaf: leaf * 1.25, tiny_model[1]), running="keep")
    snapshot = llm.snapshot("x")
    llm.abort_request("x")
    finish(llm)
    assert snapshot.kv is None
    llm.resume(snapshot, "y")
    found = finish(llm)["y"].outputs[0].token_ids
    begin = list(snapshot.output_token_ids)
    rest = dataclasses.replace(GREEDY, max_tokens=30 - len(begin))
    (alone,) = llm.generate([prompt() + begin], rest, use_tqdm=False)
    assert found == begin + alone.outputs[0].token_ids


def test_a_snapshot_is_resumed_by_an_engine_that_sleeps(
    tiny_model: tuple, expected: dict[bool, RequestOutput]
) -> None:
    """Its K/V wait for the cache to be there again, and nothing is computed twice."""
    llm = make(tiny_model, min_swap_tokens=0)
    snapshot = take(llm, GREEDY)
    llm.sleep()
    llm.resume(snapshot, "y")
    llm.wake_up()
    output = finish(llm)["y"]
    check_same([output], [expected[True]])
    assert output.num_cached_tokens >= len(prompt()) + len(snapshot.output_token_ids) - 2


def test_a_snapshot_may_be_resumed_often_and_beside_its_request(
    tiny_model: tuple, expected: dict[bool, RequestOutput]
) -> None:
    llm = make(tiny_model)
    llm.add_request("x", prompt(), GREEDY)
    run_until(llm, "x", 7)
    snapshot = llm.snapshot("x")
    for name in "abc":
        llm.resume(snapshot, name)
    outputs = finish(llm)
    check_same([outputs[name] for name in "xabc"], [expected[True]] * 4)


def test_a_snapshot_of_a_waiting_or_swapped_request(
    tiny_model: tuple, expected: dict[bool, RequestOutput]
) -> None:
    """One that has computed nothing has no K/V; one that was preempted has them in host memory."""
    llm = make(
        tiny_model,
        max_num_seqs=2,
        **TIGHT,
        num_host_pages=20,
        min_swap_tokens=0,
        enable_prefix_caching=False,
    )
    params = dataclasses.replace(GREEDY, max_tokens=60)
    for name in ("first", "second", "third"):
        llm.add_request(name, prompt(), params)
    for _ in range(200):
        llm.step()
        if llm.metrics().num_preemptions:
            break
    second, third = llm.snapshot("second"), llm.snapshot("third")
    assert third.kv is None
    assert second.kv is not None
    assert second.kv.num_tokens >= len(prompt()) + len(second.output_token_ids) - 2
    llm.abort_request(["first", "second", "third"])
    finish(llm)
    other = make(tiny_model)
    for name, snapshot in [("second", second), ("third", third)]:
        other.resume(snapshot, name, GREEDY)
    outputs = finish(other)
    check_same([outputs["second"], outputs["third"]], [expected[True]] * 2)


def test_other_weights_are_refused_but_for_the_kv(tiny_model: tuple) -> None:
    llm = make(tiny_model)
    snapshot = take(llm, GREEDY)
    params = jax.tree.map(lambda leaf: leaf * 1.01, llm.params)
    llm.update_params(params)
    with pytest.raises(ValueError, match="other weights"):
        llm.resume(snapshot, "y")
    llm.resume(snapshot.without_kv(), "y")
    tokens = finish(llm)["y"].outputs[0].token_ids
    begin = list(snapshot.output_token_ids)
    rest = dataclasses.replace(GREEDY, max_tokens=30 - len(begin))
    (alone,) = llm.generate([prompt() + begin], rest, use_tqdm=False)
    assert tokens == begin + alone.outputs[0].token_ids


def test_new_weights_drop_what_waits_in_host_memory(tiny_model: tuple) -> None:
    """A request that was resumed and not yet admitted is computed again by the new weights."""
    llm = make(tiny_model)
    snapshot = take(llm, GREEDY)
    llm.resume(snapshot, "y")
    params = jax.tree.map(lambda leaf: leaf * 1.01, llm.params)
    llm.update_params(params)
    tokens = finish(llm)["y"].outputs[0].token_ids
    begin = list(snapshot.output_token_ids)
    rest = dataclasses.replace(GREEDY, max_tokens=30 - len(begin))
    (alone,) = llm.generate([prompt() + begin], rest, use_tqdm=False)
    assert tokens == begin + alone.outputs[0].token_ids


def test_bad_snapshot_files_are_refused(tmp_path: Path) -> None:
    for name, content in [("empty", b""), ("text", b"no snapshot at all"), ("cut", b"\x40" * 9)]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no snapshot"):
            load_snapshot(path)
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="is no snapshot that this version reads"):
        load_snapshot(tmp_path / "other")
    fields = {"folojax": json.dumps({"format": "folojax snapshot 1"})}
    save_file({}, tmp_path / "half", metadata=fields)
    with pytest.raises(ValueError, match="is no whole snapshot: KeyError"):
        load_snapshot(tmp_path / "half")
    with pytest.raises(FileNotFoundError):
        load_snapshot(tmp_path / "missing")
