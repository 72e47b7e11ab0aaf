"""Adapters of peft's that are refused: broken, hostile, of other kinds, for other models."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from folojax.models.files.checkpoint import open_checkpoint
from folojax.models.files.peft_adapter import CONFIG_FILE, WEIGHTS_FILE, read_peft_adapter
from tests.lora_adapters import save_adapter
from tests.reference import load_model

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapter(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    return save_adapter(load_model(tiny_directory), directory, seed=0).directory


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / WEIGHTS_FILE
        found = load_file(path)
        change(found)
        save_file(found, path)

    return apply


def put(name: str, value: Any) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({name: value}))


def rename(old: str, new: str) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({new: found.pop(old)}))


def pickled(directory: Path) -> None:
    (directory / WEIGHTS_FILE).unlink()
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04.")


def linked_out(directory: Path) -> None:
    outside = directory.parent / "outside.safetensors"
    os.replace(directory / WEIGHTS_FILE, outside)
    (directory / WEIGHTS_FILE).symlink_to(outside)


def truncated(directory: Path) -> None:
    path = directory / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])


F32 = np.float32
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a of another width": (
        put(f"{Q}.lora_A.weight", np.zeros((4, 32), F32)),
        r"q_proj.lora_A.weight is \[4, 32\]; rank 4 and the model's layer need \[4, 64\]",
    ),
    "b of another model": (
        put(f"{Q}.lora_B.weight", np.zeros((128, 4), F32)),
        r"q_proj.lora_B.weight is \[128, 4\]; .* need \[64, 4\]",
    ),
    "a transposed": (
        put(f"{Q}.lora_A.weight", np.zeros((64, 4), F32)),
        r"q_proj.lora_A.weight is \[64, 4\]",
    ),
    "another rank than stated": (config(r=8), r"rank 8 and the model's layer need \[8, 64\]"),
    "rank above the engine's": (
        config(rank_pattern={"q_proj": 64}),
        r"layers.0.self_attn.q_proj has rank 64; it must be from 1 to max_lora_rank, 16",
    ),
    "no rank": (config(r=0), "r is 0; it must be a number above 0"),
    "alpha is text": (config(lora_alpha="16"), "lora_alpha is '16'; it must be a number"),
    "half a pair": (
        tensors(lambda found: found.pop(f"{Q}.lora_B.weight")),
        "model.layers.0.self_attn.q_proj has no lora_B",
    ),
    "a layer too many": (
        rename(f"{Q}.lora_A.weight", f"{Q.replace('.0.', '.7.')}.lora_A.weight"),
        "layers.7.self_attn.q_proj.lora_A.weight is unknown: the model has layers 0 to 1",
    ),
    "a module of another base": (
        rename(f"{Q}.lora_A.weight", "base_model.model.transformer.h.0.c_attn.lora_A.weight"),
        "c_attn.lora_A.weight is unknown: it is no low-rank update of a linear layer of the model",
    ),
    "an embedding": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", np.zeros((4, 128), F32)),
        "lora_embedding_A is unknown: updates of embeddings and output projections are not here",
    ),
    "experts": (
        put("base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight", np.zeros(3)),
        "updates of experts and routers are not here",
    ),
    "not finite": (
        put(f"{Q}.lora_A.weight", np.full((4, 64), np.nan, F32)),
        "numbers that are not finite in layers_0/qkv",
    ),
    "integers": (
        put(f"{Q}.lora_A.weight", np.zeros((4, 64), np.int32)),
        "q_proj.lora_A.weight is I32; it must be one of F64, F32, F16, BF16",
    ),
    "empty": (tensors(lambda found: found.clear()), "it holds no tensor"),
    "DoRA": (config(use_dora=True), "use_dora is True, DoRA scales whole rows.*merge_and_unload"),
    "whole modules": (config(modules_to_save=["lm_head"]), "whole modules are replaced"),
    "biases": (config(bias="all"), "bias is 'all', biases are changed"),
    "another method": (config(peft_type="IA3"), "peft_type is 'IA3'; only LORA is known"),
    "a changed base": (config(init_lora_weights="pissa"), "'pissa', which changes the base's"),
    "an expensive pattern": (
        config(rank_pattern={"(a+)+$": 4}),
        r"rank_pattern has '\(a\+\)\+\$': names of modules and simple regular expressions",
    ),
    "a pickle": (pickled, "only adapter_model.bin: pickled weights can run code"),
    "a link out": (linked_out, "is a link that leaves the directory"),
    "truncated": (truncated, "truncated or no safetensors file"),
    "no JSON": (lambda d: (d / CONFIG_FILE).write_text("{"), "is not valid JSON"),
    "a list": (lambda d: (d / CONFIG_FILE).write_text("[]"), "holds a list, not an object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused_with_the_difference_named(
    case: str, copied: Path, tiny_directory: Path
) -> None:
    change, told = BROKEN[case]
    change(copied)
    with pytest.raises(ValueError, match=told):
        read_peft_adapter(copied, open_checkpoint(tiny_directory).config, 16)


def test_absent_files_are_named(copied: Path, tiny_directory: Path, tmp_path: Path) -> None:
    config = open_checkpoint(tiny_directory).config
    (copied / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        read_peft_adapter(copied, config, 16)
    (copied / CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        read_peft_adapter(copied, config, 16)
    with pytest.raises(FileNotFoundError, match="is no directory"):
        read_peft_adapter(tmp_path / "nowhere", config, 16)


def test_patterns_and_scales_are_those_of_peft(copied: Path, tiny_directory: Path) -> None:
    config(
        alpha_pattern={r"layers\.1\..*q_proj": 6, "self_attn.q_proj": 3, "down_proj": 12},
        use_rslora=True,
    )(copied)
    found = read_peft_adapter(copied, open_checkpoint(tiny_directory).config, 16)
    scales = [[part and part.scale for part in found[f"layers_{layer}"]["qkv"]] for layer in (0, 1)]
    assert scales == [[1.5, 4.0, 4.0], [3.0, 4.0, 4.0]]
    assert [part and part.scale for part in found["layers_0"]["down"]] == [6.0]
