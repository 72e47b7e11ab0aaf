"""Adapters of low rank as peft saves them: adapter_config.json and adapter_model.safetensors."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from folojax.models.core.adapted import ADAPTED
from folojax.models.core.config import ModelConfig
from folojax.models.core.low_rank import Adapter, LowRank, rank_problems, split_outputs
from folojax.models.core.param_tree import listed
from folojax.models.files.hf_names import parameter_sources
from folojax.models.files.safetensors_files import DTYPES, StoredTensor, read_header
from folojax.models.files.untrusted_files import pickle_files, read_json, resolve_inside

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_MERGE = "merge it with peft (merge_and_unload) and load the merged model"

_OTHERS = {
    "use_dora": "DoRA scales whole rows of the merged kernel",
    "modules_to_save": "whole modules are replaced",
    "lora_bias": "updates have biases",
    "trainable_token_indices": "rows of the embedding are replaced",
    "alora_invocation_tokens": "it is on behind some tokens only",
    "use_qalora": "QA-LoRA pools inputs",
    "layer_replication": "layers are repeated",
    "target_parameters": "parameters that are no linear layers are changed",
    "arrow_config": "several adapters are routed",
    "monteclora_config": "updates are sampled",
    "velora_config": "VeLoRA is another product",
    "kasa_config": "KaSA is another product",
    "use_bdlora": "updates are block-diagonal",
}
"""Fields of adapter_config.json that change what is computed, and how."""

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that take something out of the base's own weights."""

# A quantified group may take a regular expression exponential time.
_SAFE_PATTERN = re.compile(r"(?:\\[.dw]|[\w.^$|\-,\[\]*+?]|\((?:\?:)?|\)(?![*+?{]))*")
_MOST_PATTERNS, _MOST_PATTERN_LEN, _MOST_REPEATS = 4096, 256, 4


class _Place(NamedTuple):
    """Where the linear layer of a checkpoint's tensor is in the parameter tree."""

    layer: str
    kernel: str
    part: int
    num_parts: int
    sides: tuple[int, int]  # [out, in]


def read_peft_adapter(path: str | os.PathLike[str], config: ModelConfig, max_rank: int) -> Adapter:
    """Reads an adapter of peft's for a model.

    Args:
        path: A directory.
        config: Of the model.
        max_rank: Highest rank of an update.

    Raises:
        FileNotFoundError: it or one of its files is absent.
        ValueError: the adapter is of another kind, broken or hostile, or made for another model;
            what differs is named.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"lora_path {os.fspath(path)!r} is no directory: an adapter is a local directory with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE} (huggingface_hub.snapshot_download fetches one)"
        )
    stated = read_json(directory, CONFIG_FILE)
    told = f"the adapter in {directory}"
    if problems := _config_problems(stated):
        raise ValueError(f"{told} is refused: {listed(problems)}")
    return _assemble(_tensors(directory), stated, config, max_rank, told)


def _config_problems(stated: Mapping[str, Any]) -> list[str]:
    """What an adapter's own config asks for that is not here, or says of no adapter."""
    kind = stated.get("peft_type")
    if kind != "LORA":
        return [f"peft_type is {kind!r}; only LORA is known here: {_MERGE}"]
    problems = [
        f"{name} is {stated[name]!r:.80}, {why}: {_MERGE}"
        for name, why in _OTHERS.items()
        if stated.get(name)
    ]
    if stated.get("bias", "none") != "none":
        problems.append(f"bias is {stated['bias']!r:.80}, biases are changed: {_MERGE}")
    start = str(stated.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGED_BASE):
        problems.append(
            f"init_lora_weights is {start!r:.80}, which changes the base's weights: save it with "
            "peft's path_initial_model_for_weight_conversion"
        )
    for name in ("r", "lora_alpha"):
        if not _is_size(stated.get(name)):
            problems.append(f"{name} is {stated.get(name)!r:.80}; it must be a number above 0")
    for name in ("rank_pattern", "alpha_pattern"):
        problems += _pattern_problems(name, stated.get(name) or {})
    return problems


def _pattern_problems(name: str, patterns: Any) -> list[str]:
    if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
        return [f"{name} must be an object of at most {_MOST_PATTERNS} numbers by name"]
    wrong = [
        f"{name} of {key!r:.80} is {value!r:.80}; it must be a number above 0"
        for key, value in patterns.items()
        if not _is_size(value)
    ]
    for key in patterns:
        num_repeats = sum(key.count(sign) for sign in "*+?")
        is_safe = len(key) <= _MOST_PATTERN_LEN and num_repeats <= _MOST_REPEATS
        try:
            re.compile(key)
        except (re.error, OverflowError):
            is_safe = False
        if not is_safe or not _SAFE_PATTERN.fullmatch(key):
            wrong.append(
                f"{name} has {key!r:.80}: names of modules and simple regular expressions are "
                "read, without repeated groups"
            )
    return wrong


