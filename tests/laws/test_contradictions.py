"""Checkpoints that contradict themselves: decided as transformers decides, or refused by name."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from folojax.models.families.families import FAMILIES
from folojax.models.files.checkpoint import load_params, open_checkpoint
from folojax.models.files.hf_config import config_from_hf
from folojax.models.files.save import save_pretrained
from folojax.text.tokenizer_files import load_tokenizer
from tests import dense
from tests.families import FAMILIES as TINY_FAMILIES
from tests.families import save_family
from tests.models.test_config import LLAMA, keys_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
TOKENS = np.arange(40) * 7 % 120 + 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models of families, each written once."""
    root = tmp_path_factory.mktemp("families")

    def save(name: str) -> Path:
        if not (root / name).is_dir():
            save_family(name, root / name)
        return root / name

    return save


def changed(directory: Path, target: Path, **keys: Any) -> Path:
    """A copy with other entries in its config.json."""
    shutil.copytree(directory, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return target


def our_logits(directory: Path) -> np.ndarray:
    return dense.logits(*dense.load(directory), TOKENS.tolist())


def their_logits(directory: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor(TOKENS[None])).logits[0].numpy()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("qwen2", {"rope_scaling": YARN}),
        ("qwen2", {"rope_scaling": YARN, "rope_theta": 500.0}),
        ("qwen2-rope-yarn", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama-rope-linear", {"rope_scaling": YARN}),
        ("granite", {"rope_scaling": YARN}),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("olmo3", {"rope_scaling": YARN}),
        ("smollm3", {"rope_scaling": YARN | {"rope_theta": 77.0}}),
    ],
)
def test_rope_scaling_beside_rope_parameters_counts_as_in_transformers(
    saved: Callable[[str], Path], tmp_path: Path, name: str, keys: dict[str, Any]
) -> None:
    """As in sglang 26187: a scaling that was added to a newer file is not dropped."""
    directory = changed(saved(name), tmp_path / "model", **keys)
    ours = our_logits(directory)
    np.testing.assert_allclose(ours, their_logits(directory), atol=2e-4)
    assert np.abs(ours - our_logits(saved(name))).max() > 1e-3, "the scaling changes something"


def test_a_scaling_takes_the_base_with_it(caplog: pytest.LogCaptureFixture) -> None:
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    with caplog.at_level(logging.WARNING, "folojax"):
        config = config_from_hf(LLAMA | new | {"rope_scaling": YARN})
    assert config.rope_scaling is not None
    assert config.rope_scaling.kind == "yarn"
    assert config.rope_theta == 10_000.0
    assert "10000, and not the 1e+06 of rope_parameters" in caplog.text
    caplog.clear()
    config = config_from_hf(LLAMA | new | {"rope_scaling": YARN | {"rope_theta": 1e6}})
    assert config.rope_theta == 1e6
    config = config_from_hf(LLAMA | new | {"rope_scaling": YARN, "rope_theta": 1e6})
    assert config.rope_theta == 1e6
    assert not caplog.text
    assert config_from_hf(LLAMA | new | {"rope_scaling": None}).rope_scaling is None
    linear = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}
    config = config_from_hf(LLAMA | linear | {"rope_theta": 7.0})
    assert config.rope_scaling is not None
    assert (config.rope_theta, config.rope_scaling.kind) == (5.0, "linear")


