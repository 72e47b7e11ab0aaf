"""Qwen3-Next and Qwen3.5: three layers of the gated delta rule, then one with gated attention."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from folojax.models.core.recurrent import Recurrent
from folojax.models.families.experts import QWEN2_MOE, dense_layers
from folojax.models.families.family import BLOCK_NAMES, Family, renamed

_RECURRENT = "linear_attention"


def _recurrent(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers keep a state, by `layer_types` or a step, and the sizes of it."""
    layers = range(mapping["num_hidden_layers"])
    step = mapping["full_attention_interval"]
    kinds = mapping.get("layer_types") or [_RECURRENT if (i + 1) % step else "" for i in layers]
    found = tuple(layer for layer in layers if kinds[layer] == _RECURRENT)
    if not found:
        return {}
    sizes = Recurrent(
        layers=found,
        num_key_heads=mapping["linear_num_key_heads"],
        num_value_heads=mapping["linear_num_value_heads"],
        key_dim=mapping["linear_key_head_dim"],
        value_dim=mapping["linear_value_head_dim"],
        conv_width=mapping["linear_conv_kernel_dim"],
        is_by_key_head=mapping["model_type"] == "qwen3_next",
    )
    return {"recurrent": sizes}


_DEFAULTS = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}

_NAMES = {
    **BLOCK_NAMES,
    "in_proj": ("linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight"),
    "ba_proj": ("linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight"),
    "conv": ("linear_attn.conv1d.weight",),
    "a_log": ("linear_attn.A_log",),
    "dt_bias": ("linear_attn.dt_bias",),
    "state_norm": ("linear_attn.norm.weight",),
    "out_proj": ("linear_attn.out_proj.weight",),
}

QWEN3_5 = Family(
    model_type="qwen3_5_text",
    defaults={**_DEFAULTS, "model_type": "qwen3_5_text", "num_key_value_heads": 4},
    fixed={"norm": "rms_offset", "qk_norm": True, "has_attention_gate": True},
    derive=_recurrent,
    recurrent_type=_RECURRENT,
    has_partial_rotary=True,
    block_names=_NAMES,
    ignorable=r"(model\.)?mtp\..*",  # layers that guess a second token
)

_SHARED = {name: QWEN2_MOE.block_names[name] for name in QWEN2_MOE.block_names if "shared" in name}

_MOE_KEYS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "moe_intermediate_size": "expert_size",
    "shared_expert_intermediate_size": "shared_expert_size",
}

QWEN3_5_MOE = dataclasses.replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    defaults={
        **_DEFAULTS,
        "model_type": "qwen3_5_moe_text",
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    normalize=lambda mapping: {
        "intermediate_size": mapping.get("moe_intermediate_size", 512),  # of no layer
        **renamed(mapping, {"num_local_experts": "num_experts"}),
    },
    fixed={**QWEN3_5.fixed, "has_shared_gate": True},
    keys=_MOE_KEYS,
    block_names={**_NAMES, **_SHARED},
)

QWEN3_NEXT = dataclasses.replace(
    QWEN3_5_MOE,
    model_type="qwen3_next",
    defaults={
        **QWEN3_5_MOE.defaults,
        "model_type": "qwen3_next",
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    normalize=lambda mapping: renamed(mapping, {"num_local_experts": "num_experts"}),
    keys={**_MOE_KEYS, "norm_topk_prob": "is_expert_weight_normed"},
    derive=lambda mapping: _recurrent(mapping) | dense_layers(mapping),
    block_names={
        **_NAMES,
        **_SHARED,
        "in_proj": ("linear_attn.in_proj_qkvz.weight",),
        "ba_proj": ("linear_attn.in_proj_ba.weight",),
    },
)
