"""Rows of the vocabulary that the tokenizer does not know: never sampled, and never reported."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams
from folojax.sampling.sampler import log_sum_exp, token_logprobs, token_ranks
from tests.conftest import check_is_empty
from tests.letters import make_letters_tokenizer
from tests.reference import TINY_LIMITS

NUM_TOKENS = 98
"""Of the letters tokenizer; the tiny model has 128 rows."""

PROMPT = "The sea is blue"
PARAMS = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=6)


@pytest.fixture(scope="module", params=["raw", "processed", "deterministic"])
def llm(request: pytest.FixtureRequest, tiny_model: tuple) -> LLM:
    kinds: dict[str, dict[str, Any]] = {
        "raw": {},
        "processed": {"logprobs_mode": "processed"},
        "deterministic": {"deterministic": True},
    }
    options = kinds[request.param]
    return LLM(tiny_model, make_letters_tokenizer(), max_logprobs=-1, **TINY_LIMITS, **options)


@pytest.mark.parametrize("count", [0, 1, 20, 97, 98, 110, 128, -1])
def test_no_padding_row_is_among_the_alternatives(llm: LLM, count: int) -> None:
    """As in vllm 4963 and 3779: every reported id has a text, whatever number is asked for."""
    params = dataclasses.replace(PARAMS, logprobs=count, prompt_logprobs=count)
    (output,) = llm.generate(PROMPT, params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    most = NUM_TOKENS if count == -1 else min(count, NUM_TOKENS)
    for entry in [*output.outputs[0].logprobs, *output.prompt_logprobs[1:]]:
        assert entry is not None
        assert max(entry) < NUM_TOKENS
        assert most <= len(entry) <= most + 1
        assert all(one.decoded_token for one in entry.values())
        assert max(one.rank for one in entry.values()) <= NUM_TOKENS
        ranks = sorted(one.rank for one in entry.values())
        assert len(set(ranks)) == len(ranks)
        ordered = sorted(entry.values(), key=lambda one: one.rank)
        logprobs = [one.logprob for one in ordered]
        assert logprobs == sorted(logprobs, reverse=True)
    check_is_empty(llm)


def test_ranks_count_no_padding_row(llm: LLM) -> None:
    params = dataclasses.replace(PARAMS, temperature=0, top_p=1.0, logprobs=2, record=True)
    (output,) = llm.generate(PROMPT, params, use_tqdm=False)
    one = output.outputs[0]
    assert one.logprobs is not None
    assert one.record is not None
    for token, entry, record in zip(one.token_ids, one.logprobs, one.record, strict=True):
        assert entry[token].rank == record.rank == 1, "greedy takes the likeliest of all tokens"
    (score,) = llm.score(PROMPT, one.text, use_tqdm=False)
    assert score.token_ids == one.token_ids
    assert score.ranks == [1] * len(one.token_ids)


def test_what_is_reported_is_the_model_s_own_distribution() -> None:
    """Padding has its share of the mass; a padding row that a prompt holds has its own entry."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32))
    logits = logits.at[:, 98:].add(3.0)
    tokens = jnp.array([5, 60, 100])
    wanted = logits - log_sum_exp(logits)[:, None]
    logprobs, ranks, top, top_logprobs = token_logprobs(logits, tokens, 98, None, 98)
    order = np.argsort(-np.asarray(logits[:, :98]), axis=1, kind="stable")
    np.testing.assert_array_equal(top, order)
    np.testing.assert_allclose(top_logprobs, np.take_along_axis(np.asarray(wanted), order, 1))
    np.testing.assert_allclose(logprobs, wanted[jnp.arange(3), tokens])
    assert ranks.tolist()[:2] == [order[i].tolist().index(t) + 1 for i, t in ((0, 5), (1, 60))]
    assert ranks[2] == 1 + int((logits[2, :98] > logits[2, 100]).sum())
    np.testing.assert_array_equal(ranks, token_ranks(logits, tokens, 98))
    assert int(token_ranks(logits, tokens)[0]) > int(ranks[0])


def test_a_prompt_may_hold_a_padding_row(llm: LLM) -> None:
    params = dataclasses.replace(PARAMS, prompt_logprobs=3, logprobs=3)
    (output,) = llm.generate([5, 120, 127, 6], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    for token, entry in zip([120, 127, 6], output.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert token in entry
        assert all(other < NUM_TOKENS for other in entry if other != token)
    assert output.outputs[0].text
