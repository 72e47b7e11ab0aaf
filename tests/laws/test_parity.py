"""The engine against an independent reference: Hugging Face transformers on the same weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import (
    LLM,
    DecodeInputs,
    PrefillInputs,
    SamplingParams,
    decode,
    init_state,
    prefill,
    score_tokens,
)
from folojax.backend import choose_backend
from tests import reference

pytestmark = pytest.mark.usefixtures("optimised")

PARAGRAPH = (
    "The history of the lighthouse is a history of patience. For centuries people lit fires on "
    "hills, then in towers of stone, and later behind lenses as tall as a man, so that others "
    "whom they would never meet might come home. In 1823 Augustin Fresnel built a lens of many "
    "rings that bent the light of a single lamp into one beam, and ships saw it from thirty "
    "kilometres away. Keepers climbed the stairs every evening, trimmed the wick, wound the "
    "clockwork and wrote the weather in a book; their children learned to read from it. When "
    "electric lamps came, fewer keepers were needed, and after the satellites almost none. Many "
    "towers stand empty today, yet people still walk out to them at dusk and wait for the light, "
)


def check_greedy(llm: LLM, model: object, prompts: list[list[int]], num_tokens: int) -> None:
    """Every token equal, and log-probabilities within 1e-3."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, logprobs, gaps = reference.greedy(model, prompt, num_tokens)
        completion = output.outputs[0]
        assert list(completion.token_ids) == tokens, f"smallest gap {gaps.min()}"
        assert completion.logprobs is not None
        ours = [entry[t].logprob for entry, t in zip(completion.logprobs, tokens, strict=True)]
        np.testing.assert_allclose(ours, logprobs, atol=1e-3)


LENGTHS = [3, 5, 8, 13, 16, 17, 31, 40, 48, 63, 64, 65, 100, 129, 160, 200]


def prompts_of(llm: LLM, lengths: list[int]) -> list[list[int]]:
    ids = llm.get_tokenizer().encode(PARAGRAPH * 2)
    prompts = [ids[start : start + length] for start, length in enumerate(lengths)]
    assert [len(prompt) for prompt in prompts] == lengths
    return prompts


@pytest.mark.parametrize(
    ("lengths", "num_tokens"),
    [([3, 16, 17, 63, 65, 200], 24), pytest.param(LENGTHS, 64, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_embedded_model_gives_the_tokens_of_transformers(
    real_llm: LLM, lengths: list[int], num_tokens: int
) -> None:
    """Prompts of 3 to 200 tokens, four at a time, chunked, around pages and rows of a step.

    One forward pass of transformers over prompt and output: if each token is the likeliest after
    those before it, they are what greedy decoding gives.
    """
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    outputs = real_llm.generate(prompts_of(real_llm, lengths), params, use_tqdm=False)
    for output in outputs:
        completion = output.outputs[0]
        length = len(output.prompt_token_ids)
        logits = reference.logits(
            reference.embedded_model(), [*output.prompt_token_ids, *completion.token_ids]
        )
        logprobs = np.asarray(jax.nn.log_softmax(logits[length - 1 : -1], axis=-1))
        assert completion.token_ids == logprobs.argmax(axis=-1).tolist()
        assert completion.logprobs is not None
        ours = [next(iter(entry.values())).logprob for entry in completion.logprobs]
        np.testing.assert_allclose(ours, logprobs.max(axis=-1), atol=1e-3)


@pytest.mark.slow
def test_embedded_model_gives_the_tokens_of_transformers_generate(real_llm: LLM) -> None:
    """The same prompts by its own loop, one after the other."""
    check_greedy(real_llm, reference.embedded_model(), prompts_of(real_llm, LENGTHS), num_tokens=64)


def test_prefill_and_decode_give_the_logits_of_transformers(
    tiny_directory: Path, tiny_model: tuple
) -> None:
    """The functional layer, without an engine: chunks of 16 and then single tokens."""
    model = reference.load_model(tiny_directory)
    module, params = tiny_model
    config = module.config
    tokens = np.random.default_rng(1).integers(3, config.vocab_size, 64).tolist()
    expected = jax.nn.log_softmax(reference.logits(model, tokens), axis=-1)
    layout = choose_backend().kv_layout(config, jnp.float32, num_pages=8, page_size=16)
    cache, slots = init_state(layout, max_num_seqs=1)
    pages = jnp.array([6, 1, 7, 2])
    logprobs = []
    for first in range(0, 32, 16):
        chunk = PrefillInputs(
            tokens=jnp.array([tokens[first : first + 16]]),
            start=jnp.array([first]),
            length=jnp.array([16]),
            page_table=pages[None],
        )
        cache, last, hidden = prefill(params, cache, chunk, model=module)
        np.testing.assert_array_equal(last, hidden[:, 15])
        targets = jnp.array([tokens[first + 1 : first + 17]])
        scores = score_tokens(params, hidden, targets, model=module, num_logprobs=2)
        logprobs += scores.logprobs[0].tolist()
    for position in range(32, 63):
        used = position // 16 + 1
        row = DecodeInputs(
            slot=jnp.array([0]),
            token=jnp.array([tokens[position]]),
            position=jnp.array([position]),
            page_table=jnp.append(pages[:used], jnp.full(4 - used, 8))[None],
        )
        cache, last = decode(params, cache, slots.tokens, row, model=module)
        targets = jnp.array([[tokens[position + 1]]])
        scores = score_tokens(params, last[:, None], targets, model=module, num_logprobs=2)
        logprobs += scores.logprobs[0].tolist()
    wanted = expected[jnp.arange(63), jnp.array(tokens[1:])]
    np.testing.assert_allclose(np.array(logprobs), wanted, atol=1e-4)
    best = np.argsort(-expected[62], stable=True)[:2]
    np.testing.assert_array_equal(scores.top_tokens[0, 0], best)
    np.testing.assert_allclose(scores.top_logprobs[0, 0], expected[62][best], atol=1e-4)
    assert scores.ranks.tolist() == [[1 + int((expected[62] > wanted[62]).sum())]]


def test_inputs_that_do_not_fit_together_are_named(tiny_model: tuple) -> None:
    module, params = tiny_model
    layout = choose_backend().kv_layout(module.config, jnp.float32, num_pages=4, page_size=16)
    state = init_state(layout, max_num_seqs=2)
    two, three, table = jnp.zeros(2, int), jnp.zeros(3, int), jnp.zeros((2, 1), int)
    row = DecodeInputs(slot=two, token=two, position=three, page_table=table)
    with pytest.raises(AssertionError, match=r"\(3,\)"):
        decode(params, state.cache, state.slots.tokens, row, model=module)
    tokens = jnp.zeros((2, 16), int)
    chunk = PrefillInputs(tokens, two, three, table)
    with pytest.raises(AssertionError, match=r"\(3,\)"):
        prefill(params, state.cache, chunk, model=module)
