"""Rollouts behind tunix's interface, against the engine, `log_likelihood` and transformers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams
from folojax.adapters.tunix import Rollout
from tests.dense import likelihood
from tests.letters import EOS, encode, make_letters_tokenizer
from tests.reference import TINY_LIMITS, load_model

PAD = 0
PROMPTS = ["The sea is", "Rivers", "A"]


@dataclasses.dataclass
class Config:
    """The fields of tunix's RolloutConfig that are read, with its defaults."""

    max_tokens_to_generate: int = 12
    temperature: float = 0.9
    top_p: float | None = 1.0
    top_k: int | None = None
    seed: Any = None
    max_prompt_length: int = 16
    eos_tokens: Sequence[int] | None = None
    return_logprobs: bool = False


def pad(rows: list[np.ndarray], width: int) -> np.ndarray:
    return np.array([np.pad(row, (0, width - len(row)), constant_values=PAD) for row in rows])


def transformers_logps(
    model: Any,
    prompt: list[int],
    completion: list[int],
    temperature: float = 1.0,
    num_tokens: int = 128,
) -> np.ndarray:
    import torch

    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(ids).logits[0, :, :num_tokens]
        logps = torch.log_softmax(logits / temperature, -1)
    picked = logps[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return picked[len(prompt) - 1 :].numpy()


@pytest.fixture(scope="module")
def torch_model(tiny_directory: Path) -> Any:
    return load_model(tiny_directory)


@pytest.fixture
def rollout(letters_llm: LLM) -> Rollout:
    return Rollout(letters_llm)


def test_arrays_are_laid_out_as_tunix_wants_them(letters_llm: LLM, rollout: Rollout) -> None:
    found = rollout.generate(PROMPTS, Config(temperature=0.0))
    params = SamplingParams(temperature=0, max_tokens=12)
    outputs = letters_llm.generate(PROMPTS, params, use_tqdm=False)
    assert found.text == [output.outputs[0].text for output in outputs]
    assert [tokens.tolist() for tokens in found.tokens] == [
        output.outputs[0].token_ids for output in outputs
    ]
    assert found.left_padded_prompt_tokens.shape == (3, 16)
    for row, prompt in zip(found.left_padded_prompt_tokens.tolist(), PROMPTS, strict=True):
        assert row == [PAD] * (16 - len(prompt)) + encode(prompt)
    assert {array.dtype for array in [*found.tokens, found.left_padded_prompt_tokens]} == {
        np.dtype(np.int32)
    }
    assert found.logits is None
    assert found.logprobs is None
    assert (rollout.pad_id(), rollout.eos_id(), rollout.model()) == (PAD, EOS, None)


def test_prompts_wider_than_asked_get_a_power_of_two(rollout: Rollout) -> None:
    for length, width in ((16, 16), (17, 32), (33, 64)):
        found = rollout.generate(["x" * length, "y"], Config(max_tokens_to_generate=1))
        assert found.left_padded_prompt_tokens.shape == (2, width)


def test_logps_of_any_tokens_are_those_of_the_references(
    torch_model: Any, letters_llm: LLM, rollout: Rollout
) -> None:
    """One completion ends by EOS, one before its padding, one fills its row, one is empty."""
    prompts = [encode(prompt) for prompt in (*PROMPTS, "No")]
    completions = [[*encode("salt"), EOS], encode("run"), encode("swan song"), []]
    left = np.array([[PAD] * (12 - len(prompt)) + prompt for prompt in prompts])
    right = pad([np.array(row, np.int32) for row in completions], 9)
    found = rollout.get_per_token_logps(jnp.array(left), jnp.array(right))
    assert found.shape == (4, 9)
    assert found.dtype == jnp.float32
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        length = len(completion)
        assert not found[row, length:].any()
        if not completion:
            continue
        tokens = np.zeros(32, np.int32)
        tokens[: len(prompt) + length] = [*prompt, *completion]
        mask = np.arange(32) >= len(prompt)
        ours = likelihood(letters_llm.params, tokens, mask, model=letters_llm.model)
        np.testing.assert_allclose(found[row, :length], ours[len(prompt) :][:length], atol=2e-5)
        theirs = transformers_logps(torch_model, prompt, completion)
        np.testing.assert_allclose(found[row, :length], theirs, atol=2e-5)


def test_a_mask_says_where_completions_end(rollout: Rollout) -> None:
    """With it EOS and padding may stand inside of a completion."""
    left = np.array([encode("A dog")])
    right = np.array([[*encode("ba"), EOS, PAD, *encode("rk")]])
    whole = rollout.get_per_token_logps(left, right, np.ones((1, 6), bool))
    assert (np.asarray(whole) < 0).all()
    until_eos = rollout.get_per_token_logps(left, right)
    np.testing.assert_allclose(until_eos[0, :3], whole[0, :3], atol=2e-5)
    assert not until_eos[0, 3:].any()
    assert not rollout.get_per_token_logps(left, right, np.zeros((1, 6), bool)).any()


@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.7])
def test_logprobs_of_a_rollout_are_of_the_temperature(
    torch_model: Any, rollout: Rollout, temperature: float
) -> None:
    """The tokenizer knows 98 of the 128 rows of the vocabulary."""
    config = Config(temperature=temperature, seed=3, top_p=0.9, return_logprobs=True)
    found = rollout.generate(PROMPTS, config)
    assert found.logprobs is not None
    scale, num_tokens = (0.7, 98) if temperature == 0.7 else (1.0, 128)
    for prompt, tokens, logprobs in zip(PROMPTS, found.tokens, found.logprobs, strict=True):
        expected = transformers_logps(
            torch_model, encode(prompt), tokens.tolist(), scale, num_tokens
        )
        np.testing.assert_allclose(logprobs, expected, atol=3e-5)


