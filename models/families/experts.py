"""Mixtures of experts beside which every token passes a shared one: Qwen 1.5 and 2, GLM-4.5."""

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
