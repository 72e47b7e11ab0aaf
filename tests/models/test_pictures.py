"""Models that read pictures, made by transformers: their text part, and what is left out."""

import json
import logging
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
import safetensors.numpy
import transformers

from folojax.models.files.checkpoint import open_checkpoint
from folojax.models.files.save import save_pretrained
from tests import dense, reference
from tests.families import FAMILIES, save_family

TOKENS = np.random.default_rng(0).integers(3, 100, 40).tolist()
TEXT = {key: value for key, value in reference.TINY.items() if key != "vocab_size"}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN_EYE = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}

# The name, the fields of the text model, those of what reads pictures.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {**FAMILIES["gemma3"][1], "model_type": "gemma3_text"},
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    ),
    "ministral3": (
        "Mistral3",
        {**FAMILIES["ministral3"][1], "model_type": "ministral3"},
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"rope_parameters": MROPE},
        {**QWEN_EYE, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {"rope_parameters": MROPE},
        {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 16},
        {
            **QWEN_EYE,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            **FAMILIES["qwen3.5"][1],
            "rope_parameters": {
                **MROPE,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        },
        {**QWEN_EYE, "out_hidden_size": 64, "num_position_embeddings": 16},
    ),
    "gemma4": (
        "Gemma4",
        {**FAMILIES["gemma4"][1], "model_type": "gemma4_text"},
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        FAMILIES["qwen3.5-moe"][1],
        {**QWEN_EYE, "out_hidden_size": 64, "num_position_embeddings": 16},
    ),
}


def save_model(case: str, directory: Path) -> Any:
    """Saves a tiny model as transformers does, and returns it."""
    import torch

    name, text, eye = MODELS[case]
    config = getattr(transformers, f"{name}Config")(
        text_config={"vocab_size": 128, **TEXT, **text},
        vision_config=eye,
        tie_word_embeddings=case in ("gemma3", "gemma4"),
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    reference.randomise(model)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case in ("gemma4", "qwen3_5_moe")))
        for case in MODELS
    ],
)
def test_the_text_part_is_that_of_transformers(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_model(case, tmp_path / "whole")
    expected = reference.logits(model, TOKENS)
    with caplog.at_level(logging.INFO, logger="folojax"):
        module, params = dense.load(tmp_path / "whole")
    assert "only the text model" in caplog.text
    np.testing.assert_allclose(dense.logits(module, params, TOKENS), expected, rtol=0, atol=1e-4)
    # What is saved is the text model alone, for transformers too.
    save_pretrained(params, tmp_path / "text", module.config)
    assert open_checkpoint(tmp_path / "text").config == module.config
    again = reference.logits(reference.load_model(tmp_path / "text"), TOKENS)
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-4)


def test_files_of_earlier_versions(tmp_path: Path) -> None:
    """Other names of tensors, and Qwen's settings of the text model beside the others."""
    expected = reference.logits(save_model("qwen2_5_vl", tmp_path), TOKENS)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    del text["model_type"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope"}}
    text["rope_scaling"]["mrope_section"] = rope["mrope_section"]
    (tmp_path / "config.json").write_text(json.dumps(text | config))
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    renamed = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("lm_head.", "language_model.lm_head.")
        .replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    safetensors.numpy.save_file(renamed, path)
    found = dense.logits(*dense.load(tmp_path), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "name", "kind", "prefix", "parts"),
    [
        (
            "gemma3n",
            "Gemma3nForConditionalGeneration",
            "gemma3n_text",
            "model.language_model.",
            ("vision_tower.timm_model", "audio_tower.conformer.0", "embed_vision", "embed_audio"),
        ),
        (
            "deepseek-v3",
            "KimiK25ForConditionalGeneration",
            "kimi_k2",
            "language_model.model.",
            ("vision_tower.encoder", "mm_projector.pre_norm"),
        ),
    ],
    ids=["gemma3n", "kimi-k2.5"],
)
def test_what_is_found_among_towers_by_its_name(
    case: str, name: str, kind: str, prefix: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    """What looks is a model of another library, or code that comes with the model."""
    save_family(case, tmp_path)
    module, params = dense.load(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text()) | {"model_type": kind}
    whole = {
        "architectures": [name],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": text,
        "vision_config": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(whole))
    path = tmp_path / "model.safetensors"
    inner = prefix.removesuffix("model.").removesuffix("model.language_model.")
    tensors = {
        prefix + one.removeprefix("model.") if one.startswith("model.") else inner + one: tensor
        for one, tensor in safetensors.numpy.load_file(path).items()
    }
    outer = "model." if prefix.startswith("model.") else ""
    tensors |= {f"{outer}{part}.norm.weight": np.ones(3, np.float32) for part in parts}
    safetensors.numpy.save_file(tensors, path)
    again, found = dense.load(tmp_path)
    assert again.config == module.config
    chex.assert_trees_all_equal(found, params)


def test_another_text_model_is_refused(tmp_path: Path) -> None:
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {"model_type": "mistral5"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="text model 'mistral5'; supported: mistral, mini"):
        open_checkpoint(tmp_path)
