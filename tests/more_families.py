"""Cases of `tests.families` that are made of what others have."""

from typing import Any

_LOCAL_THEN_FULL = ["sliding_attention", "full_attention"]
_EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 4}
_GRANITE = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "seed-oss": ("SeedOss", {"head_dim": 24, "attention_out_bias": True}),
    "ernie4.5": ("Ernie4_5", {"head_dim": 24, "use_bias": True}),
    "ernie4.5-moe": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "moe_layer_end_index": 1,
        },
    ),
    "arcee": ("Arcee", {"mlp_bias": True, "attention_bias": True}),
    "apertus": ("Apertus", {}),
    "nemotron": ("Nemotron", {"norm_eps": 1e-5}),
    "cwm": ("Cwm", {"head_dim": 16, "sliding_window": 12, "layer_types": _LOCAL_THEN_FULL}),
    "dots1": (
        "Dots1",
        {
            **_EXPERTS,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "moe_intermediate_size": 24,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "sliding_window": 12,
            "layer_types": _LOCAL_THEN_FULL,
        },
    ),
    "minimax-m2": (
        "MiniMaxM2",
        {
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
            "rotary_dim": 8,
        },
    ),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "granite-moe": ("GraniteMoe", _GRANITE),
    "granite-moe-shared": ("GraniteMoeShared", {**_GRANITE, "shared_intermediate_size": 40}),
    "mistral4": (
        "Mistral4",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": 40,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 24,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "olmoe": ("Olmoe", {**_EXPERTS, "num_experts": 8, "intermediate_size": 24}),
}
"""As `tests.families.FAMILIES`."""
