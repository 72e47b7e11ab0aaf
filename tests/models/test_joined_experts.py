"""Checkpoints that have the kernels of all experts in one tensor."""

import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
import safetensors.numpy

from folojax import params_from_hf
from folojax.models.files.checkpoint import load_params, open_checkpoint
from tests.families import save_family


@pytest.mark.parametrize("case", ["qwen3.5-moe", "qwen3-moe-mixed"])
def test_joined_experts_are_those_of_their_parts(case: str, tmp_path: Path) -> None:
    """In files and in memory; what does not fit is named as the parts are."""
    model = save_family(case, tmp_path / "parts")
    expected = load_params(tmp_path / "parts")
    joined = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in joined)
    config = open_checkpoint(tmp_path / "parts").config
    chex.assert_trees_all_equal(params_from_hf(joined, config), expected)
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copy(tmp_path / "parts" / "config.json", whole)
    safetensors.numpy.save_file(joined, whole / "model.safetensors")
    chex.assert_trees_all_equal(load_params(whole), expected)
    name = "model.layers.1.mlp.experts.down_proj"
    joined[name] = np.zeros((*joined[name].shape[:2], 23), np.float32)
    with pytest.raises(
        ValueError, match=r"wrong shape: .*experts\.0\.down_proj\.weight is \(64, 23\)"
    ):
        params_from_hf(joined, config)
