"""Deterministic mode: tokens and log-probabilities are the same bits, whatever happens around them.

A small version on a tiny model, and the proof on the embedded one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingClass, SamplingParams
from tests import dense
from tests.conftest import CompileCounter
from tests.families import save_family
from tests.reference import MORE_LIMITS, TIGHT

pytestmark = pytest.mark.usefixtures("optimised")


class Case(NamedTuple):
    """A way to run the same requests; `order` shuffles, `arrivals` come before each step."""

    options: dict[str, Any]
    order: int = 0
    arrivals: int = 1000


class Workload(NamedTuple):
    """Requests: prompts of token ids, greedy and seeded, of different lengths."""

    prompts: list[list[int]]
    params: list[SamplingParams]


def make_workload(
    count: int, vocab_size: int, longest: int, max_tokens: int, alternatives: int = 0
) -> Workload:
    """Half of the prompts begin alike, so that a prefix cache has something to find.

    A third of those that are drawn from few tokens come with so many alternatives.
    """
    rng = np.random.default_rng(0)
    common = rng.integers(3, vocab_size, longest // 2).tolist()
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.9, "logprobs": alternatives},
        {"temperature": 0},
        {"temperature": 0.9, "min_p": 0.02, "frequency_penalty": 0.5, "record": True},
    ]
    prompts, params = [], []
    for i in range(count):
        length = int(rng.integers(2, longest // 2))
        tokens = rng.integers(3, vocab_size, length).tolist()
        prompts.append(common + tokens if i % 2 else tokens)
        tail = int(rng.integers(max_tokens // 2, max_tokens + 1))
        seed = {} if kinds[i % 6]["temperature"] == 0 else {"seed": i}
        fields: dict[str, Any] = {"max_tokens": tail, "ignore_eos": True, "logprobs": 0}
        params.append(SamplingParams(**fields | kinds[i % 6] | seed))
    return Workload(prompts, params)


def run(llm: LLM, work: Workload, order: Sequence[int], arrivals: int) -> dict[int, tuple]:
    """Tokens and raw log-probabilities by request, and how often any was preempted."""
    waiting, found, preemptions = list(order), {}, 0
    while waiting or llm.has_unfinished_requests():
        for i in waiting[:arrivals]:
            llm.add_request(str(i), work.prompts[i], work.params[i])
        waiting = waiting[arrivals:]
        for output in llm.step():
            if output.finished:
                one = output.outputs[0]
                assert one.logprobs is not None
                logprobs = [
                    entry[token].logprob
                    for entry, token in zip(one.logprobs, one.token_ids, strict=True)
                ]
                found[int(output.request_id)] = (one.token_ids, logprobs)
                preemptions += output.metrics.num_preemptions
    assert sorted(found) == sorted(order)
    found[-1] = (preemptions,)  # type: ignore[assignment]
    return found


def run_case(model: tuple, work: Workload, case: Case, **limits: Any) -> dict[int, tuple]:
    llm = LLM(model, **limits | case.options)
    order = np.random.default_rng(case.order).permutation(len(work.prompts)).tolist()
    return run(llm, work, order if case.order else sorted(order), case.arrivals)


def largest_difference(found: dict[int, tuple], expected: dict[int, tuple]) -> float:
    """Over the log-probabilities of requests whose tokens are the same."""
    return max(
        float(np.abs(np.subtract(found[i][1], expected[i][1])).max())
        for i in expected
        if i >= 0 and found[i][0] == expected[i][0]
    )


def check_bits(found: dict[int, tuple], expected: dict[int, tuple], name: str) -> None:
    for i in expected:
        if i >= 0:
            assert found[i][0] == expected[i][0], f"{name}: tokens of request {i}"
            assert found[i][1] == expected[i][1], f"{name}: log-probabilities of request {i}"


def check_scores(llm: LLM, work: Workload, expected: dict[int, tuple]) -> None:
    indices = sorted(i for i in expected if i >= 0)
    outputs = llm.score(
        [work.prompts[i] for i in indices], [expected[i][0] for i in indices], use_tqdm=False
    )
    for i, output in zip(indices, outputs, strict=True):
        assert output.logprobs == expected[i][1], f"score of request {i}"


# --- a tiny model -------------------------------------------------------------------------------

TINY_CASES = {
    "one at a time": Case({"max_num_seqs": 1, "async_scheduling": False}),
    "seven, shuffled": Case({"max_num_seqs": 7}, order=1, arrivals=2),
    "chunks of 16": Case({"max_num_batched_tokens": 16}, order=2),
    "tight pool": Case(TIGHT),
    "no prefix cache": Case({"enable_prefix_caching": False}, order=3),
    "moved to the host": Case(TIGHT | {"num_host_pages": 40, "min_swap_tokens": 0}),
    "longer limit": Case({"max_model_len": 256, "max_num_batched_tokens": 300}),
}


GREEDY = [0, 4, 6, 10]
"""Of the requests."""


@pytest.fixture(scope="module")
def tiny_work() -> Workload:
    return make_workload(12, 128, 60, 24)


@pytest.fixture(scope="module")
def tiny_expected(tiny_model: tuple, tiny_work: Workload) -> dict[int, tuple]:
    return run_case(tiny_model, tiny_work, Case({}), **MORE_LIMITS, deterministic=True)


@pytest.mark.parametrize("name", TINY_CASES)
def test_nothing_changes_a_bit(
    tiny_model: tuple, tiny_work: Workload, tiny_expected: dict, name: str
) -> None:
    case = TINY_CASES[name]
    found = run_case(tiny_model, tiny_work, case, **MORE_LIMITS, deterministic=True)
    check_bits(found, tiny_expected, name)
    if "num_pages" in case.options:
        assert found[-1][0] > 0, "nothing was preempted"


@pytest.mark.parametrize("indices", [(0, 1, 2), (3, 5)])
def test_forks_and_snapshots_change_no_bit(
    tiny_model: tuple, tiny_work: Workload, tiny_expected: dict, indices: tuple[int, ...]
) -> None:
    """Midway through each request, of every kind, beside it and in another engine."""
    llm = LLM(tiny_model, **MORE_LIMITS, deterministic=True)
    other = LLM(tiny_model, **MORE_LIMITS, deterministic=True, min_swap_tokens=0)
    for i in indices:
        llm.add_request(str(i), tiny_work.prompts[i], tiny_work.params[i])
    for _ in range(9):
        llm.step()
    for i in indices:
        assert llm.engine.live[str(i)].parts[0].num_output_tokens > 0
        llm.fork(str(i), f"fork-{i}")
        other.resume(llm.snapshot(str(i)), f"snapshot-{i}")
    found = {}
    for engine in (llm, other):
        while engine.has_unfinished_requests():
            for output in engine.step():
                one = output.outputs[0]
                assert one.logprobs is not None
                found[output.request_id] = (
                    one.token_ids,
                    [e[t].logprob for e, t in zip(one.logprobs, one.token_ids, strict=True)],
                )
    for i in indices:
        for name in (f"{i}", f"fork-{i}", f"snapshot-{i}"):
            assert found[name] == tiny_expected[i], name


@pytest.mark.parametrize("options", [{}, {"deterministic": True, "page_size": 8}])
def test_keys_and_values_with_other_bits_are_refused(
    tiny_model: tuple, tiny_work: Workload, tiny_expected: dict, options: dict[str, Any]
) -> None:
    """They would reach others through the prefix cache; computed again, all is as ever."""
    other = LLM(tiny_model, **MORE_LIMITS | options)
    other.add_request("x", tiny_work.prompts[1], tiny_work.params[1])
    for _ in range(9):
        other.step()
    snapshot = other.snapshot("x")
    other.abort_request("x")
    llm = LLM(tiny_model, **MORE_LIMITS, deterministic=True)
    with pytest.raises(ValueError, match="whose bits are not those of deterministic mode with pag"):
        llm.resume(snapshot, "y")
    llm.resume(snapshot.without_kv(), "y")
    found: list[int] = []
    while llm.has_unfinished_requests():
        (output,) = llm.step()
        found = output.outputs[0].token_ids
    assert found == tiny_expected[1][0]


def test_scores_are_the_bits_of_sampling(
    tiny_model: tuple, tiny_work: Workload, tiny_expected: dict
) -> None:
    llm = LLM(tiny_model, **MORE_LIMITS, deterministic=True)
    check_scores(llm, tiny_work, tiny_expected)


@pytest.fixture(scope="module")
def tiny_default(tiny_model: tuple, tiny_work: Workload) -> dict[int, tuple]:
    return run_case(tiny_model, tiny_work, TINY_CASES["one at a time"], **MORE_LIMITS)


def test_tokens_are_those_of_default_mode(tiny_default: dict, tiny_expected: dict) -> None:
    assert all(tiny_default[i][0] == tiny_expected[i][0] for i in range(12))
    assert largest_difference(tiny_default, tiny_expected) < 1e-4


def test_in_bfloat16(tiny_directory: Any, tiny_work: Workload) -> None:
    model = dense.load(tiny_directory, jnp.bfloat16)
    limits = MORE_LIMITS | {"deterministic": True}
    expected = run_case(model, tiny_work, Case({}), **limits)
    check_bits(run_case(model, tiny_work, Case({"max_num_seqs": 1}), **limits), expected, "alone")
    check_scores(LLM(model, **limits), tiny_work, expected)


def test_windows_and_caps(tmp_path: Path, tiny_work: Workload) -> None:
    """Layers that see twelve tokens beside layers that see all, scores that are capped."""
    save_family("gemma2", tmp_path)
    model = dense.load(tmp_path)
    limits = MORE_LIMITS | {"deterministic": True}
    expected = run_case(model, tiny_work, Case({}), **limits)
    check_bits(run_case(model, tiny_work, TINY_CASES["chunks of 16"], **limits), expected, "16")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3.5"])
def test_windows_and_caps_in_every_case(tmp_path: Path, tiny_work: Workload, family: str) -> None:
    save_family(family, tmp_path)
    model = dense.load(tmp_path)
    limits = MORE_LIMITS | {"deterministic": True}
    expected = run_case(model, tiny_work, Case({}), **limits)
    for name in ("one at a time", "chunks of 16", "tight pool", "no prefix cache"):
        found = run_case(model, tiny_work, TINY_CASES[name], **limits)
        check_bits(found, expected, name)
        assert (found[-1][0] > 0) == (name == "tight pool")
    check_scores(LLM(model, **limits), tiny_work, expected)
    # The control: default mode computes the same, and not to the bit.
    plain = run_case(model, tiny_work, Case({}), **MORE_LIMITS)
    assert all(plain[i][0] == expected[i][0] for i in range(12))
    assert 0 < largest_difference(plain, expected) < 1e-4


def test_no_compilation_after_warm_up(
    tiny_model: tuple, tiny_work: Workload, counter: CompileCounter
) -> None:
    """One program a kind, however the batch changes."""
    llm = LLM(tiny_model, **MORE_LIMITS, deterministic=True, max_logprobs=0)
    llm.warm_up([SamplingClass.GREEDY, SamplingClass.TRUNCATED])
    before = counter.count
    run(llm, tiny_work, [i for i in range(12) if i % 6 in (0, 2, 3, 4)], 3)
    assert counter.count == before


def test_default_mode_differs_somewhere(
    tiny_model: tuple, tiny_work: Workload, tiny_default: dict
) -> None:
    """So the tests above can fail; and this is how far it goes."""
    found = run(LLM(tiny_model, **MORE_LIMITS), tiny_work, GREEDY, 1000)
    alone = {i: tiny_default[i] for i in GREEDY}
    assert 0 < largest_difference(found, alone) < 1e-4


# --- the embedded model -------------------------------------------------------------------------

REAL_LIMITS: dict[str, Any] = {
    "page_size": 16,
    "max_model_len": 128,
    "num_pages": 160,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 256,
}

REAL_CASES = {
    "one at a time": Case({"max_num_seqs": 1}),
    "two": Case({"max_num_seqs": 2}, order=1),
    "seven, arriving": Case({"max_num_seqs": 7}, order=2, arrivals=3),
    "chunks of 32": Case({"max_num_batched_tokens": 32}, order=3),
    "tight pool": Case({"num_pages": 9}, order=4),
    "no prefix cache": Case({"enable_prefix_caching": False}, order=5),
    "tight, no cache, seven": Case(
        {"num_pages": 9, "enable_prefix_caching": False, "max_num_seqs": 7}, order=6
    ),
}


@pytest.mark.slow
def test_the_real_model_bit_by_bit() -> None:
    model = dense.load(None)
    work = make_workload(32, 49152, 64, 10, alternatives=3)
    llm = LLM(model, **REAL_LIMITS, deterministic=True)
    expected = run(llm, work, range(32), 1000)
    check_scores(llm, work, expected)
    for name, case in REAL_CASES.items():
        found = run_case(model, work, case, **REAL_LIMITS, deterministic=True)
        check_bits(found, expected, name)
        if "tight" in name:
            assert found[-1][0] > 0, "nothing was preempted"
    # The control: default mode does not pass this test, and not by much.
    plain = run_case(model, work, Case({}), **REAL_LIMITS)
    bounds = []
    for name in ("seven, arriving", "chunks of 32"):
        found = run_case(model, work, REAL_CASES[name], **REAL_LIMITS)
        assert [found[i][0] for i in range(32)] == [plain[i][0] for i in range(32)], name
        bounds.append(largest_difference(found, plain))
    print(f"default mode: log-probabilities differ by up to {max(bounds):.1e}")
    assert 0 < max(bounds) < 1e-3
