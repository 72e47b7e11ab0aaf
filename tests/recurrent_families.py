"""Cases of `tests.families` with layers that keep a state."""

from typing import Any

_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 32,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_SPACE = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 24,
}

RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": (
        "Qwen3Next",
        {
            **_HYBRID,
            "num_experts": 8,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3.5": ("Qwen3_5", {**_HYBRID, "linear_num_value_heads": 2, "linear_value_head_dim": 24}),
    "qwen3.5-moe": (
        "Qwen3_5Moe",
        {
            **_HYBRID,
            "linear_value_head_dim": 24,
            "num_experts": 8,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_experts_per_tok": 2,
        },
    ),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        {
            **_SPACE,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
            "shared_intermediate_size": 40,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "granite-hybrid-dense": (
        "GraniteMoeHybrid",
        {
            **_SPACE,
            "mamba_n_groups": 1,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "position_embedding_type": "rope",
            "mamba_proj_bias": True,
            "time_step_limit": [0.2, 1.0],
        },
    ),
    "lfm2": (
        "Lfm2",
        {
            "layer_types": ["conv", "full_attention"],
            "conv_bias": True,
            "block_multiple_of": 40,
        },
    ),
    "lfm2-moe": (
        "Lfm2Moe",
        {
            "layer_types": ["conv", "full_attention", "conv"],
            "num_hidden_layers": 3,
            "num_dense_layers": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 1.5,
        },
    ),
    "falcon-h1": (
        "FalconH1",
        {
            **_SPACE,
            "mamba_d_ssm": 128,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 4.0,
            "mlp_multipliers": [0.7, 1.3],
            "key_multiplier": 0.6,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.8,
            "ssm_multipliers": [0.9, 1.2, 0.7, 1.4, 0.8],
            "ssm_in_multiplier": 1.1,
            "ssm_out_multiplier": 0.6,
        },
    ),
    "falcon-h1-normed": (
        "FalconH1",
        {
            **_SPACE,
            "mamba_d_ssm": 128,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "mlp_multipliers": [0.7, 1.3],
        },
    ),
    "bamba": ("Bamba", {**_SPACE, "attn_layer_indices": [1]}),
    "nemotron-h": (
        "NemotronH",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 12,
            "ssm_state_size": 16,
            "n_groups": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "routed_scaling_factor": 1.5,
        },
    ),
    "nemotron-h-latent": (
        "NemotronH",
        {
            "layers_block_type": ["linear_attention", "full_attention", "moe"],
            "head_dim": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 12,
            "ssm_state_size": 16,
            "n_groups": 2,
            "time_step_min": 0.5,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_latent_size": 32,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
        },
    ),
}
"""As `tests.families.FAMILIES`."""
