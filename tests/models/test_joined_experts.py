"""Checkpoints that have the kernels of all experts in one tensor."""

import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
import safetensors.numpy

from folojax import params_from_hf
from folojax.models.files.checkpoint import load_params, open_checkpoint
from folojax.models.files.joined_experts import join_pieces, piece_name
from folojax.models.files.safetensors_files import HeldTensor
from tests.families import save_family


def test_parts_that_make_no_whole_are_told() -> None:
    """Of an expert that lacks one, of one too many, of other rows."""
    wanted = {"all": (2, 6, 4)}
    held = {
        piece_name("all", expert, part): HeldTensor("", np.full((3, 4), 2 * expert + part))
        for expert in range(2)
        for part in range(2)
    }
    (whole,) = join_pieces(held, wanted, True).values()
    target = np.zeros((2, 6, 4))
    whole.read_into(target)
    assert target[:, ::3, 0].tolist() == [[0, 1], [2, 3]]
    turned = np.zeros((2, 4, 6))
    join_pieces(held, {"all": (2, 4, 6)}, False)["all"].read_into(turned)
    np.testing.assert_array_equal(turned.swapaxes(1, 2), target)
    for change in (
        {piece_name("all", 1, 1): HeldTensor("", np.zeros((2, 4)))},
        {piece_name("all", 2, 0): HeldTensor("", np.zeros((6, 4)))},
        {piece_name("all", 0, 0): HeldTensor("", np.zeros((3, 5)))},
    ):
        with pytest.raises(ValueError, match=r"the parts of all do not make \(2, 6, 4\)"):
            join_pieces(held | change, wanted, True)


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
