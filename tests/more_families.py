"""Cases of `tests.families` that are made of what others have."""

from typing import Any

_LOCAL_THEN_FULL = ["sliding_attention", "full_attention"]
_EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 4}

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
    "olmoe": ("Olmoe", {**_EXPERTS, "num_experts": 8, "intermediate_size": 24}),
}
"""As `tests.families.FAMILIES`."""