def _is_size(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def _tensors(directory: Path) -> dict[str, StoredTensor]:
    path = resolve_inside(directory, WEIGHTS_FILE)
    if path.is_file():
        return {tensor.name: tensor for tensor in read_header(path)}
    if pickles := pickle_files(directory):
        raise ValueError(
            f"{directory} has only {', '.join(pickles)}: pickled weights can run code when "
            "they are opened and are never read; peft's save_pretrained writes safetensors"
        )
    raise FileNotFoundError(f"{directory} has no {WEIGHTS_FILE}")


def _assemble(
    tensors: Mapping[str, StoredTensor],
    stated: Mapping[str, Any],
    config: ModelConfig,
    max_rank: int,
    told: str,
) -> Adapter:
    """Finds a place for each tensor, then reads them."""
    places, problems = _places(config), []
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in sorted(tensors.items()):
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", name)
        place = places.get(found[1]) if found else None
        if found is None or place is None:
            problems.append(f"{name} is unknown: {_unknown(name, config)}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{name} is {tensor.dtype}; it must be one of {', '.join(DTYPES)}")
        else:
            pairs.setdefault(found[1], {})[found[2]] = tensor
    scales = {}
    for module, pair in pairs.items():
        if missing := {"A", "B"} - pair.keys():
            problems.append(f"{module} has no lora_{missing.pop()}")
            continue
        rank = _stated(stated, "rank_pattern", module, "r")
        alpha = _stated(stated, "alpha_pattern", module, "lora_alpha")
        scales[module] = alpha / (math.sqrt(rank) if stated.get("use_rslora") else rank)
        width_out, width_in = places[module].sides
        wanted = {"A": (rank, width_in), "B": (width_out, rank)}
        problems += rank_problems(module, rank, max_rank) or [
            f"{tensor.name} is {list(tensor.shape)}; rank {rank} and the model's layer need "
            f"{list(wanted[side])}"
            for side, tensor in pair.items()
            if tensor.shape != wanted[side]
        ]
    if not problems and not pairs:
        problems.append("it holds no tensor")
    if problems:
        raise ValueError(f"{told} does not fit the model: {listed(problems)}")
    found_parts: dict[str, dict[str, list[LowRank | None]]] = {}
    for module, pair in pairs.items():
        place = places[module]
        one = LowRank(_read(pair["A"]), _read(pair["B"]), scales[module])
        block = found_parts.setdefault(place.layer, {})
        if place.num_parts == 1:
            block[place.kernel] = list(split_outputs(place.kernel, config, one))
        else:
            block.setdefault(place.kernel, [None] * place.num_parts)[place.part] = one
    wrong = [
        f"{layer}/{name}"
        for layer, block in found_parts.items()
        for name, parts in block.items()
        if not all(np.isfinite(x).all() for one in parts if one for x in one[:2])
    ]
    if wrong:
        raise ValueError(f"{told} has numbers that are not finite in {listed(wrong, ', ')}")
    return {
        layer: {name: tuple(parts) for name, parts in block.items()}
        for layer, block in found_parts.items()
    }


def _places(config: ModelConfig) -> dict[str, _Place]:
    """By the names of a checkpoint's modules, the linear layers that may have updates."""
    places = {}
    for layer, block in parameter_sources(config).items():
        for kernel, source in block.items() if isinstance(block, dict) else ():
            if kernel not in ADAPTED:
                continue
            for part, (name, shape) in enumerate(source.tensors):
                sides = shape[::-1] if source.is_transposed else shape
                place = _Place(layer, kernel, part, len(source.tensors), sides)
                places[name.removesuffix(".weight")] = place
    return places


def _unknown(name: str, config: ModelConfig) -> str:
    """Why a tensor has no place."""
    if "embedding" in name or "embed" in name or "lm_head" in name:
        return "updates of embeddings and output projections are not here"
    if ".experts" in name or name.endswith((".mlp.gate", ".router")):
        return "updates of experts and routers are not here"
    layers = [int(number) for number in re.findall(r"\.(\d{1,9})\.", name)]
    if layers and layers[0] >= config.num_layers:
        return f"the model has layers 0 to {config.num_layers - 1}"
    return "it is no low-rank update of a linear layer of the model"


def _stated(stated: Mapping[str, Any], patterns: str, module: str, usual: str) -> Any:
    """The number of a module's pattern, or of all modules; as peft finds it."""
    given: Mapping[str, Any] = stated.get(patterns) or {}
    keys: Iterable[str] = given
    found = next((key for key in keys if re.match(rf"(.*\.)?({key})$", module)), None)
    value = stated[usual] if found is None else given[found]
    return int(value) if usual == "r" else value


def _read(tensor: StoredTensor) -> np.ndarray:
    return tensor.read().astype(np.float32)
