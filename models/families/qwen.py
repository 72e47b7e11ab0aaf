"""Qwen 2 and 2.5 (biases of queries, keys and values), Qwen 3 (their norms) and its experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from folojax.models.core.family import Family, renamed, windows


def _windows(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The layers from `max_window_layers` on, if windows are used at all."""
    if not mapping.get("use_sliding_window") or mapping.get("sliding_window") is None:
        return {"windows": ()}
    if mapping.get("layer_types"):
        return {}
    return {"windows": windows(mapping, lambda layer: layer >= mapping["max_window_layers"])}


def _qwen2(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return _windows(mapping) | {"qkv_bias": True, "o_bias": False}


def _qwen3(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return _windows(mapping) | {"qk_norm": True}


def _moe_words(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """Transformers 5 writes another word for the number of experts than it reads."""
    return renamed(mapping, {"num_local_experts": "num_experts"})


def _qwen3_moe(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """All layers have the window here, and those experts that no list or step leaves out."""
    has_window = mapping.get("use_sliding_window") and mapping.get("sliding_window") is not None
    dense = set(mapping.get("mlp_only_layers") or ())
    step = mapping["decoder_sparse_step"]
    layers = range(mapping["num_hidden_layers"])
    return {
        "windows": windows(mapping, lambda layer: True) if has_window else (),
        "qk_norm": True,
        "num_experts": mapping["num_experts"],
        "num_experts_per_token": mapping["num_experts_per_tok"],
        "expert_size": mapping["moe_intermediate_size"],
        "is_expert_weight_normed": mapping["norm_topk_prob"],
        "dense_layers": tuple(i for i in layers if i in dense or (i + 1) % step),
    }


_WINDOWS = {"sliding_window": 4096, "max_window_layers": 28}

QWEN2 = Family(defaults=_WINDOWS, fields=_qwen2, has_layer_types=True)

QWEN3 = Family(defaults=_WINDOWS | {"head_dim": 128}, fields=_qwen3, has_layer_types=True)

QWEN3_MOE = Family(
    defaults={
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    normalize=_moe_words,
    fields=_qwen3_moe,
)
