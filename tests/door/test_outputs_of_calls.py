"""A test for each row of the table of outputs, on a tiny model."""

import dataclasses
from typing import Any

import pytest

from folojax import LLM, Logprob, SamplingParams
from tests.letters import EOS, decode, encode

PROMPT = "The sea is"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = dataclasses.replace(GREEDY, temperature=1.0, seed=7)


def change(params: SamplingParams, **fields: Any) -> SamplingParams:
    return dataclasses.replace(params, **fields)


def test_request_output(letters_llm: LLM) -> None:
    params = change(SEEDED, n=2, logprobs=1, prompt_logprobs=0)
    (output,) = letters_llm.generate(PROMPT, params, use_tqdm=False)
    assert [field.name for field in dataclasses.fields(output)] == [
        *("request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished"),
        *("metrics", "num_cached_tokens", "lora_request"),
    ]
    assert isinstance(output.request_id, str)
    assert (output.prompt, output.prompt_token_ids) == (PROMPT, encode(PROMPT))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(PROMPT)
    assert [one.index for one in output.outputs] == [0, 1]
    assert output.finished
    assert output.num_cached_tokens == 0
    assert all(isinstance(field, list) for field in (output.prompt_token_ids, output.outputs))


def test_completion_output(letters_llm: LLM) -> None:
    (output,) = letters_llm.generate(PROMPT, change(GREEDY, logprobs=2), use_tqdm=False)
    (one,) = output.outputs
    assert [field.name for field in dataclasses.fields(one)][:7] == [
        *("index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason"),
        "stop_reason",
    ]
    assert isinstance(one.token_ids, list)
    assert isinstance(one.logprobs, list)
    assert one.text == decode([token for token in one.token_ids if token > EOS])  # no special ones
    assert one.cumulative_logprob < 0
    first = one.logprobs[0][one.token_ids[0]]
    assert first == Logprob(first.logprob, first.rank, decode(one.token_ids[:1]))
    assert one.finished


def test_finish_reasons(letters_llm: LLM) -> None:
    """All but "error": that is in test_engine, with a model that gives NaN."""
    free = letters_llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0]
    cases = {
        ("stop", None): change(GREEDY, ignore_eos=False, logit_bias={EOS: 1e6}),
        ("stop", free.token_ids[2]): change(GREEDY, stop_token_ids=[free.token_ids[2]]),
        ("stop", free.text[3:5]): change(GREEDY, stop=[free.text[3:5]]),
        ("length", None): GREEDY,
    }
    outputs = letters_llm.generate([PROMPT] * 4, list(cases.values()), use_tqdm=False)
    reasons = [(one.outputs[0].finish_reason, one.outputs[0].stop_reason) for one in outputs]
    assert reasons == list(cases)
    letters_llm.add_request("mine", PROMPT, GREEDY)
    letters_llm.step()
    (aborted,) = letters_llm.abort_request("mine")
    assert aborted.finished
    assert (aborted.outputs[0].finish_reason, aborted.outputs[0].stop_reason) == ("abort", None)
    assert aborted.outputs[0].text == decode(aborted.outputs[0].token_ids)


def test_metrics_of_a_request(letters_llm: LLM) -> None:
    (output,) = letters_llm.generate(PROMPT, GREEDY, use_tqdm=False)
    times = output.metrics
    assert times.first_scheduled_time_s is not None
    assert times.first_token_time_s is not None
    assert times.finish_time_s is not None
    assert times.arrival_time_s <= times.first_scheduled_time_s <= times.first_token_time_s
    assert times.first_token_time_s <= times.finish_time_s
    assert times.ttft_s is not None
    assert times.tpot_s is not None
    later_s = times.compile_s - times.first_token_compile_s
    assert times.e2e_s == pytest.approx(times.ttft_s + 11 * times.tpot_s + later_s)
    assert times.num_preemptions == 0


def test_num_cached_tokens(letters_llm: LLM) -> None:
    """Full pages of 16 tokens, and at most all but one token."""
    letters_llm.reset_prefix_cache()
    prompt = encode("x" * 7 + "a prompt of just 48 letters, three pages.")
    assert len(prompt) == 48
    before = letters_llm.metrics()
    outputs = [letters_llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 32]
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    after = letters_llm.metrics()
    assert after.num_prefix_query_tokens - before.num_prefix_query_tokens == 96
    assert after.num_prefix_hit_tokens - before.num_prefix_hit_tokens == 32
