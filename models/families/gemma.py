"""Gemma 2 and the text part of Gemma 3: norms on both sides, local and global layers, soft-caps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from folojax.models.core.family import (
    BLOCK_NAMES,
    POST_NORM_NAMES,
    Family,
    local_rope_theta,
    windows,
)

# hidden_act was always overruled: the first files stated it wrongly.
_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
}


def _normalize(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**mapping, "hidden_act": mapping.get("hidden_activation") or "gelu_pytorch_tanh"}


def _fields(mapping: Mapping[str, Any], pattern: int) -> dict[str, Any]:
    """What both have; every `pattern`-th layer is global."""
    if mapping.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention true: only causal attention is supported")
    fields: dict[str, Any] = {
        "norm": "rms_offset",
        "has_post_norm": True,
        "embed_scale": math.sqrt(mapping["hidden_size"]),
        "attention_scale": mapping["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": mapping.get("attn_logit_softcapping"),
        "logits_softcap": mapping.get("final_logit_softcapping"),
    }
    if not mapping.get("layer_types"):
        fields["windows"] = windows(mapping, lambda layer: (layer + 1) % pattern != 0)
    return fields


def _gemma2(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return _fields(mapping, pattern=2)


def _gemma3(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Local layers turn at a rate of their own, unscaled."""
    theta = local_rope_theta(mapping, mapping["rope_local_base_freq"])
    fields = _fields(mapping, mapping["sliding_window_pattern"])
    # transformers has the field but no code for it.
    return fields | {"qk_norm": True, "local_rope_theta": theta, "attention_softcap": None}


_NAMES = {**BLOCK_NAMES, **POST_NORM_NAMES}

GEMMA2 = Family(
    defaults=_DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    normalize=_normalize,
    fields=_gemma2,
    has_layer_types=True,
    block_names=_NAMES,
)

GEMMA3 = Family(
    defaults=_DEFAULTS
    | {
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
    normalize=_normalize,
    fields=_gemma3,
    has_layer_types=True,
    has_rope_by_kind=True,
    block_names=_NAMES,
)