def test_a_rollout_and_its_rescoring_are_the_same_bits(tiny_model: tuple) -> None:
    """At temperature 1, in deterministic mode."""
    llm = LLM(tiny_model, make_letters_tokenizer(), deterministic=True, **TINY_LIMITS)
    rollout = Rollout(llm)
    found = rollout.generate(PROMPTS, Config(temperature=1.0, seed=1, return_logprobs=True))
    assert found.logprobs is not None
    again = rollout.get_per_token_logps(found.left_padded_prompt_tokens, pad(found.tokens, 12))
    for row, logprobs in enumerate(found.logprobs):
        np.testing.assert_array_equal(again[row, : len(logprobs)], logprobs)


def test_a_group_of_equal_prompts_gets_samples_of_its_own(rollout: Rollout) -> None:
    seeds = (7, jnp.array(7), jax.random.key(7), jax.random.PRNGKey(7), jax.random.key(8))
    texts = [rollout.generate(["A"] * 4, Config(seed=seed)).text for seed in seeds]
    assert all(len(set(group)) == 4 for group in texts)
    assert texts[0] == texts[1]
    assert texts[2] == texts[3] != texts[4]
    assert rollout.generate(["A"], Config()).text != rollout.generate(["A"], Config()).text
    pairs = rollout.generate(["A", "Rivers"], Config(seed=7), n=2)
    assert [row[-1] for row in pairs.left_padded_prompt_tokens] == encode("AAss")
    assert len(set(pairs.text)) == 4


def test_end_tokens_of_a_config_take_the_place_of_the_models(rollout: Rollout) -> None:
    (free,) = rollout.generate(["A"], Config(temperature=0.0, eos_tokens=[])).tokens
    assert len(free) == 12
    stop = int(free[3])
    (cut,) = rollout.generate(["A"], Config(temperature=0.0, eos_tokens=[stop])).tokens
    assert cut.tolist() == free[: free.tolist().index(stop) + 1].tolist()


def test_new_parameters_are_converted_and_used(letters_llm: LLM) -> None:
    old = letters_llm.params
    rollout = Rollout(letters_llm, to_params=lambda given: given["engine"], rollout_actor=object())
    left, right = np.array([encode("A")]), np.array([encode("dog")])
    before = rollout.get_per_token_logps(left, right)
    try:
        rollout.update_params({"engine": jax.tree.map(lambda leaf: leaf * 1.1, old)})
        assert np.abs(rollout.get_per_token_logps(left, right) - before).max() > 1e-3
        Rollout(letters_llm).update_params(old, filter_types=(dict,))
        np.testing.assert_allclose(rollout.get_per_token_logps(left, right), before, atol=2e-5)
        with pytest.raises(ValueError, match="embed"):
            Rollout(letters_llm).update_params({})
    finally:
        letters_llm.update_params(old)


def test_text_that_begins_with_bos_gets_no_second_one(text_directory: Path) -> None:
    """A tokenizer that adds BOS, and a prompt as a chat template writes it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_directory, add_bos_token=True)
    bos = tokenizer.bos_token_id
    llm = LLM(text_directory, tokenizer, max_model_len=64, num_pages=4, max_num_seqs=2)
    prompts = ["The sea", f"{tokenizer.bos_token}The sea"]
    found = Rollout(llm).generate(prompts, Config(max_tokens_to_generate=1, max_prompt_length=4))
    for row in found.left_padded_prompt_tokens.tolist():
        assert row[-3:] == [bos, *tokenizer.encode("The sea", add_special_tokens=False)]


def test_what_cannot_be_rolled_out_is_refused(tiny_model: tuple, rollout: Rollout) -> None:
    with pytest.raises(ValueError, match="need a tokenizer with an end token"):
        Rollout(LLM(tiny_model, **TINY_LIMITS))
    with pytest.raises(ValueError, match="temperature is -1"):
        rollout.generate(["A"], Config(temperature=-1.0))
    with pytest.raises(ValueError, match="the prompt is empty"):
        rollout.get_per_token_logps(np.full((1, 4), PAD), np.array([encode("dog")]))
