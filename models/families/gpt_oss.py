"""gpt-oss: a sink beside the scores of every head, windows in turn, experts with biases."""

from folojax.models.families.family import BLOCK_NAMES, Family

GPT_OSS = Family(
    model_type="gpt_oss",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
        "rope_theta": 150_000.0,
    },
    fixed={"has_sinks": True, "has_expert_bias": True},
    keys={
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "intermediate_size": "expert_size",
        "swiglu_limit": "swiglu_limit",
        "swiglu_alpha": "swiglu_alpha",
    },
    is_local=lambda mapping, layer: layer % 2 == 0,
    has_layer_types=True,
    block_names={
        **BLOCK_NAMES,
        "sinks": ("self_attn.sinks",),
        "router": ("mlp.router.weight",),
        "experts_gate_up": ("mlp.experts.gate_up_proj",),
        "experts_gate_up_bias": ("mlp.experts.gate_up_proj_bias",),
        "experts_down": ("mlp.experts.down_proj",),
        "experts_down_bias": ("mlp.experts.down_proj_bias",),
    },
)
