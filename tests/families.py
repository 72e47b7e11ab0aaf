"""A tiny random model of every family, made by transformers: two layers, windows that matter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.more_families import MORE
from tests.recurrent_families import RECURRENT
from tests.reference import TINY, randomise

PROMPT_LEN = 64

# Frequencies of which some are scaled, some kept and some on the ramp, at this tiny length.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.5],
    "long_factor": [1.0, 1.3, 2.0, 4.0, 8.0, 16.0],
}
_LOCAL_THEN_FULL = ["sliding_attention", "full_attention"]
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 12,
    "layer_types": _LOCAL_THEN_FULL * 2,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
_EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 4}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-wide-heads": (
        "Llama",
        {"num_key_value_heads": 4, "head_dim": 24, "tie_word_embeddings": True},
    ),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-rope-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "llama-rope-dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "llama4": (
        "Llama4",
        {
            "head_dim": 16,
            "intermediate_size": 24,
            "intermediate_size_mlp": 96,
            "num_hidden_layers": 3,
            "moe_layers": [0, 2],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": 24,
            "floor_scale": 16,
            "attn_scale": 0.5,
        },
    ),
    "qwen2-rope-yarn": ("Qwen2", {"rope_parameters": _YARN, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 12}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 12, **_EXPERTS}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "moe_intermediate_size": 24,
            "head_dim": 32,
            "norm_topk_prob": True,
            **_EXPERTS,
        },
    ),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {"num_experts": 8, "moe_intermediate_size": 24, "mlp_only_layers": [0], **_EXPERTS},
    ),
    "gemma": ("Gemma", {"head_dim": 24}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 24,
            "sliding_window": 12,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 24,
            "sliding_window": 12,
            "query_pre_attn_scalar": 20,
            "layer_types": _LOCAL_THEN_FULL,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3n": (
        "Gemma3n",
        {
            "head_dim": 16,
            "sliding_window": 12,
            "layer_types": _LOCAL_THEN_FULL * 2,
            "num_hidden_layers": 4,
            "intermediate_size": [96, 96, 64, 96],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 120,
            "altup_num_inputs": 3,
            "laurel_rank": 12,
            "activation_sparsity_pattern": [0.8, 0.5, 0.0, 0.0],
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            **_GEMMA4,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma4-moe": (
        "Gemma4",
        {
            **_GEMMA4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "layer_types": _LOCAL_THEN_FULL,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 20}),
    "phi3-longrope": (
        "Phi3",
        {
            "rope_parameters": {**_LONGROPE, "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 128,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 12,
            "layer_types": _LOCAL_THEN_FULL,
            "rope_parameters": {
                "full_attention": {**_YARN, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "gpt2": ("GPT2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "glm": ("Glm", {"head_dim": 24}),
    "glm4": ("Glm4", {"head_dim": 16, "num_key_value_heads": 1}),
    "glm4-moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "head_dim": 16,
            "attention_bias": True,
            **_EXPERTS,
        },
    ),
    "glm4-moe-lite": (
        "Glm4MoeLite",
        {
            **{key: value for key, value in _LATENT.items() if key != "first_k_dense_replace"},
            "num_experts_per_tok": 2,
            "v_head_dim": 24,
            "mlp_layer_types": ["sparse", "dense"],
        },
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            **_EXPERTS,
        },
    ),
    "ministral": (
        "Ministral",
        {"head_dim": 16, "sliding_window": 12, "layer_types": _LOCAL_THEN_FULL},
    ),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {
                **_YARN,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "exaone4": ("Exaone4", {"sliding_window": 12, "layer_types": _LOCAL_THEN_FULL}),
    "exaone4-full": (
        "Exaone4",
        {"sliding_window": None, "layer_types": ["full_attention", "full_attention"]},
    ),
    "cohere2": (
        "Cohere2",
        {"sliding_window": 12, "layer_types": _LOCAL_THEN_FULL, "logit_scale": 0.5},
    ),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 12,
            "swiglu_limit": 1.0,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
    "deepseek-v2": ("DeepseekV2", {**_LATENT, "q_lora_rank": None, "num_experts_per_tok": 2}),
    "deepseek-v2-groups": (
        "DeepseekV2",
        {
            **_LATENT,
            "num_experts_per_tok": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **_LATENT,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "hunyuan": (
        "HunYuanDenseV1",
        {
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "alpha": 8.0,
                "factor": 1.0,
            },
        },
    ),
    **MORE,
    **RECURRENT,
}
"""Transformers' name of the family, and fields of its config."""

_CLASSES = {
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "Gemma3n": ("Gemma3nTextConfig", "Gemma3nForCausalLM"),
    "Gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "Llama4": ("Llama4TextConfig", "Llama4ForCausalLM"),
    "Qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "Qwen3_5Moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
}
_GPT2 = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_of(case: str, transformers: Any, changes: Mapping[str, Any] | None = None) -> Any:
    """The dict of a case's config.json."""
    name, overrides = FAMILIES[case]
    config_name, model_name = _CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    fields = (_GPT2 if name == "GPT2" else TINY) | overrides | dict(changes or {})
    config = getattr(transformers, config_name)(**fields)
    return config.to_dict() | {"architectures": [model_name]}


def save_family(
    case: str, directory: Path, changes: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """Makes the model of a case, saves it as safetensors, and returns it in float32.

    Args:
        case: A key of `FAMILIES`.
        directory: Where it goes.
        changes: Of the config.
        options: Of save_pretrained.
    """
    import torch
    import transformers

    name, overrides = FAMILIES[case]
    config_name, model_name = _CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    fields = (_GPT2 if name == "GPT2" else TINY) | overrides | dict(changes or {})
    config = getattr(transformers, config_name)(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).eval()
    randomise(model)
    model.save_pretrained(directory, **options)
    return model
