"""Saving parameters: the way back to transformers, and what is refused."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams
from folojax.models.files.checkpoint import load_params, open_checkpoint
from folojax.models.files.save import save_pretrained
from tests import reference
from tests.conftest import REAL_LIMITS


def test_the_embedded_model_is_the_same_from_its_file_and_from_a_saved_directory(
    real_llm: LLM, tmp_path: Path
) -> None:
    real_llm.save_pretrained(tmp_path)
    original, saved = open_checkpoint(), open_checkpoint(tmp_path)
    assert saved.config == original.config
    assert saved.generation_config == original.generation_config
    assert saved.eos_token_ids == original.eos_token_ids
    chex.assert_trees_all_equal(load_params(saved, jnp.float32), load_params(original, jnp.float32))
    again = LLM(tmp_path, dtype="float32", **REAL_LIMITS)
    text = "def add(a, b):\n    return a + b  # 12345"
    ids = again.get_tokenizer().encode(text)
    assert ids == real_llm.get_tokenizer().encode(text)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    question = [{"role": "user", "content": "Name a river."}]
    (theirs,), (ours,) = (one.chat(question, params, use_tqdm=False) for one in (real_llm, again))
    assert ours.prompt == theirs.prompt
    assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
    assert ours.outputs[0].logprobs == theirs.outputs[0].logprobs


def test_half_precision_is_saved_as_it_is(tiny_directory: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_directory)
    params = load_params(checkpoint, jnp.bfloat16)
    save_pretrained(params, tmp_path, checkpoint.config)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    chex.assert_trees_all_equal(load_params(open_checkpoint(tmp_path), jnp.bfloat16), params)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * sum(
        leaf.nbytes for leaf in jax.tree.leaves(params)
    )


def test_trained_parameters_of_a_running_engine_are_saved(
    tiny_model: tuple, tmp_path: Path
) -> None:
    module, params = tiny_model
    llm = LLM((module, params), **reference.TINY_LIMITS)
    trained = jax.tree.map(lambda leaf: leaf * 0.5, params)
    llm.update_params(trained)
    llm.save_pretrained(tmp_path)
    loaded = reference.load_model(tmp_path).state_dict()["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(loaded, trained["embed"])


def test_an_older_model_in_the_directory_is_replaced(tiny_model: tuple, tmp_path: Path) -> None:
    module, params = tiny_model
    save_pretrained(params, tmp_path, module.config, shard_bytes=50_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(params, tmp_path, module.config)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "notes.txt"}


def test_every_misfit_is_named_and_nothing_written(tiny_model: tuple, tmp_path: Path) -> None:
    module, params = tiny_model
    wrong = {**params, "other": params["embed"], "embed": params["embed"][1:]}
    del wrong["final_norm"]
    with pytest.raises(ValueError, match=r"final_norm is missing; other is unknown; embed is"):
        save_pretrained(wrong, tmp_path / "new", module.config)
    assert not (tmp_path / "new").exists()


def test_a_config_that_no_file_states_is_refused(tiny_model: tuple, tmp_path: Path) -> None:
    module, params = tiny_model
    by_hand = dataclasses.replace(module.config, hf_config="")
    with pytest.raises(ValueError, match="pass hf_config="):
        save_pretrained(params, tmp_path, by_hand)
    changed = dataclasses.replace(module.config, rope_theta=5.0)
    with pytest.raises(ValueError, match="was it changed"):
        save_pretrained(params, tmp_path, changed)
    save_pretrained(params, tmp_path, by_hand, hf_config=json.loads(module.config.hf_config))
    assert open_checkpoint(tmp_path).config == module.config


def test_code_that_came_with_a_model_is_not_passed_on(tiny_model: tuple, tmp_path: Path) -> None:
    module, params = tiny_model
    mapping = json.loads(module.config.hf_config) | {"auto_map": {"AutoConfig": "evil.Config"}}
    save_pretrained(params, tmp_path, module.config, hf_config=mapping)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
