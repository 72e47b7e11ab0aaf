"""A test for each row of the table of SamplingParams, on a tiny model with a token a letter."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from folojax import LLM, CompletionOutput, RequestOutput, SamplingParams
from tests.letters import EOS, decode, encode

PROMPT = "The sea is"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = dataclasses.replace(GREEDY, temperature=1.0, seed=7)


def run(llm: LLM, params: SamplingParams, prompt: Any = PROMPT) -> RequestOutput:
    return llm.generate(prompt, params, use_tqdm=False)[0]


def run_one(llm: LLM, params: SamplingParams, prompt: Any = PROMPT) -> CompletionOutput:
    return run(llm, params, prompt).outputs[0]


def change(params: SamplingParams, **fields: Any) -> SamplingParams:
    return dataclasses.replace(params, **fields)


def as_logits(logprobs: list) -> np.ndarray:
    """All log-probabilities of each step, by token, less those of padding: [steps, tokens]."""
    return np.array([[step[token].logprob for token in range(len(step))] for step in logprobs])


def test_n(letters_llm: LLM) -> None:
    """Sample i of seed s has seed s + i, and the prompt is computed once for all."""
    prompt = encode("A prompt that is longer than two pages")
    letters_llm.reset_prefix_cache()
    before = letters_llm.metrics().num_scheduled_tokens
    output = run(letters_llm, change(SEEDED, n=4), prompt)
    num_decoded = (
        4 * (SEEDED.max_tokens or 0) - 1
    )  # the first sample's first token: with the prompt
    assert letters_llm.metrics().num_scheduled_tokens - before == len(prompt) + num_decoded
    assert [one.index for one in output.outputs] == [0, 1, 2, 3]
    assert [one.seed for one in output.outputs] == [7, 8, 9, 10]
    for one in output.outputs:
        assert (
            one.token_ids == run_one(letters_llm, change(SEEDED, seed=one.seed), prompt).token_ids
        )
    assert len({tuple(one.token_ids) for one in output.outputs}) == 4
    with pytest.raises(ValueError, match="n is 2 but temperature is 0"):
        change(GREEDY, n=2)


def test_temperature(letters_llm: LLM) -> None:
    free = run_one(letters_llm, change(GREEDY, logprobs=-1))
    assert free.logprobs is not None
    assert free.token_ids == as_logits(free.logprobs)[:, :98].argmax(axis=1).tolist()
    almost_zero = change(SEEDED, temperature=9e-6)
    assert run_one(letters_llm, almost_zero).token_ids == free.token_ids
    assert run_one(letters_llm, change(SEEDED, temperature=2.0)).token_ids != free.token_ids
    # A bias so large that the logits are lost in it: all three are equal, and the lowest id wins.
    tie = change(GREEDY, logit_bias=dict.fromkeys((60, 40, 50), 1e30))
    assert run_one(letters_llm, tie).token_ids == [40] * 12


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_top_p_top_k_min_p(letters_llm: LLM, fields: dict[str, Any]) -> None:
    """Each cut down to one token is greedy; off, they change nothing; nor do neighbours'."""
    greedy = run_one(letters_llm, GREEDY).token_ids
    free = run_one(letters_llm, SEEDED).token_ids
    assert greedy != free
    assert run_one(letters_llm, change(SEEDED, **fields)).token_ids == greedy
    off = change(SEEDED, top_k=-1, top_p=1, min_p=0)
    outputs = letters_llm.generate([PROMPT] * 3, [change(SEEDED, **fields), off, GREEDY], False)
    assert [one.outputs[0].token_ids for one in outputs] == [greedy, free, greedy]


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"presence_penalty": -2.0, "frequency_penalty": 0.7},
    ],
    ids=str,
)
def test_presence_and_frequency_penalty(letters_llm: LLM, fields: dict[str, Any]) -> None:
    """Greedy tokens are those of the definition, from the model's own log-probabilities."""
    one = run_one(letters_llm, change(GREEDY, logprobs=-1, max_tokens=30, **fields))
    assert one.logprobs is not None
    counts = np.zeros(98)
    for token, logits in zip(one.token_ids, as_logits(one.logprobs), strict=True):
        penalised = logits - fields.get("frequency_penalty", 0.0) * counts
        penalised = penalised - fields.get("presence_penalty", 0.0) * (counts > 0)
        assert token == penalised.argmax()
        counts[token] += 1
    assert one.token_ids != run_one(letters_llm, change(GREEDY, max_tokens=30)).token_ids


