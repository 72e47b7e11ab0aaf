"""Experts in MXFP4, against transformers' reading of them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from folojax.models.files.checkpoint import load_params, open_checkpoint
from tests.families import save_family

EXPERTS = "model.layers.{}.mlp.experts.{}_proj"


def save_packed(directory: Path) -> dict[str, np.ndarray]:
    """A tiny gpt-oss with random blocks for experts; returns its tensors."""
    save_family("gpt-oss", directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    rng = np.random.default_rng(0)
    for layer in (0, 1):
        for kind in ("gate_up", "down"):
            name = EXPERTS.format(layer, kind)
            count, inputs, outputs = tensors.pop(name).shape
            shape = (count, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = rng.integers(0, 256, (*shape, 16), np.uint8)
            tensors[f"{name}_scales"] = rng.integers(118, 126, shape, np.uint8)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return tensors


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_are_those_of_transformers(dtype: Any, tmp_path: Path) -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = save_packed(tmp_path)
    params = load_params(open_checkpoint(tmp_path), dtype)
    for layer in (0, 1):
        for kind in ("gate_up", "down"):
            name = EXPERTS.format(layer, kind)
            packed = [torch.from_numpy(tensors[f"{name}_{part}"]) for part in ("blocks", "scales")]
            expected = convert_moe_packed_tensors(*packed, dtype=torch.float32).numpy()
            found = params[f"layers_{layer}"][f"experts_{kind}"]
            assert found.dtype == dtype
            np.testing.assert_array_equal(found.astype(jnp.float32), expected)


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = save_packed(tmp_path)
    name = EXPERTS.format(1, "down")
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:, :-1]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name}: its blocks and scales do not fit together"):
        load_params(open_checkpoint(tmp_path), jnp.float32)
