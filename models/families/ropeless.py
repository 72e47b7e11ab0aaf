"""Families some of whose layers have no rotary embedding: EXAONE 4, Command R7B, and others."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import BLOCK_NAMES, POST_NORM_NAMES, Family, renamed


def ropeless_layers(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Of SmolLM3 and Llama 4: `no_rope_layers` says 1 for a layer that has rotary embedding."""
    layers, has_rope = range(mapping["num_hidden_layers"]), mapping.get("no_rope_layers")
    if not has_rope:
        has_rope = [(layer + 1) % mapping["no_rope_layer_interval"] for layer in layers]
    return {"ropeless_layers": tuple(layer for layer in layers if not has_rope[layer])}


def _is_local(mapping: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % mapping["sliding_window_pattern"] != 0


def _full_layers(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Those without rotary embedding."""
    layers, kinds = range(mapping["num_hidden_layers"]), mapping.get("layer_types")
    is_full = [kinds[i] == "full_attention" if kinds else not _is_local(mapping, i) for i in layers]
    return {"ropeless_layers": tuple(i for i in layers if is_full[i])}


EXAONE4 = Family(
    model_type="exaone4",
    defaults={
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    fixed={"qk_norm": True, "has_pre_norm": False, "has_post_norm": True},
    # The small one has no windows, and rotary embedding in all layers.
    derive=lambda mapping: {} if mapping["sliding_window"] is None else _full_layers(mapping),
    is_local=_is_local,
    has_layer_types=True,
    block_names={**BLOCK_NAMES, **POST_NORM_NAMES},
)


def _command(mapping: Mapping[str, Any]) -> dict[str, Any]:
    if mapping.get("use_qk_norm"):
        raise ValueError("use_qk_norm true is not supported")
    return {"logits_divisor": 1 / mapping["logit_scale"]}


COHERE2 = dataclasses.replace(
    EXAONE4,
    model_type="cohere2",
    defaults={
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    normalize=lambda mapping: renamed(mapping, {"layer_norm_eps": "rms_norm_eps"}),
    fixed={"norm": "layer_plain", "is_parallel": True, "is_rope_interleaved": True},
    derive=lambda mapping: _command(mapping) | _full_layers(mapping),
    block_names=BLOCK_NAMES,
)

# Command R, whose layers are all alike.
COHERE = dataclasses.replace(
    COHERE2,
    model_type="cohere",
    defaults={
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
        "logit_scale": 0.0625,
    },
    derive=_command,
    is_local=lambda mapping, layer: False,
    has_layer_types=False,
)
