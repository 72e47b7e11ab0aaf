"""From a Hugging Face `config.json` to a ModelConfig, whatever the family."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from folojax.models.core.config import ModelConfig
from folojax.models.core.rope import read_scaling
from folojax.models.families.families import FAMILIES, family_of
from folojax.models.families.family import Family
from folojax.models.families.pictures import text_config
from folojax.models.files.quantized_config import quantized_format

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
    "relu2": "relu2",
    "xielu": "xielu",
}
_FULL, _LOCAL = _LAYER_TYPES = ("full_attention", "sliding_attention")

_LOG = logging.getLogger("folojax")


def config_from_hf(mapping: Mapping[str, Any]) -> ModelConfig:
    """Reads the dict of a Hugging Face `config.json`; of a model with pictures, its text part.

    Both spellings of the rotary settings are read: `rope_parameters` (transformers 5) and
    `rope_theta` with `rope_scaling` (older files). Where a file has both, `rope_scaling` counts,
    as in transformers. What else contradicts itself is refused, unless transformers reads it.

    Raises:
        ValueError: the architecture is not supported, a key is missing or malformed, the file
            contradicts itself, or the model uses a feature that is not implemented; every such
            feature is named.
    """
    mapping = text_config(mapping)
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
    contradictions = _contradictions(architecture, mapping, family)
    if contradictions:
        raise ValueError(f"config.json contradicts itself: {'; '.join(contradictions)}")
    has_bias = bool(mapping.get("attention_bias"))
    num_kv_heads = mapping.get("num_key_value_heads")
    head_dim = _head_dim(mapping)
    fields = {ours: mapping[theirs] for theirs, ours in _SIZES.items()}
    derived = family.derive(mapping)
    fields |= {
        "num_kv_heads": fields["num_heads"] if num_kv_heads is None else num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": mapping["rms_norm_eps"],
        # transformers writes the key unless it is False.
        "tie_embeddings": bool(mapping.get("tie_word_embeddings", False)),
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "mlp_bias": bool(mapping.get("mlp_bias")),
        "qk_norm": False,
        "activation": _ACTIVATIONS[mapping.get("hidden_act", "silu")],
        "windows": _windows(mapping, family),
        "hf_config": json.dumps(dict(stated)),
        **_rope_fields(mapping, family, derived.get("full_head_dim") or head_dim),
        **{ours: mapping.get(theirs) for theirs, ours in family.keys.items()},
        **family.fixed,
        **derived,
    }
    # "factor": 8 means 8.0; true means a mistake, and stays for ModelConfig to find.
    for field in dataclasses.fields(ModelConfig):
        if field.type in (float, float | None) and type(fields.get(field.name)) is int:
            fields[field.name] = float(fields[field.name])
    return fields


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


def _unsupported_features(mapping: Mapping[str, Any], family: Family) -> list[str]:
    """What the config switches on that the decoder does not have, in words."""
    found = []
    activation = mapping.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        found.append(f"hidden_act {activation!r}: supported are {', '.join(_ACTIVATIONS)}")
    if mapping.get("rope_interleaved"):
        found.append("rope_interleaved true: only the half-rotation layout is supported")
    known = _LAYER_TYPES if family.has_layer_types else (_FULL,)
    known = known if family.recurrent_type is None else (*known, family.recurrent_type)
    kinds = sorted(set(mapping.get("layer_types") or ()) - set(known))
    if kinds:
        found.append(f"layer_types {kinds}: supported here are {', '.join(known)}")
    partial = _partial_rotary(mapping)
    if partial != 1.0 and not family.has_partial_rotary:
        found.append(f"partial_rotary_factor {partial}: only 1.0 is supported")
    try:
        is_quantized = quantized_format(mapping) is not None
    except ValueError as error:
        found.append(str(error))
    else:
        if is_quantized and family.is_kernel_in_out:
            found.append("quantised kernels [in, out]: not supported, use the unquantised version")
    if mapping.get("per_layer_config"):
        found.append("per_layer_config: layers that differ in size are not supported")
    return found


def _contradictions(architecture: str, mapping: Mapping[str, Any], family: Family) -> list[str]:
    """Pairs of entries that cannot both be meant, of which transformers would drop one or fail."""
    found = []
    model_type = mapping.get("model_type")
    for other, its_family in FAMILIES.items():
        if other != architecture and model_type == its_family.model_type:
            found.append(
                f"architectures is {architecture} and model_type {model_type!r}, which is {other}: "
                "correct the one that is wrong"
            )
    kinds = mapping.get("layer_types") or ()
    is_read = family.has_layer_types or family.recurrent_type is not None
    if is_read and kinds and len(kinds) != mapping["num_hidden_layers"]:
        found.append(
            f"layer_types has {len(kinds)} entries for num_hidden_layers "
            f"{mapping['num_hidden_layers']}"
        )
    stated = mapping.get("rope_parameters") or {}
    by_kind = {kind: stated[kind] for kind in _LAYER_TYPES if kind in stated}
    others = ", ".join(sorted(stated.keys() - by_kind.keys()))
    if by_kind and others:
        found.append(
            f"rope_parameters has settings by kind of layer ({', '.join(by_kind)}) beside "
            f"{others}: put these into the kinds"
        )
    elif by_kind and not family.has_rope_by_kind:
        if len({json.dumps(rope, sort_keys=True) for rope in by_kind.values()}) > 1:
            found.append(
                "rope_parameters has different settings for full_attention and sliding_attention; "
                "this architecture has the same for all layers"
            )
    elif others and family.has_rope_by_kind:
        found.append(
            f"rope_parameters has {others} for all layers; this architecture needs full_attention "
            "and sliding_attention in it"
        )
    return found


def _windows(mapping: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """By layer, `sliding_window` where the layer has one; () where no layer has."""
    window = mapping.get("sliding_window")
    if family.has_window_switch and not mapping.get("use_sliding_window"):
        window = None
    kinds = (mapping.get("layer_types") or ()) if family.has_layer_types else ()
    if window is None and _LOCAL in kinds:
        raise ValueError(
            "config.json contradicts itself: layer_types has sliding_attention, but sliding_window "
            f"is {mapping.get('sliding_window')} and use_sliding_window "
            f"{mapping.get('use_sliding_window', 'not stated')}: give such layers a window, or "
            "call them full_attention"
        )
    if window is None:
        return ()
    layers = range(mapping["num_hidden_layers"])
    is_local = [kinds[i] == _LOCAL if kinds else family.is_local(mapping, i) for i in layers]
    return tuple(window if one else None for one in is_local) if any(is_local) else ()


def _rope(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings from either generation of config, of full attention if by kind."""
    new, old = dict(mapping.get("rope_parameters") or {}), dict(mapping.get("rope_scaling") or {})
    if any(kind in new for kind in _LAYER_TYPES):
        return dict(new.get(_FULL) or {}) | old
    rope = old or new
    original = mapping.get("original_max_position_embeddings")
    return rope if original is None else rope | {"original_max_position_embeddings": original}


