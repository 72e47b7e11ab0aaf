"""Several threads on one engine: one batch serves all, and each gets what it would get alone."""

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from folojax import LLM, SamplingParams
from folojax.engine.shared_engine import FairLock
from tests.api_calls import GREEDY, SEEDED, change

THREADS = 8


def generated(llm: LLM, prompt: str, params: SamplingParams) -> Any:
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    return [(one.text, one.token_ids, one.finish_reason) for one in output.outputs]


def chatted(llm: LLM, prompt: str, params: SamplingParams) -> Any:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": prompt}]
    (output,) = llm.chat(messages, params, use_tqdm=False, chat_template=template)
    return [one.token_ids for one in output.outputs]


def scored(llm: LLM, prompt: str, params: SamplingParams) -> Any:
    del params
    return [sum(one.logprobs) for one in llm.score(prompt, ["a", "bc"], use_tqdm=False)]


def streamed(llm: LLM, prompt: str, params: SamplingParams) -> Any:
    *_, last = llm.stream(prompt, params)
    return [one.token_ids for one in last.outputs]


def closed_early(llm: LLM, prompt: str, params: SamplingParams) -> Any:
    stream = llm.stream(prompt, change(params, n=1))
    first = next(stream).outputs[0].token_ids[:1]
    stream.close()  # type: ignore[attr-defined]
    return first


def refused(llm: LLM, prompt: str, params: SamplingParams) -> Any:
    with pytest.raises(ValueError, match="max_model_len"):
        llm.generate([prompt, prompt * 500], params, use_tqdm=False)
    return "refused"


KINDS: list[Callable[[LLM, str, SamplingParams], Any]] = [
    generated,
    generated,
    generated,
    chatted,
    scored,
    scored,
    streamed,
    streamed,
    closed_early,
    refused,
]


def mixed_calls(count: int) -> list[tuple[Callable[..., Any], str, SamplingParams]]:
    """Calls of every kind, one in ten of them bad."""
    rng = random.Random(0)
    calls = []
    for number in range(count):
        prompt = "".join(rng.choices("abcdefgh", k=rng.randint(1, 12)))
        params = GREEDY if number % 2 else change(SEEDED, n=2, seed=number)
        calls.append((KINDS[number % len(KINDS)], prompt, change(params, max_tokens=6)))
    return calls


def check_mixed_calls(llm: LLM, count: int) -> None:
    calls = mixed_calls(count)
    expected = [kind(llm, prompt, params) for kind, prompt, params in calls]
    for place, (kind, *_) in enumerate(calls):
        if kind is scored:
            expected[place] = pytest.approx(expected[place], abs=1e-3)
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(kind, llm, prompt, params) for kind, prompt, params in calls]
        found = [job.result(timeout=300) for job in jobs]
    assert found == expected
    assert llm.metrics().num_used_pages == 0
    assert not llm.has_unfinished_requests()
    llm.engine.check_integrity()


def test_every_thread_gets_what_it_would_get_alone(letters_llm: LLM) -> None:
    """Replays vllm 8262 and 17972, where two threads on one LLM broke each other's calls."""
    check_mixed_calls(letters_llm, 80)


@pytest.mark.slow
def test_four_hundred_mixed_calls(letters_llm: LLM) -> None:
    check_mixed_calls(letters_llm, 400)


def test_one_batch_serves_all_threads(letters_llm: LLM) -> None:
    """Steps are shared: eight calls at once take far fewer than eight times those of one."""
    letters_llm.reset_prefix_cache()
    before = letters_llm.metrics().num_steps
    generated(letters_llm, "abc", change(GREEDY, max_tokens=24))
    alone = letters_llm.metrics().num_steps - before
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> Any:
        barrier.wait()
        return generated(letters_llm, "abcdefgh"[number] * 3, change(GREEDY, max_tokens=24))

    before = letters_llm.metrics().num_steps
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, range(THREADS)))
    assert letters_llm.metrics().num_steps - before < 4 * alone


def test_weights_change_between_two_steps_of_other_threads(letters_llm: LLM) -> None:
    expected = generated(letters_llm, "abcd", change(GREEDY, max_tokens=30))
    with ThreadPoolExecutor(2) as pool:
        job = pool.submit(generated, letters_llm, "abcd", change(GREEDY, max_tokens=30))
        while not job.done():
            letters_llm.update_params(letters_llm.params)
        assert job.result() == expected


def test_own_loops_of_two_threads(letters_llm: LLM) -> None:
    """A request of `add_request` is told to whichever thread steps next."""
    finished: dict[str, list[int]] = {}

    def run(name: str) -> None:
        letters_llm.add_request(name, "abc", change(GREEDY, max_tokens=10))
        while letters_llm.has_unfinished_requests():
            for output in letters_llm.step():
                if output.finished:
                    finished[output.request_id] = output.outputs[0].token_ids

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ["left", "right"]))
    assert finished["left"] == finished["right"]


def test_the_lock_goes_to_who_has_waited_longest() -> None:
    lock, order = FairLock(), []

    def take(name: int) -> None:
        with lock, lock:
            order.append(name)

    threads = [threading.Thread(target=take, args=(name,)) for name in range(5)]
    with lock:
        for thread in threads:
            thread.start()
            time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert order == list(range(5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_a_fork_is_told_what_to_do(letters_llm: LLM) -> None:
    """The lock alone is asked in the child: JAX would hang there."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        try:
            letters_llm.has_unfinished_requests()
        except RuntimeError as error:
            theirs.send(str(error))

    process = context.Process(target=child)
    process.start()
    assert ours.poll(30)
    assert "spawn" in ours.recv()
    process.join()
