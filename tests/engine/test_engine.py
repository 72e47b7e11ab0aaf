"""Steps of the engine: calls, compilations, stop rules, aborts, failures, metrics."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from folojax import LLM, SamplingClass, SamplingParams
from folojax.engine.reports import NO_DISTRIBUTION
from folojax.models.core.decoder import Llama
from folojax.sched.request import RequestStatus
from tests.reference import TINY

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_k=40, seed=1, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def shared_llm(tiny_model: tuple) -> LLM:
    return LLM(
        tiny_model,
        page_size=16,
        num_pages=48,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,  # here tokens and steps are counted
    )


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    yield shared_llm
    shared_llm.engine.scheduler.check()
    assert not shared_llm.has_unfinished_requests()
    assert shared_llm.metrics().num_used_pages == 0
    shared_llm.step()
    shared_llm.engine.runner.check_is_empty()


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, TINY["vocab_size"], length).tolist()


def token_ids(llm: LLM, request: Any, params: SamplingParams) -> list[int]:
    return llm.generate(request, params, use_tqdm=False)[0].outputs[0].token_ids


class CompileCounter:
    """Counts what XLA compiles, by JAX's own events."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def test_one_decode_call_a_step_whatever_runs(llm: LLM) -> None:
    for num_requests in (1, 3, 8):
        before = llm.metrics()
        for i in range(num_requests):
            llm.add_request(str(i), prompt(5 + i), GREEDY)
        while llm.has_unfinished_requests():
            calls = llm.metrics().num_decode_calls
            llm.step()
            assert llm.metrics().num_decode_calls - calls <= 1
        after = llm.metrics()
        # Prompts take at most three steps of the budget, and give the first token themselves.
        assert after.num_decode_calls - before.num_decode_calls <= 12 + 1
        assert after.num_prefill_calls - before.num_prefill_calls <= 3


def test_nothing_compiles_after_warm_up(llm: LLM) -> None:
    """New lengths, temperatures, seeds, batch sizes, stop rules: the same executables."""
    classes = (SamplingClass.GREEDY, SamplingClass.TRUNCATED)
    assert llm.warm_up(classes, logprobs=False) == len(llm.plan(classes, logprobs=False))
    counter = CompileCounter()
    jax.monitoring.register_event_duration_secs_listener(counter)
    try:
        rng = np.random.default_rng(0)
        for round_ in range(6):
            params = [
                SamplingParams(
                    n=1 if i % 3 == 0 else 2,  # which share and copy pages
                    temperature=0.0 if i % 3 == 0 else float(rng.uniform(0.5, 2)),
                    top_k=int(rng.integers(1, 60)),
                    top_p=float(rng.uniform(0.5, 1)),
                    seed=int(rng.integers(1000)),
                    max_tokens=int(rng.integers(1, 30)),
                )
                for i in range(1 + 2 * round_)
            ]
            prompts = [prompt(int(rng.integers(1, 90)), i) for i in range(len(params))]
            llm.generate(prompts, params, use_tqdm=False)
        assert counter.count == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(counter)


def test_late_arrivals_join_the_running_batch(llm: LLM) -> None:
    alone = token_ids(llm, prompt(9, 1), GREEDY)
    llm.add_request("early", prompt(20), dataclasses.replace(GREEDY, max_tokens=30))
    for _ in range(5):
        llm.step()
    llm.add_request("late", prompt(9, 1), GREEDY)
    finished: dict[str, Any] = {}
    most_running = 0
    while llm.has_unfinished_requests():
        finished |= {output.request_id: output for output in llm.step() if output.finished}
        most_running = max(most_running, llm.metrics().num_running)
    assert most_running == 2
    assert list(finished) == ["late", "early"]
    assert finished["late"].outputs[0].token_ids == alone


def test_max_num_seqs_bounds_the_batch(llm: LLM) -> None:
    for i in range(12):
        llm.add_request(str(i), prompt(4, i), GREEDY)
    while llm.has_unfinished_requests():
        llm.step()
        assert llm.metrics().num_running <= 8


def test_a_prompt_over_the_budget_is_computed_in_chunks(llm: LLM) -> None:
    before = llm.metrics().num_prefill_calls
    llm.generate(prompt(115), GREEDY, use_tqdm=False)
    assert llm.metrics().num_prefill_calls - before == 2  # 64 + 51