def _partial_rotary(mapping: Mapping[str, Any]) -> float:
    rope = _rope(mapping)
    if rope.get("rope_type") == "proportional":
        return 1.0  # what turns is said by the rates
    stated = rope.get("partial_rotary_factor") or mapping.get("partial_rotary_factor")
    return 1.0 if stated is None else stated


def _rope_fields(mapping: Mapping[str, Any], family: Family, head_dim: int) -> dict[str, Any]:
    rope, max_position = _rope(mapping), mapping["max_position_embeddings"]
    theta = float(rope.get("rope_theta") or mapping.get("rope_theta") or 10_000.0)
    stated = mapping.get("rope_parameters") or {}
    lost = stated.get("rope_theta")
    if mapping.get("rope_scaling") and lost not in (None, theta):
        _LOG.warning(
            "config.json has rope_scaling beside rope_parameters. The first counts, as in "
            "transformers, and has no rope_theta: it is %g, and not the %g of rope_parameters. "
            "Put the scaling into rope_parameters, beside rope_theta",
            theta,
            lost,
        )
    partial = _partial_rotary(mapping)
    rotary_dim = None if partial == 1.0 else int(head_dim * partial)
    scaling = read_scaling(rope, rotary_dim or head_dim, theta, max_position)
    if scaling is not None and scaling.kind in ("longrope", "su"):
        original = rope.get("original_max_position_embeddings") or max_position
        max_position = min(max_position, original)
    fields = {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_dim": rotary_dim,
        "max_position": max_position,
    }
    if family.has_rope_by_kind:
        local = stated.get(_LOCAL) or {}
        if (local.get("rope_type") or "default") != "default":
            raise ValueError(f"rope type {local['rope_type']!r} of local layers: only 'default' is")
        theta = local.get("rope_theta") or mapping["rope_local_base_freq"]
        fields["local_rope_theta"] = theta
    return fields
