"""Every family against transformers on the same random weights."""

import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams
from folojax.models.core.decoder import init_params
from folojax.models.core.dense_attend import dense_attend
from folojax.models.families.families import FAMILIES as REGISTRY
from folojax.models.files.checkpoint import build_module, load_params, open_checkpoint
from folojax.models.files.save import save_pretrained
from tests import reference
from tests.families import FAMILIES, PROMPT_LEN, save_family
from tests.reference import TINY_LIMITS


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name of a case, the directory of its model, the model of transformers, and ours."""
    directory = tmp_path_factory.mktemp(request.param)
    theirs = save_family(request.param, directory)
    checkpoint = open_checkpoint(directory)
    module = build_module(checkpoint.config, jnp.float32)
    return request.param, directory, theirs, (module, load_params(checkpoint, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def dense_logits(module: Any, params: Any, tokens: Any) -> Any:
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    hidden, _ = module.apply({"params": params}, tokens, positions, None, dense_attend)
    return module.apply({"params": params}, hidden, method="logits")


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 128, length).tolist()


def test_logits_are_those_of_transformers(family: Any) -> None:
    _, _, theirs, (module, params) = family
    tokens = prompt(PROMPT_LEN)
    expected = reference.logits(theirs, tokens)
    assert expected.std() > 0.3, "logits too flat to tell anything"
    ours = dense_logits(module, params, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=1e-4)


def test_greedy_tokens_in_a_continuous_batch_are_those_of_transformers(family: Any) -> None:
    """Three prompts for two places, one of them longer than a chunk and a window."""
    _, _, theirs, model = family
    llm = LLM(model, **TINY_LIMITS | {"max_num_seqs": 2})
    prompts = [prompt(PROMPT_LEN), prompt(3, seed=1), prompt(17, seed=2)]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    for tokens, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        expected, _, gaps = reference.greedy(theirs, tokens, 32)
        assert list(output.outputs[0].token_ids) == expected, f"smallest gap {gaps.min()}"


def test_the_loaded_tree_is_the_initialised_tree(family: Any) -> None:
    _, _, _, (module, params) = family
    shapes = jax.eval_shape(functools.partial(init_params, module), jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, shapes
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
    ours = dense_logits(module, changed, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=2e-4)
    again = open_checkpoint(tmp_path)
    assert again.config == module.config
    chex.assert_trees_all_equal(load_params(again, jnp.float32), changed)


def test_every_registered_family_is_tried(tmp_path: Path) -> None:
    tried = set()
    for case in FAMILIES:
        save_family(case, tmp_path / case)
        tried.add(open_checkpoint(tmp_path / case).config.architecture)
    assert tried == set(REGISTRY)
