"""Writing parameters as a directory that transformers loads: the way back from training."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.files.hf_config import config_from_hf
from folojax.models.files.hf_names import parameter_sources
from folojax.models.files.safetensors_files import INDEX_FILE, SHARD_BYTES, ShardWriter
from folojax.models.quantized.quantize import quantization_of

# What is no longer true of weights that were changed here, or names code that is not there.
_DROPPED = ("auto_map", "quantization_config", "torch_dtype", "transformers_version")


def save_pretrained(
    params: Any,
    path: str | os.PathLike[str],
    config: ModelConfig,
    *,
    hf_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer: Any | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors, in the names and layout of transformers.

    Parameters leave the device one by one. What the directory held of another model's weights is
    replaced once all is written.

    Args:
        params: The parameters of `build_module(config, ...)`; they keep their dtype.
        path: A directory; made if it is not there.
        config: Of the module.
        hf_config: The dict of config.json; None: that of the checkpoint the config came from.
        generation_config: The dict of generation_config.json, if there shall be one.
        tokenizer: A tokenizer of transformers to put beside the weights.
        shard_bytes: Most of a file, unless a single tensor is larger.

    Raises:
        ValueError: parameters are missing, unknown or misshapen (all are named), or quantised,
            or the config is none that config.json says.
    """
    if quantization_of(params):
        raise ValueError(
            "params have quantised kernels, for which transformers has no format: save the "
            "parameters that they were made from"
        )
    mapping = _mapping(config, hf_config)
    sources = parameter_sources(config)
    _check(params, sources)
    mapping["dtype"] = str(params["embed"].dtype)
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target) as name:
        part = Path(name)
        writer = ShardWriter(part, shard_bytes)
        leaves = _flat(params)
        for parameter, source in _flat(sources).items():
            for tensor_name, view in source.views(np.asarray(leaves[parameter])):
                writer.add(tensor_name, view)
        writer.close()
        (part / "config.json").write_text(json.dumps(mapping, indent=2) + "\n", encoding="utf-8")
        if generation_config:
            text = json.dumps(dict(generation_config), indent=2) + "\n"
            (part / "generation_config.json").write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        for old in (*target.glob("*.safetensors"), target / INDEX_FILE):
            old.unlink(missing_ok=True)
        for file in part.iterdir():
            shutil.move(file, target / file.name)


def _mapping(config: ModelConfig, hf_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config.json to write, checked to say what the config says."""
    if hf_config is None and not config.hf_config:
        raise ValueError(
            "the model's config was not read from a config.json: pass hf_config=, the dict of one"
        )
    mapping = dict(json.loads(config.hf_config) if hf_config is None else hf_config)
    if config_from_hf(mapping) != config:
        raise ValueError(
            "the model's config is not what its config.json says (was it changed?): pass "
            "hf_config=, the dict of one that does"
        )
    return {name: value for name, value in mapping.items() if name not in _DROPPED}


def _check(params: Any, sources: dict[str, Any]) -> None:
    """Raises one ValueError with all that does not fit."""
    wanted = {name: source.shape for name, source in _flat(sources).items()}
    found = {name: np.shape(leaf) for name, leaf in _flat(params).items()}
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    problems += [
        f"{name} is {found[name]}, the config asks for {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError("params do not fit the model: " + "; ".join(problems))


def _flat(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