def test_repetition_penalty(letters_llm: LLM) -> None:
    """Counts the prompt too; the values are compared with transformers in test_parity_params."""
    one = run_one(letters_llm, change(GREEDY, repetition_penalty=1e6, max_tokens=20))
    assert len({*encode(PROMPT), *one.token_ids}) == len(set(encode(PROMPT))) + 20
    assert run_one(letters_llm, change(GREEDY, repetition_penalty=1)).text == (
        run_one(letters_llm, GREEDY).text
    )


def test_max_tokens(letters_llm: LLM) -> None:
    one = run_one(letters_llm, change(GREEDY, max_tokens=3))
    assert (len(one.token_ids), one.finish_reason, one.stop_reason) == (3, "length", None)
    one = run_one(letters_llm, change(GREEDY, max_tokens=None), [5] * 120)
    assert (len(one.token_ids), one.finish_reason) == (8, "length")  # max_model_len is 128
    assert SamplingParams().max_tokens == 16


def test_min_tokens(letters_llm: LLM) -> None:
    """Neither EOS nor stop ids are sampled before, and stop strings are passed over."""
    eager = change(GREEDY, ignore_eos=False, logit_bias={EOS: 1e6})
    assert run_one(letters_llm, eager).token_ids == [EOS]
    assert run_one(letters_llm, change(eager, min_tokens=5)).token_ids[5:] == [EOS]
    eager = change(GREEDY, stop_token_ids=[50], logit_bias={50: 1e6})
    assert run_one(letters_llm, change(eager, min_tokens=12)).token_ids.count(50) == 0
    free = run_one(letters_llm, GREEDY)
    held = run_one(letters_llm, change(GREEDY, stop=[free.text[0]], min_tokens=3))
    assert held.text.startswith(free.text[:3])


def test_stop(letters_llm: LLM) -> None:
    """Cuts the text only; the tokens are all there."""
    free = run_one(letters_llm, GREEDY)
    stop = free.text[4:7]
    end = free.text.index(stop)
    one = run_one(letters_llm, change(GREEDY, stop=["~~~never~~~", stop]))
    assert (one.text, one.finish_reason, one.stop_reason) == (free.text[:end], "stop", stop)
    assert one.token_ids == free.token_ids[: end + 3]
    one = run_one(letters_llm, change(GREEDY, stop=stop, include_stop_str_in_output=True))
    assert one.text == free.text[: end + 3]


def test_stop_token_ids(letters_llm: LLM) -> None:
    free = run_one(letters_llm, GREEDY)
    stop = free.token_ids[5]
    end = free.token_ids.index(stop)
    one = run_one(letters_llm, change(GREEDY, stop_token_ids=[stop]))
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)
    assert one.token_ids == free.token_ids[: end + 1]
    assert one.text == free.text[:end]
    one = run_one(
        letters_llm, change(GREEDY, stop_token_ids=[stop], include_stop_str_in_output=True)
    )
    assert one.text == free.text[: end + 1]


def test_ignore_eos(letters_llm: LLM) -> None:
    eager = change(GREEDY, logit_bias={EOS: 1e6})
    one = run_one(letters_llm, eager)
    assert (one.token_ids, one.finish_reason) == ([EOS] * 12, "length")
    one = run_one(letters_llm, change(eager, ignore_eos=False))
    assert (one.token_ids, one.text, one.finish_reason) == ([EOS], "", "stop")
    assert one.stop_reason is None


def test_logit_bias(letters_llm: LLM) -> None:
    free = run_one(letters_llm, change(GREEDY, logprobs=-1))
    assert free.logprobs is not None
    logits = as_logits(free.logprobs)[0]
    second = int(np.argsort(-logits)[1])
    gap = float(logits.max() - logits[second])
    for bias, expected in ((gap - 0.01, free.token_ids[0]), (gap + 0.01, second)):
        one = run_one(letters_llm, change(GREEDY, logit_bias={second: bias}))
        assert one.token_ids[0] == expected
    never = dict.fromkeys(set(free.token_ids), -1e30)
    assert not set(run_one(letters_llm, change(GREEDY, logit_bias=never)).token_ids) & never.keys()


