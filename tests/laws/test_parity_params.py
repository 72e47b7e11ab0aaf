"""Sampling parameters against transformers' own generate: the real model, four prompts, greedy."""

import functools
from typing import Any

import numpy as np
import pytest

from folojax import LLM, SamplingParams
from tests import reference
from tests.laws.test_parity import PARAGRAPH

NUM_PROMPTS = 4
PROMPT_LEN = 24
NUM_TOKENS = 12


@functools.cache
def prompts() -> list[list[int]]:
    """Of one length, so that transformers needs no padding."""
    ids = reference.embedded_tokenizer().encode(PARAGRAPH)
    step = (len(ids) - PROMPT_LEN) // (NUM_PROMPTS - 1)
    return [ids[i * step : i * step + PROMPT_LEN] for i in range(NUM_PROMPTS)]


def transformers_generate(**options: Any) -> tuple[list[list[int]], np.ndarray]:
    """Tokens of every prompt, and the log-probabilities that they were chosen from, raw."""
    import torch
    from transformers import GenerationConfig

    model = reference.embedded_model()
    model.generation_config.eos_token_id = None
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    ids = torch.tensor(prompts())
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    logprobs = torch.log_softmax(torch.stack(out.logits, dim=1).float(), -1)
    return out.sequences[:, PROMPT_LEN:].tolist(), logprobs.numpy()


@pytest.fixture(scope="module")
def free() -> tuple[list[list[int]], np.ndarray]:
    return transformers_generate()


def ours(llm: LLM, params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate(prompts(), params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, **fields)


@pytest.mark.parametrize("penalty", [1.3, pytest.param(0.8, marks=pytest.mark.slow)])
def test_repetition_penalty(real_llm: LLM, free: tuple, penalty: float) -> None:
    expected, _ = transformers_generate(repetition_penalty=penalty)
    assert expected != free[0]
    assert ours(real_llm, greedy(repetition_penalty=penalty)) == expected


@pytest.mark.slow
def test_min_new_tokens(real_llm: LLM, free: tuple) -> None:
    """The ends are words that the model likes to say, so that each prompt is held back."""
    ends = [tokens[2] for tokens in free[0]]
    expected, _ = transformers_generate(min_new_tokens=8, eos_token_id=ends)
    found = ours(real_llm, greedy(stop_token_ids=ends, min_tokens=8))
    for tokens, theirs in zip(found, expected, strict=True):
        assert len(tokens) >= 8
        assert tokens == theirs[: len(tokens)]
        assert len(tokens) == NUM_TOKENS or tokens[-1] in ends


@pytest.mark.slow
def test_bad_words(real_llm: LLM, free: tuple) -> None:
    """Words of one token and of several, of what the model would have said."""
    tokenizer = reference.embedded_tokenizer()
    texts = [tokenizer.decode(tokens) for tokens in free[0]]
    words = [
        word.strip(" ,.") for text in texts for word in (text.split()[2:3] + text.split()[6:7])
    ]
    words = sorted({word for word in words if word})
    words += [" ".join(text.split()[3:5]) for text in texts]
    encoded = [tokenizer.encode(text) for word in words for text in (word, " " + word)]
    assert any(len(ids) > 1 for ids in encoded)
    expected, _ = transformers_generate(bad_words_ids=encoded)
    assert sum(a != b for a, b in zip(expected, free[0], strict=True)) >= NUM_PROMPTS - 1
    assert ours(real_llm, greedy(bad_words=words)) == expected


def raw_logprobs(ids: list[int]) -> np.ndarray:
    """After each token: [N, V]."""
    logits = reference.logits(reference.embedded_model(), ids)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check_logprobs(entries: list, tokens: list[int], expected: np.ndarray) -> None:
    """The token and the 20 likeliest: which they are, their ranks, their values within 1e-3."""
    for entry, token, logprobs in zip(entries, tokens, expected, strict=True):
        assert next(iter(entry)) == token
        likeliest = np.sort(logprobs)[::-1][:20]
        found = sorted((value.rank, value.logprob) for value in entry.values())[:20]
        assert [rank for rank, _ in found] == list(range(1, 21))
        np.testing.assert_allclose([value for _, value in found], likeliest, atol=1e-3)
        for other, value in entry.items():
            assert abs(value.logprob - logprobs[other]) < 1e-3
            # Between values that are equal to rounding, either order is right.
            assert (logprobs > value.logprob + 1e-3).sum() < value.rank
            assert value.rank <= (logprobs > value.logprob - 1e-3).sum()


def test_top_20_logprobs_and_prompt_logprobs(real_llm: LLM, free: tuple) -> None:
    params = greedy(logprobs=20, prompt_logprobs=20)
    outputs = real_llm.generate(prompts(), params, use_tqdm=False)
    tokens, logprobs = free
    for i, output in enumerate(outputs):
        one = output.outputs[0]
        assert one.token_ids == tokens[i]
        assert one.logprobs is not None
        check_logprobs(one.logprobs, tokens[i], logprobs[i])
        assert output.prompt_logprobs is not None
        expected = raw_logprobs(prompts()[i])[:-1]
        check_logprobs(output.prompt_logprobs[1:], prompts()[i][1:], expected)


@pytest.mark.slow
def test_score(real_llm: LLM) -> None:
    """The text's second half, given its first: the sum that the reference makes of it."""
    halves = [(ids[:12], ids[12:]) for ids in prompts()]
    outputs = real_llm.score([a for a, _ in halves], [b for _, b in halves], use_tqdm=False)
    for output, ids in zip(outputs, prompts(), strict=True):
        logprobs = raw_logprobs(ids)[11:-1]
        expected = logprobs[np.arange(12), ids[12:]]
        np.testing.assert_allclose(output.logprobs, expected, atol=1e-3)
        assert output.is_greedy == bool((logprobs.argmax(-1) == ids[12:]).all())
