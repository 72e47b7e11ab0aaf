"""Saving parameters: the way back to transformers, and what is refused."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams, params_from_hf, params_to_hf
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


def test_half_precision_keeps_its_bits_by_name(tiny_directory: Path) -> None:
    checkpoint = open_checkpoint(tiny_directory)
    params = load_params(checkpoint, jnp.bfloat16)
    tensors = params_to_hf(params, checkpoint.config)
    assert {str(one.dtype) for one in tensors.values()} == {"bfloat16"}
    again = params_from_hf(tensors, checkpoint.config, jnp.bfloat16)
    chex.assert_trees_all_equal(again, params)
    wide = params_from_hf(tensors, checkpoint.config)
    chex.assert_trees_all_equal(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))


def test_tensors_of_torch_are_taken_by_name(tiny_directory: Path) -> None:
    import torch

    model = reference.load_model(tiny_directory)
    checkpoint = open_checkpoint(tiny_directory)
    found = params_from_hf(model.state_dict(), checkpoint.config)
    chex.assert_trees_all_equal(found, load_params(checkpoint))
    half = {name: one.to(torch.bfloat16) for name, one in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"tensor '\S+' is no array to NumPy .*: give it as float"):
        params_from_hf(half, checkpoint.config)


def test_copies_by_name_are_the_callers(tiny_model: tuple) -> None:
    module, params = tiny_model
    tensors = params_to_hf({"params": params}, module.config)
    before = np.array(params["embed"])
    tensors["model.embed_tokens.weight"][:] = 0
    np.testing.assert_array_equal(params["embed"], before)


def test_every_misfit_by_name_is_listed(tiny_model: tuple) -> None:
    module, params = tiny_model
    tensors = params_to_hf(params, module.config)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][1:]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)
    tensors["model.other"] = tensors.pop("model.layers.1.self_attn.o_proj.weight")
    with pytest.raises(ValueError, match="the tensors do not fit the config") as info:
        params_from_hf(tensors, module.config)
    for part in (
        "missing: model.layers.1.self_attn.o_proj.weight (64, 64)",
        "unexpected: model.other (64, 64)",
        "wrong shape: model.norm.weight is (63,), the config asks for (64,)",
        "wrong dtype: lm_head.weight is int32, not one of",
    ):
        assert part in str(info.value)


def test_a_head_that_is_no_copy_of_a_tied_embedding_is_refused(tiny_model: tuple) -> None:
    module, params = tiny_model
    tied = dataclasses.replace(module.config, tie_embeddings=True)
    tensors = params_to_hf(params, module.config)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight is there and is not model\.embed_tokens"
    ):
        params_from_hf(tensors, tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert "lm_head" not in params_from_hf(tensors, tied)


def test_code_that_came_with_a_model_is_not_passed_on(tiny_model: tuple, tmp_path: Path) -> None:
    module, params = tiny_model
    mapping = json.loads(module.config.hf_config) | {"auto_map": {"AutoConfig": "evil.Config"}}
    save_pretrained(params, tmp_path, module.config, hf_config=mapping)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