def test_allowed_token_ids(letters_llm: LLM) -> None:
    allowed = encode("abc")
    for params in (GREEDY, SEEDED, change(SEEDED, top_p=0.9)):
        token_ids = run_one(letters_llm, change(params, allowed_token_ids=allowed)).token_ids
        assert set(token_ids) <= set(allowed)
    drawn = run_one(letters_llm, change(SEEDED, temperature=50.0, allowed_token_ids=allowed))
    assert set(drawn.token_ids) == set(allowed)


def test_bad_words(letters_llm: LLM) -> None:
    """Of one token and of several, at the start of a word and inside one, also over the prompt."""
    free = run_one(letters_llm, GREEDY)
    one = run_one(letters_llm, change(GREEDY, bad_words=[free.text[0]]))
    assert free.text[0] not in one.text
    pair = free.text[3:5]
    one = run_one(letters_llm, change(GREEDY, bad_words=[pair]))
    assert pair not in one.text
    over = PROMPT[-2:] + free.text[0]
    one = run_one(letters_llm, change(GREEDY, bad_words=[over]))
    assert one.text[0] != free.text[0]
    only_ab = change(GREEDY, allowed_token_ids=encode("ab"), bad_words=["bb", "aa"])
    assert run_one(letters_llm, only_ab).text in ("ab" * 6, "ba" * 6)


@pytest.mark.parametrize("count", [0, 1, 5, -1])
def test_logprobs(letters_llm: LLM, count: int) -> None:
    """The sampled token first, then the likeliest by rank, with the sampled one if it is there."""
    one = run_one(letters_llm, change(SEEDED, logprobs=count))
    assert one.logprobs is not None
    assert len(one.logprobs) == 12
    every = as_logits(run_one(letters_llm, change(SEEDED, logprobs=-1)).logprobs or [])
    # Raw log-probabilities are the model's own, in which padding rows have a share, too.
    assert (np.exp(every).sum(axis=1) < 1).all()
    size = 98 if count == -1 else count
    for token, entry, logprobs in zip(one.token_ids, one.logprobs, every, strict=True):
        assert next(iter(entry)) == token
        rank = entry[token].rank
        assert rank == 1 + (logprobs > logprobs[token]).sum()
        assert len(entry) == size + (rank > size)
        ranks = [found.rank for other, found in entry.items() if other != token]
        assert ranks == [i for i in range(1, size + 1) if i != rank]
        for other, found in entry.items():
            assert math.isclose(found.logprob, logprobs[other], abs_tol=1e-4)
            assert found.decoded_token == decode([other])
    total = sum(
        entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)
    )
    assert one.cumulative_logprob == pytest.approx(total)


def test_no_logprobs_unless_asked_for(letters_llm: LLM) -> None:
    output = run(letters_llm, GREEDY)
    assert output.outputs[0].logprobs is None
    assert output.prompt_logprobs is None
    assert output.outputs[0].cumulative_logprob < 0


@pytest.mark.parametrize("count", [0, 3, -1])
def test_prompt_logprobs(letters_llm: LLM, count: int) -> None:
    """Of a text that was generated, they are the log-probabilities it was generated with."""
    generated = run_one(letters_llm, change(SEEDED, logprobs=count, max_tokens=40))
    assert generated.logprobs is not None
    prompt = encode(PROMPT)
    params = change(GREEDY, prompt_logprobs=count, max_tokens=1)
    output = run(letters_llm, params, prompt + generated.token_ids)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt) + 40
    assert output.prompt_logprobs[0] is None
    for given, expected in zip(
        output.prompt_logprobs[len(prompt) :], generated.logprobs, strict=True
    ):
        assert given is not None
        assert next(iter(given)) == next(iter(expected))
        assert given.keys() == expected.keys()
        for token, value in given.items():
            assert value.rank == expected[token].rank
            assert value.decoded_token == expected[token].decoded_token
            assert math.isclose(value.logprob, expected[token].logprob, abs_tol=1e-3)


def test_prompt_logprobs_of_a_single_token(letters_llm: LLM) -> None:
    assert run(letters_llm, change(GREEDY, prompt_logprobs=1), [5]).prompt_logprobs == [None]