def test_eos_ends_a_request_unless_ignored(llm: LLM) -> None:
    free = token_ids(llm, prompt(6), GREEDY)
    eos = free[4]
    validator = llm.engine.validator
    llm.engine.validator = dataclasses.replace(validator, eos_token_ids=(eos,))
    try:
        params = dataclasses.replace(GREEDY, ignore_eos=False)
        first = free.index(eos)
        output = llm.generate(prompt(6), params, use_tqdm=False)[0].outputs[0]
        assert output.token_ids == free[: first + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", None)
        assert token_ids(llm, prompt(6), GREEDY) == free
    finally:
        llm.engine.validator = validator


def test_stop_ids_end_a_request_and_are_named(llm: LLM) -> None:
    free = token_ids(llm, prompt(6), GREEDY)
    params = dataclasses.replace(GREEDY, stop_token_ids=[free[3], free[7]])
    output = llm.generate(prompt(6), params, use_tqdm=False)[0].outputs[0]
    first = min(free.index(free[3]), free.index(free[7]))
    assert output.token_ids == free[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", free[first])


def test_min_tokens_bans_stop_ids_until_then(llm: LLM) -> None:
    free = token_ids(llm, prompt(6), GREEDY)
    banned = free[0]
    params = dataclasses.replace(GREEDY, stop_token_ids=[banned], min_tokens=5)
    held = token_ids(llm, [prompt(6), prompt(7)], params)
    assert banned not in held[:5]
    assert len(held) >= 5
    assert token_ids(llm, prompt(6), dataclasses.replace(params, min_tokens=0)) == free[:1]


def test_length_is_max_tokens_or_max_model_len(llm: LLM) -> None:
    output = llm.generate(prompt(6), GREEDY, use_tqdm=False)[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (12, "length")
    unbounded = dataclasses.replace(GREEDY, max_tokens=None)
    output = llm.generate(prompt(118), unbounded, use_tqdm=False)[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (10, "length")


def test_abort_in_every_state_returns_what_there_is(llm: LLM) -> None:
    for i in range(9):
        llm.add_request(str(i), prompt(100, i), GREEDY)
    (waiting,) = llm.abort_request("8")
    assert waiting.outputs[0].token_ids == []
    llm.step()
    (mid_chunk,) = llm.abort_request(["0"])  # 64 of its 100 tokens are cached
    assert mid_chunk.outputs[0].finish_reason == "abort"
    while llm.metrics().num_waiting or llm.metrics().num_scheduled_tokens == 0:
        llm.step()
    for _ in range(4):
        llm.step()
    running = llm.abort_request([str(i) for i in range(1, 8)])
    assert any(output.outputs[0].token_ids for output in running)
    assert all(output.outputs[0].finish_reason in ("abort", "length") for output in running)
    assert llm.abort_request("0") == []
    assert llm.abort_request(["never", "seen"]) == []


def test_abort_of_a_preempted_request_frees_everything(tiny_model: tuple) -> None:
    llm = LLM(
        tiny_model,
        page_size=16,
        num_pages=10,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
    )
    for i in range(4):
        llm.add_request(str(i), prompt(20, i), dataclasses.replace(GREEDY, max_tokens=40))
    preempted: set[str] = set()
    while not preempted:
        llm.step()
        requests = [live.parts[0] for live in llm.engine.live.values()]
        preempted = {r.request_id for r in requests if r.status is RequestStatus.PREEMPTED}
    (output,) = llm.abort_request(preempted.pop())
    assert output.outputs[0].token_ids
    assert output.metrics.num_preemptions == 1
    while llm.has_unfinished_requests():
        llm.step()
        llm.engine.scheduler.check()
    assert llm.metrics().num_used_pages == 0


def test_seeds_repeat_and_differ_by_position(llm: LLM) -> None:
    first = token_ids(llm, prompt(6), SEEDED)
    assert token_ids(llm, prompt(6), SEEDED) == first
    assert token_ids(llm, prompt(6), dataclasses.replace(SEEDED, seed=2)) != first
    assert len(set(first)) > 3  # a generator seeded anew each step would repeat itself


def test_a_drawn_seed_is_reported_and_gives_the_same_tokens(llm: LLM) -> None:
    params = dataclasses.replace(SEEDED, seed=None)
    one, two = llm.generate([prompt(6), prompt(6)], params, use_tqdm=False)
    assert one.outputs[0].seed != two.outputs[0].seed
    again = dataclasses.replace(params, seed=one.outputs[0].seed)
    assert token_ids(llm, prompt(6), again) == one.outputs[0].token_ids


def test_n_samples_have_seeds_in_a_row(llm: LLM) -> None:
    output = llm.generate(prompt(6), dataclasses.replace(SEEDED, n=3), use_tqdm=False)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    for i, completion in enumerate(output.outputs):
        params = dataclasses.replace(SEEDED, seed=1 + i)
        assert completion.seed == params.seed
        assert completion.token_ids == token_ids(llm, prompt(6), params)


def test_a_row_of_nan_fails_alone_and_leaves_nothing_behind(tiny_model: tuple) -> None:
    """The embedding of one token is NaN: who reads it fails, neighbours and heirs do not notice."""
    module, params = tiny_model
    assert isinstance(module, Llama)
    llm = LLM(
        (module, params | {"embed": params["embed"].at[77].set(np.nan)}),
        page_size=16,
        num_pages=10,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
    )
    allowed = [token for token in prompt(120, 3) if token != 77]
    params_ = dataclasses.replace(GREEDY, max_tokens=6)
    expected = token_ids(llm, allowed[:9], params_)
    assert 77 not in expected
    bad, good = llm.generate([[*allowed[:60], 77, 6], allowed[:9]], params_, use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].stop_reason == NO_DISTRIBUTION
    assert bad.outputs[0].token_ids == []
    assert good.outputs[0].token_ids == expected
    # Nor is a score made of it, or the log-probabilities of a prompt.
    scores = llm.score([allowed[:9]] * 2, [[77, 5], allowed[9:20]], use_tqdm=False)
    assert [score.finish_reason for score in scores] == ["error", "length"]
    assert (scores[0].logprobs, len(scores[1].logprobs)) == ([], 11)
    told = dataclasses.replace(params_, prompt_logprobs=0)
    (bad,) = llm.generate([[*allowed[:9], 77, 5]], told, use_tqdm=False)
    assert (bad.outputs[0].finish_reason, bad.prompt_logprobs) == ("error", None)
    # The heirs of its pages: all of the pool, in turn.
    heirs = llm.generate([allowed[:9]] * 10, params_, use_tqdm=False)
    assert all(heir.outputs[0].token_ids == expected for heir in heirs)


@pytest.mark.parametrize("consumes_state", [False, True])
@pytest.mark.parametrize("interrupted_call", ["dispatch", "collect"])
def test_an_interrupt_leaves_the_engine_usable_and_empty(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, interrupted_call: str, consumes_state: bool
) -> None:
    expected = token_ids(llm, prompt(6), GREEDY)
    llm.add_request("mine", prompt(9), dataclasses.replace(GREEDY, max_tokens=100))
    run, calls = getattr(llm.engine.runner, interrupted_call), 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            if consumes_state:
                jax.tree.map(lambda leaf: leaf.delete(), llm.engine.runner.state)
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(llm.engine.runner, interrupted_call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt(6), prompt(7)], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    (mine,) = llm.step()
    assert (mine.request_id, mine.outputs[0].finish_reason) == ("mine", "abort")
    assert token_ids(llm, prompt(6), GREEDY) == expected


def test_an_interrupted_step_leaves_the_engine_usable_and_empty(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = token_ids(llm, prompt(6), GREEDY)
    llm.add_request("mine", prompt(9), GREEDY)
    stream = llm.stream(prompt(7), GREEDY)
    next(stream)

    def interrupted(plan: Any) -> Any:
        jax.tree.map(lambda leaf: leaf.delete(), llm.engine.runner.state)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "dispatch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.step()
    monkeypatch.undo()
    assert [output.outputs[0].finish_reason for output in stream] == ["abort"]
    (mine,) = llm.step()
    assert (mine.request_id, mine.outputs[0].finish_reason) == ("mine", "abort")
    assert token_ids(llm, prompt(6), GREEDY) == expected


@pytest.mark.parametrize("is_queued", [True, False])
def test_an_interruption_of_what_an_interruption_does_is_made_up_for(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, is_queued: bool
) -> None:
    """By whatever is done next: a step, or a request that is not aborted with the others."""
    expected = token_ids(llm, prompt(6), GREEDY)
    llm.add_request("mine", prompt(9), GREEDY)

    def interrupted(*args: Any) -> Any:
        jax.tree.map(lambda leaf: leaf.delete(), llm.engine.runner.state)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "dispatch", interrupted)
    monkeypatch.setattr(llm.engine, "reset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.step()
    monkeypatch.undo()
    if is_queued:
        assert token_ids(llm, prompt(6), GREEDY) == expected
    (mine,) = llm.step()
    assert (mine.request_id, mine.outputs[0].finish_reason) == ("mine", "abort")
    assert token_ids(llm, prompt(6), GREEDY) == expected


def test_metrics_of_a_request_are_in_order(llm: LLM) -> None:
    outputs = llm.generate([prompt(6), prompt(50)], GREEDY, use_tqdm=False)
    for output in outputs:
        times = output.metrics
        assert times.first_scheduled_time_s is not None
        assert times.first_token_time_s is not None
        order = [
            times.arrival_time_s,
            times.first_scheduled_time_s,
            times.first_token_time_s,
            times.finish_time_s or 0.0,
        ]
        assert order == sorted(order)
        assert times.num_output_tokens == 12
        assert times.ttft_s is not None
        assert times.tpot_s is not None
        assert times.e2e_s is not None
        assert 0 < times.ttft_s + 11 * times.tpot_s <= times.e2e_s + 1e-6


def test_padding_is_counted(llm: LLM) -> None:
    before = llm.metrics()
    llm.generate(prompt(17), SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    after = llm.metrics()
    assert after.num_scheduled_tokens - before.num_scheduled_tokens == 17
    assert after.num_padding_tokens - before.num_padding_tokens == 15  # two rows of 16
    assert after.num_prefill_tokens - before.num_prefill_tokens == 17
    assert after.num_prefill_padding_tokens - before.num_prefill_padding_tokens == 15
    prompts = [prompt(16)] * 3
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)
    both = llm.metrics()
    # Prompts of a whole row in four rows, then three tokens in four rows.
    prefill = both.num_prefill_padding_tokens - after.num_prefill_padding_tokens
    assert prefill == 16
    assert both.num_padding_tokens - after.num_padding_tokens == prefill + 1
    llm.generate([prompt(1)] * 5, params, use_tqdm=False)
    # Twice five tokens in six rows.
    assert llm.metrics().num_padding_tokens - both.num_padding_tokens == 2
