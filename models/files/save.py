"""Parameters as transformers has them, in memory or in a directory: the way back from training."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.core.param_tree import check_fit, named_leaves, plain_tree
from folojax.models.files.hf_config import config_from_hf
from folojax.models.files.hf_names import parameter_sources
from folojax.models.files.safetensors_files import INDEX_FILE, SHARD_BYTES, ShardWriter
from folojax.models.files.save_quantized import quantization_config, quantized_tensors
from folojax.models.quantized.quantize import is_quantized, quantization_of

# What is no longer true of weights that were changed here, or names code that is not there.
_DROPPED = (
    *("auto_map", "compression_config", "quantization_config"),
    *("torch_dtype", "transformers_version"),
)


def params_to_hf(params: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """Copies of the parameters in Hugging Face's names and layout, as `params_from_hf` takes them.

    Args:
        params: The parameters of `build_module(config, ...)`; they keep their dtype.
        config: Of the module.

    Raises:
        ValueError: parameters are missing, unknown or misshapen, or quantised.
    """
    params = _checked(params, config)
    if quantization_of(params):
        raise ValueError(
            "params have quantised kernels: take the parameters that they were made from, or "
            "save_pretrained"
        )
    return {name: np.array(view, order="C") for name, view in _tensors(params, config)}


def _tensors(params: Any, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor; parameters leave the device one by one."""
    leaves = named_leaves(params, is_quantized)
    for parameter, source in named_leaves(parameter_sources(config)).items():
        leaf = leaves[parameter]
        if is_quantized(leaf):
            yield from quantized_tensors(parameter.rpartition("/")[2], leaf, source)
        else:
            yield from source.views(np.asarray(leaf))


def _checked(params: Any, config: ModelConfig) -> Any:
    """The parameters in plain dicts; raises one ValueError with all that does not fit."""
    params = plain_tree(params)

    def shape_of(leaf: Any) -> str:
        return str(list(leaf.shape if is_quantized(leaf) else np.shape(leaf)))

    check_fit(parameter_sources(config), params, shape_of)
    return params


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
        params: The parameters of `build_module(config, ...)`; they keep their dtype. Kernels in few
            bits are saved in these, in the form of compressed-tensors, as far as it has them.
        path: A directory; made if it is not there.
        config: Of the module.
        hf_config: The dict of config.json; None: that of the checkpoint the config came from.
        generation_config: The dict of generation_config.json, if there shall be one.
        tokenizer: A tokenizer of transformers to put beside the weights.
        shard_bytes: Most of a file, unless a single tensor is larger.

    Raises:
        ValueError: parameters are missing, unknown or misshapen (all are named), or the config is
            none that config.json says.
    """
    params = _checked(params, config)
    mapping = _mapping(config, hf_config)
    mapping["dtype"] = str(params["final_norm"].dtype)
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target) as name:
        part = Path(name)
        writer = ShardWriter(part, shard_bytes)
        for tensor_name, view in _tensors(params, config):
            writer.add(tensor_name, view)
        writer.close()
        quantized = quantization_config(writer.shapes, writer.float8)
        if quantized is not None:
            mapping["quantization_config"] = quantized
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
