"""From a Hugging Face `config.json` to a ModelConfig, whatever the family."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from folojax.models.config import ModelConfig
from folojax.models.family import Family, windows
from folojax.models.registry import family_of
from folojax.models.rope import LongRope, scaling_from_hf

# What the sizes are called there and here; without one of them there is no model.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_position",
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_FLOATS = frozenset(
    field.name for field in dataclasses.fields(ModelConfig) if str(field.type).startswith("float")
)
_LAYER_TYPES = ("full_attention", "sliding_attention")


def config_from_hf(mapping: Mapping[str, Any]) -> ModelConfig:
    """Reads the dict of a Hugging Face `config.json`.

    Both spellings of the rotary settings are read: `rope_parameters` (transformers 5) and
    `rope_theta` with `rope_scaling` (older files).

    Raises:
        ValueError: the architecture is not in the registry, a key is missing or malformed, or the
            model uses a feature that is not implemented; every such feature is named.
    """
    architecture, family = family_of(mapping.get("architectures"))
    try:
        return ModelConfig(architecture=architecture, **_fields(architecture, family, mapping))
    # A word where a number should be fails somewhere, in some way.
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"config.json of {architecture} is malformed: {error!r}") from error


def _fields(architecture: str, family: Family, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig."""
    mapping: dict[str, Any] = {**family.defaults, **family.normalize(stated)}
    missing = [key for key in (*_SIZES, "rms_norm_eps") if mapping.get(key) is None]
    if missing:
        raise ValueError(f"config.json of {architecture} lacks {', '.join(missing)}")
    no_sizes = [f"{key} is {mapping[key]!r}" for key in _SIZES if not _is_size(mapping[key])]
    if no_sizes:
        raise ValueError(f"{', '.join(no_sizes)}: sizes must be integers of at least 1")
    unsupported = _unsupported_features(mapping, family)
    if unsupported:
        raise ValueError(f"{architecture} with {'; '.join(unsupported)}")
    fields = {ours: mapping[theirs] for theirs, ours in _SIZES.items()}
    num_kv_heads = mapping.get("num_key_value_heads")
    has_bias = bool(mapping.get("attention_bias"))
    fields |= {
        "num_kv_heads": fields["num_heads"] if num_kv_heads is None else num_kv_heads,
        "head_dim": _head_dim(mapping),
        "rms_norm_eps": mapping["rms_norm_eps"],
        # transformers writes the key unless it is False.
        "tie_embeddings": bool(mapping.get("tie_word_embeddings", False)),
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "mlp_bias": bool(mapping.get("mlp_bias")),
        "qk_norm": False,
        "activation": _ACTIVATIONS[mapping.get("hidden_act", "silu")],
        "windows": _windows(mapping),
        "hf_config": json.dumps(dict(stated)),
    }
    fields |= _rope_fields(mapping, fields["head_dim"]) | family.fields(mapping)
    # "factor": 8 means 8.0; true means a mistake, and stays for ModelConfig to find.
    return {
        name: float(value) if name in _FLOATS and type(value) is int else value
        for name, value in fields.items()
    }


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _head_dim(mapping: Mapping[str, Any]) -> int:
    """The stated head_dim, else hidden size over heads."""
    stated = mapping.get("head_dim")
    if stated is not None:
        return stated
    hidden_size, num_heads = mapping["hidden_size"], mapping["num_attention_heads"]
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, "
            "and config.json states no head_dim"
        )
    return hidden_size // num_heads


def _windows(mapping: Mapping[str, Any]) -> tuple[int | None, ...]:
    """What `layer_types` says, where it is stated."""
    kinds = mapping.get("layer_types")
    if not kinds or "sliding_attention" not in kinds:
        return ()
    return windows(mapping, lambda layer: kinds[layer] == "sliding_attention")


def _unsupported_features(mapping: Mapping[str, Any], family: Family) -> list[str]:
    """What the config switches on that the decoder does not have, in words."""
    found = []
    activation = mapping.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        found.append(f"hidden_act {activation!r}: supported are {', '.join(_ACTIVATIONS)}")
    if mapping.get("rope_interleaved"):
        found.append("rope_interleaved true: only the half-rotation layout is supported")
    known = _LAYER_TYPES if family.has_layer_types else _LAYER_TYPES[:1]
    kinds = sorted(set(mapping.get("layer_types") or ()) - set(known))
    if kinds:
        found.append(f"layer_types {kinds}: supported here are {', '.join(known)}")
    partial = _partial_rotary(mapping)
    if partial != 1.0 and not family.has_partial_rotary:
        found.append(f"partial_rotary_factor {partial}: only 1.0 is supported")
    quantization = mapping.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", quantization)
        found.append(
            f"quantization_config ({method}): only unquantised safetensors and GGUF are supported"
        )
    return found


def _rope(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings from either generation of config, of full attention if by kind."""
    new = dict(mapping.get("rope_parameters") or {})
    if "full_attention" in new:
        new = dict(new["full_attention"] or {})
    rope = dict(mapping.get("rope_scaling") or {}) | new
    original = mapping.get("original_max_position_embeddings")
    return rope if original is None else rope | {"original_max_position_embeddings": original}


def _partial_rotary(mapping: Mapping[str, Any]) -> float:
    stated = _rope(mapping).get("partial_rotary_factor") or mapping.get("partial_rotary_factor")
    return 1.0 if stated is None else stated


def _rope_fields(mapping: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    rope = _rope(mapping)
    partial, max_position = _partial_rotary(mapping), mapping["max_position_embeddings"]
    scaling = scaling_from_hf(rope, max_position)
    if isinstance(scaling, LongRope):
        max_position = min(max_position, scaling.original_max_position_embeddings)
    return {
        "rope_theta": float(rope.get("rope_theta") or mapping.get("rope_theta") or 10_000.0),
        "rope_scaling": scaling,
        "rotary_dim": None if partial == 1.0 else int(head_dim * partial),
        "max_position": max_position,
    }
