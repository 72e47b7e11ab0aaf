"""Every family against transformers on the same random weights."""

import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from folojax import LLM, SamplingParams, params_from_hf, params_to_hf
from folojax.models.core.decoder import init_params
from folojax.models.families.families import FAMILIES as REGISTRY
from folojax.models.files.checkpoint import load_params, open_checkpoint
from folojax.models.files.hf_config import config_from_hf
from folojax.models.files.save import save_pretrained
from tests import dense, reference
from tests.families import FAMILIES, PROMPT_LEN, config_of, save_family
from tests.more_families import MORE
from tests.reference import TINY_LIMITS

OTHER_NUMBERS = (
    "llama-biases",
    "llama-rope-llama3",
    "llama-rope-linear",
    "qwen2-rope-yarn",
    "mistral-full",
    "qwen3-moe-mixed",
)
STEPS_OF_OTHERS = (
    *("llama-wide-heads", "llama-rope-dynamic", "qwen2-window", "qwen2-moe", "qwen3.5", "hunyuan"),
    *("qwen3.5-moe", "phi3-longrope", "granite", "glm", "ministral", "ministral3", "exaone4"),
    *("gemma", "gemma3n", "glm4-moe-lite"),
    *("granite-hybrid-dense", "bamba", "nemotron-h-latent", "gemma4-moe"),
    *(*MORE, "lfm2-moe", "falcon-h1-normed"),
    *("exaone4-full", "deepseek-v2", "deepseek-v2-groups", "olmo3", "smollm3"),
    *("mixtral", "qwen2", "qwen3", "phi3", "olmo2", "glm4", "glm4-moe", "cohere2"),
    *("gemma3", "nemotron-h"),
)
"""Whose steps are made of what those of other families are, or which laws try: their logits are
enough for a start."""


def batched() -> list[Any]:
    """Cases whose steps differ, and as a longer proof those that they are made of."""
    cases = [case for case in FAMILIES if case not in OTHER_NUMBERS]
    return [
        pytest.param(case, marks=[pytest.mark.slow] * (case in STEPS_OF_OTHERS)) for case in cases
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name of a case, the directory of its model, the model of transformers, and ours."""
    directory = tmp_path_factory.mktemp(request.param)
    theirs = save_family(request.param, directory)
    return request.param, directory, theirs, dense.load(directory)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 128, length).tolist()


def test_logits_are_those_of_transformers(family: Any) -> None:
    _, _, theirs, (module, params) = family
    tokens = prompt(PROMPT_LEN)
    expected = reference.logits(theirs, tokens)
    assert expected.std() > 0.3, "logits too flat to tell anything"
    ours = dense.logits(module, params, tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


# Those apart that are another's step with other numbers in it.
@pytest.mark.parametrize("family", batched(), indirect=True)
def test_greedy_tokens_in_a_continuous_batch_are_those_of_transformers(family: Any) -> None:
    """Three prompts for two places, one of them longer than a chunk and a window.

    One pass of transformers over prompt and output: if each token is the likeliest after those
    before it, they are what greedy decoding gives.
    """
    _, _, theirs, model = family
    llm = LLM(model, **TINY_LIMITS | {"max_num_seqs": 2})
    prompts = [prompt(PROMPT_LEN), prompt(3, seed=1), prompt(17, seed=2)]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    for tokens, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        found = list(output.outputs[0].token_ids)
        logits = reference.logits(theirs, tokens + found)[len(tokens) - 1 : -1]
        assert found == logits.argmax(axis=-1).tolist()


def test_the_loaded_tree_is_the_initialised_tree(family: Any) -> None:
    _, _, _, (module, params) = family
    shapes = jax.eval_shape(functools.partial(init_params, module), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes)


# What families differ in by words alone is saved by the code of others.
@pytest.mark.parametrize(
    "family",
    [pytest.param(case, marks=[pytest.mark.slow] * (case in MORE)) for case in FAMILIES],
    indirect=True,
)
def test_saved_parameters_are_what_transformers_loads(family: Any, tmp_path: Path) -> None:
    """Changed before, so that nothing can come from the old files; in several shards."""
    name, _, _, (module, params) = family
    changed = jax.tree.map(lambda leaf: leaf * 1.25, params)
    shard_bytes = 100_000 if name in ("qwen2", "mixtral", "gpt2") else 2**30
    save_pretrained(changed, tmp_path, module.config, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 100_000)
    tokens = prompt(PROMPT_LEN)
    theirs = reference.logits(reference.load_model(tmp_path), tokens)
    ours = dense.logits(module, changed, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)
    again = open_checkpoint(tmp_path)
    assert again.config == module.config
    chex.assert_trees_all_equal(load_params(again, jnp.float32), changed)


def test_arrays_by_their_names_become_parameters_and_back(family: Any) -> None:
    _, directory, _, (module, params) = family
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    found = params_from_hf(tensors, module.config)
    chex.assert_trees_all_equal(found, params)
    again = params_to_hf(found, module.config)
    assert again.keys() == tensors.keys()
    chex.assert_trees_all_equal(again, tensors)


def test_every_registered_family_is_tried() -> None:
    configs = [config_from_hf(config_of(case, transformers)) for case in FAMILIES]
    assert {config.architecture for config in configs} == set(REGISTRY)
