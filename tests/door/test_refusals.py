"""What is refused, at the user's door: named with field, value and rule, and nobody is hurt."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from folojax import LLM, SamplingParams
from folojax.requests.prompts import ParsedPrompt
from tests.letters import encode

GOOD = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
NAN, INF = float("nan"), float("inf")


def params(**fields: Any) -> Callable[[LLM], Any]:
    """A call with these sampling parameters, good ones beside them."""

    def call(llm: LLM) -> Any:
        bad = dataclasses.replace(GOOD, **fields)
        return llm.generate(["fine", "The sea is"], [GOOD, bad], use_tqdm=False)

    return call


def prompt(bad: Any, **fields: Any) -> Callable[[LLM], Any]:
    """A call with this prompt, a good one before it."""
    with_fields = dataclasses.replace(GOOD, **fields)
    return lambda llm: llm.generate(["fine", bad], with_fields, use_tqdm=False)


def no_text(**fields: Any) -> Callable[[LLM], Any]:
    """A call to an engine without a tokenizer."""

    def call(llm: LLM) -> Any:
        engine = llm.engine
        validator = engine.validator
        engine.validator = dataclasses.replace(validator, tokenizer=None)
        try:
            return llm.generate([[5, 6]], dataclasses.replace(GOOD, **fields), use_tqdm=False)
        finally:
            engine.validator = validator

    return call


def capped(**fields: Any) -> Callable[[LLM], Any]:
    """A call to an engine with the default max_logprobs."""

    def call(llm: LLM) -> Any:
        engine = llm.engine
        validator = engine.validator
        engine.validator = dataclasses.replace(validator, max_logprobs=20)
        try:
            return llm.generate("x", dataclasses.replace(GOOD, **fields), use_tqdm=False)
        finally:
            engine.validator = validator

    return call


def generate(*args: Any) -> Callable[[LLM], Any]:
    return lambda llm: llm.generate(*args)


def chat(messages: Any) -> Callable[[LLM], Any]:
    return lambda llm: llm.chat(messages)


def request(*args: Any, **options: Any) -> Callable[[LLM], Any]:
    return lambda llm: llm.add_request(*args, **options)


def duplicate(llm: LLM) -> None:
    llm.add_request("twice", "x", GOOD)
    try:
        llm.add_request("twice", "y", GOOD)
    finally:
        llm.abort_request("twice")


# What is refused, and what the text must hold: the field, the value, the rule.
BAD: list[tuple[Callable[[LLM], Any], tuple[str, str, str]]] = [
    (params(n=0), ("n", "0", "from 1 to 16384")),
    (params(n=16385), ("n", "16385", "from 1 to 16384")),
    (params(n=True), ("n", "True", "integer")),
    (params(n=2), ("n", "2", "n must be 1")),
    (params(n=1000, temperature=1.0, max_tokens=120, logprobs=100), ("n", "logprobs", "lower")),
    (params(temperature=-0.1), ("temperature", "-0.1", "[0, 1e+38]")),
    (params(temperature=NAN), ("temperature", "nan", "finite")),
    (params(temperature=INF), ("temperature", "inf", "finite")),
    (params(temperature=True), ("temperature", "True", "number")),
    (params(temperature="hot"), ("temperature", "'hot'", "number")),
    (params(top_p=0.0), ("top_p", "0.0", "(0, 1]")),
    (params(top_p=1.5), ("top_p", "1.5", "(0, 1]")),
    (params(top_p=NAN), ("top_p", "nan", "finite")),
    (params(top_k=-2), ("top_k", "-2", "at least -1")),
    (params(top_k=1.5), ("top_k", "1.5", "integer")),
    (params(top_k=True), ("top_k", "True", "integer")),
    (params(min_p=-0.1), ("min_p", "-0.1", "[0, 1]")),
    (params(min_p=1.1), ("min_p", "1.1", "[0, 1]")),
    (params(presence_penalty=2.1), ("presence_penalty", "2.1", "[-2, 2]")),
    (params(presence_penalty=NAN), ("presence_penalty", "nan", "finite")),
    (params(frequency_penalty=-2.1), ("frequency_penalty", "-2.1", "[-2, 2]")),
    (params(frequency_penalty="1"), ("frequency_penalty", "'1'", "number")),
    (params(repetition_penalty=0), ("repetition_penalty", "0", "finite number")),
    (params(repetition_penalty=INF), ("repetition_penalty", "inf", "finite")),
    (params(max_tokens=0), ("max_tokens", "0", "at least 1")),
    (params(max_tokens=2.0), ("max_tokens", "2.0", "integer")),
    (params(min_tokens=-1), ("min_tokens", "-1", "at least 0")),
    (params(min_tokens=5), ("min_tokens", "5", "at most max_tokens, 4")),
    (params(stop=""), ("stop", "['']", "not empty")),
    (params(stop=["a", 5]), ("stop", "['a', 5]", "strings")),
    (params(stop="x", detokenize=False), ("stop", "['x']", "detokenize=True")),
    (params(stop=5), ("stop", "5", "list")),
    (no_text(stop="x"), ("stop", "['x']", "no tokenizer")),
    (params(stop_token_ids=[98]), ("stop_token_ids", "98", "0 to 97")),
    (params(stop_token_ids=[-1]), ("stop_token_ids", "-1", "at least 0")),
    (params(stop_token_ids=["a"]), ("stop_token_ids", "['a']", "token ids")),
    (params(include_stop_str_in_output=1), ("include_stop_str_in_output", "1", "True or False")),
    (params(ignore_eos=None), ("ignore_eos", "None", "True or False")),
    (params(logit_bias={98: 1.0}), ("logit_bias", "98", "0 to 97")),
    (params(logit_bias={"5": 1.0}), ("logit_bias", "'5'", "token ids")),
    (params(logit_bias={5: NAN}), ("logit_bias", "nan", "finite")),
    (params(logit_bias={5: -INF}), ("logit_bias", "-inf", "finite")),
    (params(logit_bias=[5]), ("logit_bias", "[5]", "dict")),
    (params(allowed_token_ids=[]), ("allowed_token_ids", "[]", "at least one token id")),
    (params(allowed_token_ids=[5, 127]), ("allowed_token_ids", "127", "0 to 97")),
    (params(allowed_token_ids=5), ("allowed_token_ids", "5", "list")),
    (
        params(allowed_token_ids=[2], min_tokens=1, ignore_eos=False),
        ("allowed_token_ids", "[2]", "min_tokens=1 leave none"),
    ),
    (
        params(allowed_token_ids=encode("ab"), bad_words=["a", "b"]),
        ("allowed_token_ids", str(encode("ab")), "bad_words leave none"),
    ),
    (params(bad_words="word"), ("bad_words", "'word'", "list")),
    (params(bad_words=[""]), ("bad_words", "['']", "not empty")),
    (params(bad_words=["seventeen letters"]), ("bad_words", "seventeen", "1 to 16")),
    (params(bad_words=["é"]), ("bad_words", "'é'", "1 to 16")),
    (no_text(bad_words=["x"]), ("bad_words", "['x']", "no tokenizer")),
    (params(logprobs=-2), ("logprobs", "-2", "at least -1")),
    (params(logprobs=False), ("logprobs", "False", "integer")),
    (params(logprobs=129), ("logprobs", "129", "vocabulary has 128")),
    (capped(logprobs=21), ("logprobs", "21", "at most max_logprobs, 20")),
    (capped(logprobs=-1), ("logprobs", "-1", "at most max_logprobs, 20")),
    (capped(prompt_logprobs=21), ("prompt_logprobs", "21", "at most max_logprobs, 20")),
    (params(prompt_logprobs=1.0), ("prompt_logprobs", "1.0", "integer")),
    (params(seed=-2), ("seed", "-2", "from 0")),
    (params(seed=2**64), ("seed", str(2**64), "to 18446744073709551615")),
    (params(seed=1.0), ("seed", "1.0", "integer")),
    (params(detokenize="yes"), ("detokenize", "'yes'", "True or False")),
    (params(skip_special_tokens=0), ("skip_special_tokens", "0", "True or False")),
    (params(spaces_between_special_tokens=2), ("spaces_between", "2", "True or False")),
    (prompt(""), ("prompt", "empty", "at least one token")),
    (prompt([]), ("prompt", "empty", "at least one token")),
    (prompt([5] * 128), ("prompt", "128 tokens", "shorten it to at most 127")),
    (prompt([5] * 1000), ("prompt", "1,000 tokens", "max_model_len is 128")),
    (prompt([128]), ("prompt", "128", "0 to 127")),
    (prompt([-1]), ("prompt", "-1", "0 to 127")),
    (prompt([True]), ("prompt", "True", "integers")),
    (prompt([1.5]), ("prompt", "1.5", "integers")),
    (prompt(["5"]), ("prompt", "'5'", "integers")),
    (prompt(None), ("prompt 1", "NoneType", "must be text")),
    (prompt(7), ("prompt 1", "int", "must be text")),
    (prompt(b"x"), ("prompt 1", "bytes", "must be text")),
    (prompt({"text": "x"}), ("prompt 1", "['text']", '"prompt"')),
    (prompt({"prompt": 5}), ("prompt 1", "int", "must be text")),
    (prompt({"prompt_token_ids": 5}), ("prompt 1", "int", "token ids")),
    (prompt(np.zeros((2, 2), int)), ("prompt 1", "ndarray", "token ids")),
    (generate(7), ("prompts", "int", "a list")),
    (generate(["a"], [GOOD] * 2), ("sampling_params", "2 entries", "one for all")),
    (generate(["a"], []), ("sampling_params", "0 entries", "one for all")),
    (generate(["a"], {"n": 1}), ("sampling_params", "must be", "one per prompt")),
    (chat("Hi"), ("messages", "str", "must be a list")),
    (chat([{"content": "Hi"}]), ("messages", "Hi", '"role"')),
    (request(7, "x", GOOD), ("request_id", "7", "string")),
    (request("a", "x", GOOD, priority=1.5), ("priority", "1.5", "integer")),
    (duplicate, ("request id", "'twice'", "use another id")),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_a_bad_request_is_named_and_hurts_nobody(shared_letters_llm: LLM, index: int) -> None:
    """The text names field, value and rule; nothing stays queued; the same engine answers."""
    llm = shared_letters_llm
    call, parts = BAD[index]
    llm.add_request("in flight", "The sea is", GOOD)
    llm.step()
    with pytest.raises(ValueError, match=r".") as info:
        call(llm)
    assert all(part in str(info.value) for part in parts), str(info.value)
    metrics = llm.metrics()
    assert (metrics.num_running, metrics.num_waiting) == (1, 0)
    outputs = list(itertools.chain.from_iterable(iter(lambda: llm.step(), [])))
    assert outputs[-1].finished
    assert not llm.has_unfinished_requests()
    assert llm.metrics().num_used_pages == 0
    (answer,) = llm.generate("The sea is", GOOD, use_tqdm=False)
    assert answer.outputs[0].token_ids == outputs[-1].outputs[0].token_ids


def test_there_are_enough_bad_requests() -> None:
    assert len(BAD) >= 60


def test_every_problem_of_a_request_is_named_at_once(letters_llm: LLM) -> None:
    bad = dataclasses.replace(
        GOOD, stop_token_ids=[98], logit_bias={99: 1.0}, allowed_token_ids=[100], logprobs=200
    )
    with pytest.raises(ValueError, match=r"98.*99.*100.*200"):
        letters_llm.generate([[5] * 500], bad)


def test_a_request_larger_than_the_pool_is_refused(tiny_model: tuple) -> None:
    llm = LLM(tiny_model, max_model_len=128, max_num_seqs=2, page_size=16, num_pages=4)
    with pytest.raises(ValueError, match=r"5 pages of 16 tokens; the pool has 4: .*num_pages"):
        llm.generate([[5] * 60], dataclasses.replace(GOOD, max_tokens=20))


def test_memory_bounds_are_stated(letters_llm: LLM) -> None:
    """Counts that would fill the memory with log-probabilities or tokens, before anything runs."""
    many = dataclasses.replace(GOOD, temperature=1.0, n=16384, max_tokens=100, seed=1)
    with pytest.raises(ValueError, match=r"log-probabilities; at most 4,000,000 fit a request"):
        letters_llm.generate("x", dataclasses.replace(many, logprobs=2))
    validator = letters_llm.engine.validator
    limits = dataclasses.replace(validator.limits, max_model_len=100_000, num_pages=10_000)
    validator = dataclasses.replace(validator, limits=limits)
    with pytest.raises(ValueError, match=r"n is 16384: .* at most 16,777,216 fit a request"):
        validator.check("id", ParsedPrompt(None, [5]), dataclasses.replace(many, max_tokens=2000))
    whole = dataclasses.replace(GOOD, prompt_logprobs=127, max_tokens=1)
    with pytest.raises(ValueError, match=r"prompt_logprobs is 127: 40,000 prompt tokens"):
        validator.check("id", ParsedPrompt(None, [5] * 40_000), whole)
