"""Mixtures of experts of few further words: Qwen 1.5 and 2, GLM-4.5, dots.llm1, and others."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import BLOCK_NAMES, Family, renamed


def dense_layers(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Of Qwen: all that a list names or a step leaves out."""
    stated, step = set(mapping.get("mlp_only_layers") or ()), mapping["decoder_sparse_step"]
    layers = range(mapping["num_hidden_layers"])
    return {"dense_layers": tuple(i for i in layers if i in stated or (i + 1) % step)}


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    defaults={
        "sliding_window": 4096,
        "max_window_layers": 28,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "qkv_bias": True,
    },
    normalize=lambda mapping: renamed(mapping, {"num_local_experts": "num_experts"}),
    fixed={"o_bias": False, "has_shared_gate": True},
    keys={
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "moe_intermediate_size": "expert_size",
        "shared_expert_intermediate_size": "shared_expert_size",
        "norm_topk_prob": "is_expert_weight_normed",
        "qkv_bias": "qkv_bias",
    },
    derive=dense_layers,
    is_local=lambda mapping, layer: layer % 2 == 0 and layer < mapping["max_window_layers"],
    has_window_switch=True,
    has_layer_types=True,
    block_names={
        **BLOCK_NAMES,
        "shared_gate_up": (
            "mlp.shared_expert.gate_proj.weight",
            "mlp.shared_expert.up_proj.weight",
        ),
        "shared_down": ("mlp.shared_expert.down_proj.weight",),
        "shared_gate": ("mlp.shared_expert_gate.weight",),
    },
)


def shared_and_dense(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Of GLM and DeepSeek: the shared experts are one that is wider; the first layers are dense."""
    first_sparse = min(mapping["first_k_dense_replace"], mapping["num_hidden_layers"])
    return {
        "shared_expert_size": mapping["moe_intermediate_size"] * mapping["n_shared_experts"],
        "dense_layers": tuple(range(first_sparse)),
    }


SIGMOID_KEYS = {
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "moe_intermediate_size": "expert_size",
    "norm_topk_prob": "is_expert_weight_normed",
    "routed_scaling_factor": "expert_scale",
    "n_group": "num_expert_groups",
    "topk_group": "num_groups_per_token",
}
"""In the config.json of DeepSeek V3 and of those that route like it."""

SHARED_NAMES = {
    "router_correction": ("mlp.gate.e_score_correction_bias",),
    "shared_gate_up": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "shared_down": ("mlp.shared_experts.down_proj.weight",),
}

GLM4_MOE = Family(
    model_type="glm4_moe",
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": False,
    },
    normalize=lambda mapping: renamed(mapping, {"num_local_experts": "n_routed_experts"}),
    fixed={"o_bias": False, "router": "sigmoid"},
    keys={**SIGMOID_KEYS, "use_qk_norm": "qk_norm"},
    derive=shared_and_dense,
    has_partial_rotary=True,
    block_names={**BLOCK_NAMES, **SHARED_NAMES},
    # Layers that guess a second token.
    ignorable=r"model\.layers\.(46|92)\..*",
)

DOTS1 = dataclasses.replace(
    GLM4_MOE,
    model_type="dots1",
    defaults={
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
        "sliding_window": 4096,
        "max_window_layers": 62,
    },
    fixed={"router": "sigmoid", "qk_norm": True},
    keys=SIGMOID_KEYS,
    is_local=lambda mapping, layer: layer >= mapping["max_window_layers"],
    has_layer_types=True,
    has_partial_rotary=False,
    ignorable=Family.ignorable,
)


def _minimax_words(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """How much of a head turns is a number of dimensions."""
    words = renamed(mapping, {"num_experts": "num_local_experts"})
    turning = words.pop("rotary_dim", None)
    if turning is not None:
        words.setdefault("partial_rotary_factor", turning / words.get("head_dim", 128))
    return words


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
    },
    normalize=_minimax_words,
    fixed={
        "router": "sigmoid",
        "qk_norm": True,
        "is_qk_norm_joint": True,
        "qkv_bias": False,
        "o_bias": False,
    },
    keys={
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "intermediate_size": "expert_size",
    },
    has_partial_rotary=True,
    block_names={
        **BLOCK_NAMES,
        "router": ("block_sparse_moe.gate.weight",),
        "router_correction": ("block_sparse_moe.e_score_correction_bias",),
        "experts_gate_up": (
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
        ),
        "experts_down": ("block_sparse_moe.experts.{}.w2.weight",),
    },
    # Layers that guess further tokens.
    ignorable=r"model\.(mtp|layers\.62)\..*",
)


def _unclipped(mapping: Mapping[str, Any]) -> dict[str, Any]:
    if mapping.get("clip_qkv") is not None:
        raise ValueError(f"clip_qkv {mapping['clip_qkv']}: not supported, as no OLMoE has it")
    return {}


OLMOE = Family(
    model_type="olmoe",
    defaults={
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    normalize=lambda mapping: renamed(mapping, {"num_local_experts": "num_experts"}),
    fixed={"qk_norm": True, "is_qk_norm_joint": True},
    keys={
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "intermediate_size": "expert_size",
        "norm_topk_prob": "is_expert_weight_normed",
    },
    derive=_unclipped,
)


def _ernie(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have experts is a range and a step."""
    if mapping["use_bias"]:
        raise ValueError("use_bias true: not supported beside experts")
    first, last = mapping["moe_layer_start_index"], mapping["moe_layer_end_index"]
    count, step = mapping["num_hidden_layers"], mapping["moe_layer_interval"]
    last = count - 1 if last == -1 else last
    dense = [i for i in range(count) if not first <= i <= last or (i + 1) % step]
    return {
        "dense_layers": tuple(dense),
        "shared_expert_size": mapping["moe_intermediate_size"] * mapping["moe_num_shared_experts"],
    }


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    },
    normalize=lambda mapping: renamed(
        mapping, {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
    ),
    fixed={"router": "softmax_corrected", "is_rope_interleaved": True},
    keys={
        "moe_num_experts": "num_experts",
        "moe_k": "num_experts_per_token",
        "moe_intermediate_size": "expert_size",
    },
    derive=_ernie,
    block_names={
        **BLOCK_NAMES,
        **SHARED_NAMES,
        "router_correction": ("mlp.moe_statics.e_score_correction_bias",),
    },
    vectors={"router_correction": lambda shape: (1, *shape)},
    ignorable=r"model\.mtp_.*",  # layers that guess a second token
)
