"""Requests of every kind in small engines, and what two runs of them must have in common."""

from typing import Any

import numpy as np
import pytest

from folojax import LLM, RequestOutput, SamplingParams
from tests.conftest import check_is_empty
from tests.letters import make_letters_tokenizer
from tests.reference import TINY_LIMITS

STOPS = list(range(3, 98, 4))
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "ignore_eos": True},
    {"seed": 1, "top_k": 40, "stop_token_ids": STOPS},
    {"seed": 2, "stop": ["a", "b", "e", "o"]},
    {"seed": 3, "stop": ["c", "d", "r", "s"], "include_stop_str_in_output": True, "min_tokens": 4},
    {"seed": 4, "stop_token_ids": STOPS, "min_tokens": 9},
    {"temperature": 0, "repetition_penalty": 1.4, "presence_penalty": 0.5, "ignore_eos": True},
    {"seed": 6, "bad_words": ["a", "bc", "th"], "frequency_penalty": 0.3},
    {"seed": 7, "n": 3, "stop_token_ids": STOPS},
    {"seed": 8, "prompt_logprobs": 2, "stop_token_ids": STOPS},
    {"seed": 9, "max_tokens": 1},
    {"seed": 10, "max_tokens": 1, "prompt_logprobs": 0},
    {"temperature": 0, "max_tokens": None, "ignore_eos": True},
]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def make_llm(model: tuple, **options: Any) -> LLM:
    return LLM(model, make_letters_tokenizer(), **TINY_LIMITS | options)


def make_prompts() -> list[list[int]]:
    """Every other one begins alike."""
    rng = np.random.default_rng(0)
    common = rng.integers(3, 98, 40).tolist()
    tails = [rng.integers(3, 98, length).tolist() for length in rng.integers(2, 50, len(PARAMS))]
    return [common * (i % 2) + tail for i, tail in enumerate(tails)]


def run(llm: LLM) -> list[RequestOutput]:
    """Runs all, three arriving before each step; nothing that was shown is taken back."""
    prompts, waiting = make_prompts(), list(range(len(PARAMS)))
    outputs: dict[str, RequestOutput] = {}
    while waiting or llm.has_unfinished_requests():
        for index in waiting[:3]:
            # With log-probabilities for all: steps with and without have samplers of their own.
            params = SamplingParams(**{"max_tokens": 30, "logprobs": 3, **PARAMS[index]})
            llm.add_request(str(index), prompts[index], params)
        waiting = waiting[3:]
        for output in llm.step():
            before = outputs.get(output.request_id)
            assert before is None or not before.finished
            for old, new in zip(before.outputs if before else [], output.outputs, strict=False):
                assert new.token_ids[: len(old.token_ids)] == old.token_ids
                assert new.text.startswith(old.text)
            outputs[output.request_id] = output
        for engine in llm.engines:
            engine.scheduler.check()
    check_is_empty(llm)
    return [outputs[str(index)] for index in range(len(PARAMS))]


def logprobs_of(entries: list[Any] | None) -> list[dict[int, float] | None] | None:
    if entries is None:
        return None
    return [entry and {token: one.logprob for token, one in entry.items()} for entry in entries]


def check_same(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert one.token_ids == other.token_ids, f"request {ours.request_id}"
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert one.stop_reason == other.stop_reason
            pairs = [(one.logprobs, other.logprobs), (ours.prompt_logprobs, theirs.prompt_logprobs)]
            for entries, others in pairs:
                a, b = logprobs_of(entries), logprobs_of(others)
                assert (a is None) == (b is None)
                for entry, known in zip(a or [], b or [], strict=True):
                    assert (entry or {}) == pytest.approx(known or {}, abs=1e-3)
