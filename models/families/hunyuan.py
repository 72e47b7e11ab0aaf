"""Hunyuan, dense: queries and keys are normed after they are turned."""

from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import BLOCK_NAMES, Family


def _stretched(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """`alpha` beside the type "dynamic" makes the rates slower at every length."""
    rope = mapping.get("rope_scaling") or mapping.get("rope_parameters") or {}
    alpha = rope.get("alpha")
    if not alpha or (rope.get("rope_type") or rope.get("type")) != "dynamic":
        return {}
    dim = mapping.get("head_dim") or mapping["hidden_size"] // mapping["num_attention_heads"]
    theta = rope.get("rope_theta") or mapping.get("rope_theta") or 10_000.0
    return {"rope_theta": theta * alpha ** (dim / (dim - 2))}


HUNYUAN = Family(
    model_type="hunyuan_v1_dense",
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    fixed={"qk_norm": True, "is_qk_norm_late": True},
    derive=_stretched,
    block_names={
        **BLOCK_NAMES,
        "q_norm": ("self_attn.query_layernorm.weight",),
        "k_norm": ("self_attn.key_layernorm.weight",),
    },
)