@pytest.mark.parametrize("name", ["llama", "qwen2-rope-yarn", "gemma2", "gpt2"])
def test_a_head_of_its_own_is_used_whatever_the_config_says(
    saved: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in vllm 51665 and transformers 42612: tie_word_embeddings with a different lm_head."""
    directory = changed(saved(name), tmp_path / "model", tie_word_embeddings=True)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    embed = next(n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight")))
    head = np.flip(tensors[embed], axis=0) * 0.5
    save_file(tensors | {"lm_head.weight": np.ascontiguousarray(head)}, file, {"format": "pt"})
    with caplog.at_level(logging.WARNING, "folojax"):
        checkpoint = open_checkpoint(directory)
    assert not checkpoint.config.tie_embeddings
    assert f"lm_head.weight is there and is not {embed}" in caplog.text
    np.testing.assert_allclose(our_logits(directory), their_logits(directory), atol=2e-4)
    again = tmp_path / "again"
    params = load_params(checkpoint, jnp.float32)
    save_pretrained(params, again, checkpoint.config)
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(our_logits(again), our_logits(directory))


def test_a_copy_of_the_embedding_is_no_head(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """As in vllm 3344 and 6758."""
    directory = changed(saved("qwen2-rope-yarn"), tmp_path / "model")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    embed = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embed.copy()}, file, {"format": "pt"})
    assert open_checkpoint(directory).config.tie_embeddings
    np.testing.assert_array_equal(our_logits(directory), our_logits(saved("qwen2-rope-yarn")))
    save_file(tensors | {"lm_head.weight": embed[:-1].copy()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"wrong shape: lm_head\.weight"):
        load_params(open_checkpoint(directory), jnp.float32)


BY_KIND = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("Llama", {"model_type": "qwen2"}, "LlamaForCausalLM and model_type 'qwen2'"),
        ("Qwen3", {"model_type": "gemma2"}, "which is Gemma2ForCausalLM"),
        ("Qwen2", WINDOW, "use_sliding_window not stated|sliding_window is 4096"),
        ("Qwen3", WINDOW | {"use_sliding_window": False}, "use_sliding_window False"),
        ("Gemma2", WINDOW | {"sliding_window": None}, "sliding_window is None"),
        ("Olmo3", WINDOW | {"sliding_window": None}, "sliding_window is None"),
        ("Gemma3", {"layer_types": ["full_attention"]}, "1 entries for num_hidden_layers 2"),
        ("SmolLM3", {"layer_types": ["full_attention"] * 3}, "3 entries for num_hidden_layers 2"),
        ("Llama", {"rope_parameters": BY_KIND}, "different settings for full_attention and"),
        ("Gemma3", {"rope_parameters": {"rope_theta": 5.0}}, "needs full_attention and"),
        ("Olmo3", {"rope_parameters": BY_KIND | {"rope_theta": 5.0}}, "by kind .* beside rope_th"),
        (
            "Qwen3Moe",
            {"num_experts": 8, "num_local_experts": 4},
            "num_local_experts is 4 and num_e",
        ),
        ("GPT2", {"n_embd": 32}, "n_embd is 32 and hidden_size is 64"),
        ("GPT2", {"n_layer": 3}, "n_layer is 3 and num_hidden_layers is 2"),
        ("Llama", {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
    ],
)
def test_other_contradictions_are_refused_by_name(
    architecture: str, keys: dict[str, Any], message: str
) -> None:
    name = "GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
    with pytest.raises(ValueError, match=message):
        config_from_hf(LLAMA | {"architectures": [name]} | keys)


def test_every_family_has_its_model_type() -> None:
    assert len({family.model_type for family in FAMILIES.values()}) == len(FAMILIES)
    for architecture, family in FAMILIES.items():
        keys = keys_of(architecture) | {"model_type": family.model_type}
        assert config_from_hf(LLAMA | keys).architecture == architecture


def test_what_transformers_writes_of_every_family_does_not_contradict_itself(
    saved: Callable[[str], Path],
) -> None:
    for name in TINY_FAMILIES:
        open_checkpoint(saved(name))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"quantization_config \(gptq\): it has no 'group_size'",
        ),
        ({"quantization_config": "fp8"}, r"\(fp8\): it does not say how the weights are stored"),
        ({"quantization_config": ["awq"]}, r"quantization_config \(\['awq'\]\)"),
        ({"quantization_config": {"quant_method": None, "bits": 4}}, "quantization_config"),
        (
            {"compression_config": {"quant_method": "compressed-tensors"}},
            r"\(compressed-tensors\): it has no 'config_groups'",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
    ],
)
def test_a_quantised_checkpoint_is_told_what_to_do(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        config_from_hf(LLAMA | keys)
    assert "unquantised version" in str(info.value)
    assert "GGUF" in str(info.value)
    assert "malformed" not in str(info.value)


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("no network"),
        huggingface_hub.errors.HFValidationError("Repo id must be in the form 'repo_name'"),
        OSError("disk"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("name", ["models/llma", "out/checkpoint-100", "org/no-such-model"])
def test_a_mistyped_path_is_no_matter_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, error: Exception
) -> None:
    """As in vllm 13724 and 14518: what does not exist is called by both of its names."""

    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as info:
        open_checkpoint(name)
    assert f"no folder '{name}' in {os.getcwd()}" in str(info.value)
    assert f"no repository '{name}' on the Hugging Face Hub could be read" in str(info.value)
    with pytest.raises(FileNotFoundError, match="at revision 'v1'"):
        open_checkpoint(name, revision="v1")


def test_a_mistyped_path_of_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder") as info:
        load_tokenizer(tmp_path / "no" / "such")
    assert str(tmp_path / "no" / "such") in str(info.value)