def test_prompt_logprobs_of_several_samples_are_told_once(letters_llm: LLM) -> None:
    params = change(SEEDED, n=3, prompt_logprobs=2, max_tokens=4)
    output = run(letters_llm, params, encode(PROMPT * 3))
    alone = run(letters_llm, change(params, n=1), encode(PROMPT * 3))
    assert output.prompt_logprobs is not None
    assert alone.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 30
    assert [list(one or ()) for one in output.prompt_logprobs] == [
        list(one or ()) for one in alone.prompt_logprobs
    ]
    for one in output.outputs:
        seeded = change(params, n=1, seed=one.seed)
        assert one.token_ids == run_one(letters_llm, seeded, encode(PROMPT * 3)).token_ids


def test_seed(letters_llm: LLM) -> None:
    """The same in any company; None draws one and records it."""
    free = run_one(letters_llm, SEEDED)
    assert free.seed == 7
    assert run_one(letters_llm, change(SEEDED, seed=8)).token_ids != free.token_ids
    drawn = run_one(letters_llm, change(SEEDED, seed=None))
    assert drawn.seed is not None
    assert run_one(letters_llm, change(SEEDED, seed=drawn.seed)).token_ids == drawn.token_ids
    assert run_one(letters_llm, GREEDY).seed is None


def test_skip_special_tokens(letters_llm: LLM) -> None:
    params = change(GREEDY, allowed_token_ids=[EOS, 40], logit_bias={EOS: 3.0}, max_tokens=6)
    one = run_one(letters_llm, params)
    assert EOS in one.token_ids
    assert one.text == decode([token for token in one.token_ids if token != EOS])
    kept = run_one(letters_llm, change(params, skip_special_tokens=False))
    assert kept.text == "".join(decode([token]) for token in one.token_ids)
    assert "</s>" in kept.text


def test_spaces_between_special_tokens(letters_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaches the tokenizer; one that acts on it is in test_tokenizer."""
    hf = letters_llm.engine.tokenizer
    assert hf is not None
    real, seen = hf.hf.decode, set()

    def spy(token_ids: Any, **options: Any) -> str:
        seen.add(options.get("spaces_between_special_tokens"))
        return real(token_ids, **options)

    monkeypatch.setattr(hf.hf, "decode", spy)
    for value in (True, False):
        run_one(letters_llm, change(GREEDY, spaces_between_special_tokens=value, max_tokens=2))
        assert seen == {value}
        seen.clear()


def test_detokenize(letters_llm: LLM) -> None:
    one = run_one(letters_llm, change(GREEDY, detokenize=False, logprobs=2))
    assert one.text == ""
    assert one.token_ids == run_one(letters_llm, GREEDY).token_ids
    assert one.logprobs is not None
    assert all(value.decoded_token is None for entry in one.logprobs for value in entry.values())


def test_rows_of_all_kinds_in_one_batch_are_their_own(letters_llm: LLM) -> None:
    params = [
        GREEDY,
        SEEDED,
        change(SEEDED, top_p=0.8, min_p=0.01),
        change(GREEDY, frequency_penalty=1.0, bad_words=["e"]),
        change(SEEDED, logit_bias={50: 2.0}, stop="e"),
        change(GREEDY, allowed_token_ids=encode("abcdef"), logprobs=3),
        change(SEEDED, min_tokens=3, stop_token_ids=[40, 50, 60], n=2),
        change(GREEDY, prompt_logprobs=1, repetition_penalty=1.3),
    ]
    together = letters_llm.generate([PROMPT] * len(params), params, use_tqdm=False)
    for one, output in zip(params, together, strict=True):
        alone = run(letters_llm, one)
        for ours, theirs in zip(output.outputs, alone.outputs, strict=True):
            assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
            assert ours.finish_reason == theirs.finish_reason


def test_ids_that_the_tokenizer_does_not_know_are_never_sampled(letters_llm: LLM) -> None:
    kinds: list[dict[str, Any]] = [{}, {"top_k": 100}, {"frequency_penalty": -1.0}, {}]
    params = [
        change(SEEDED, temperature=100.0, seed=i, max_tokens=60, **fields)
        for i, fields in enumerate(kinds * 2)
    ]
    outputs = letters_llm.generate([PROMPT] * 8, params, use_tqdm=False)
    drawn = {token for output in outputs for token in output.outputs[0].token_ids}
    assert len(drawn) > 80
    assert max(drawn) < 98
