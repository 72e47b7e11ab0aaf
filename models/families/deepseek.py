"""DeepSeek V2 and V3, GLM-4.7-Flash, Mistral 4: keys and values come from a latent that is kept."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from folojax.models.families.experts import SHARED_NAMES, SIGMOID_KEYS, shared_and_dense
from folojax.models.families.family import BLOCK_NAMES, Family, renamed
from folojax.models.families.mistral import query_growth


def _normalize(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """`head_dim` is what turns of a head, here as in transformers: rotary settings are of that."""
    words = renamed(mapping, {"num_local_experts": "n_routed_experts"})
    return words | {"head_dim": words.get("qk_rope_head_dim", 64)}


def _latent(mapping: Mapping[str, Any]) -> dict[str, Any]:
    turning = mapping["qk_rope_head_dim"]
    head_dim = mapping["qk_nope_head_dim"] + turning
    rope = mapping.get("rope_scaling") or mapping.get("rope_parameters") or {}
    all_dim, factor = rope.get("mscale_all_dim"), rope.get("factor") or 1.0
    growth = 0.1 * all_dim * math.log(factor) + 1 if all_dim and factor > 1 else 1.0
    return {
        "num_kv_heads": 1,
        "head_dim": head_dim,
        "rotary_dim": turning,
        "attention_scale": head_dim**-0.5 * growth**2,
        "query_rank": mapping["q_lora_rank"] or 0,
        **shared_and_dense(mapping),
    }


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    defaults={
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "rope_interleave": True,
    },
    normalize=_normalize,
    fixed={"router": "sigmoid"},
    keys={
        **SIGMOID_KEYS,
        "kv_lora_rank": "kv_rank",
        "v_head_dim": "value_dim",
        "rope_interleave": "is_rope_interleaved",
    },
    derive=_latent,
    block_names={
        **BLOCK_NAMES,
        **SHARED_NAMES,
        "q": ("self_attn.q_proj.weight",),
        "q_a": ("self_attn.q_a_proj.weight",),
        "q_a_norm": ("self_attn.q_a_layernorm.weight",),
        "q_b": ("self_attn.q_b_proj.weight",),
        "kv_a": ("self_attn.kv_a_proj_with_mqa.weight",),
        "kv_a_norm": ("self_attn.kv_a_layernorm.weight",),
        "kv_b": ("self_attn.kv_b_proj.weight",),
    },
    ignorable=r"model\.layers\.61\..*|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)


def _second(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Groups by their best expert, where there are any; weights are not normed."""
    method = mapping["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method {method!r} is not supported")
    is_grouped = method != "greedy"
    return {
        **_latent(mapping),
        "num_expert_groups": mapping["n_group"] if is_grouped else 1,
        "num_groups_per_token": mapping["topk_group"] if is_grouped else 1,
        "num_best_of_group": 1,
        "is_expert_weight_normed": False,
    }


DEEPSEEK_V2 = dataclasses.replace(
    DEEPSEEK_V3,
    model_type="deepseek_v2",
    defaults={
        **DEEPSEEK_V3.defaults,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
        "topk_method": "greedy",
    },
    fixed={"is_rope_interleaved": True},
    derive=_second,
)


def _by_kind(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Layers with a dense MLP are named, and not counted."""
    kinds, count = mapping.get("mlp_layer_types"), mapping["num_hidden_layers"]
    kinds = kinds or ["dense"] + ["sparse"] * (count - 1)
    if len(kinds) != count or set(kinds) - {"dense", "sparse"}:
        raise ValueError(f"mlp_layer_types must be {count} of 'dense' and 'sparse': {kinds}")
    dense = tuple(layer for layer in range(count) if kinds[layer] == "dense")
    return {**_latent(mapping), "dense_layers": dense}


# GLM-4.7-Flash.
GLM4_MOE_LITE = dataclasses.replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    defaults={
        **DEEPSEEK_V3.defaults,
        "rms_norm_eps": 1e-5,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
    },
    derive=_by_kind,
    ignorable=r"model\.layers\.47\..*",
)


def _of_what_turns(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Its `partial_rotary_factor` is of heads, and rotary settings here are of what turns."""
    words = _normalize(mapping)
    rope = dict(words.get("rope_parameters") or {})
    rope.pop("partial_rotary_factor", None)
    return words | ({"rope_parameters": rope} if rope else {})


MISTRAL4 = dataclasses.replace(
    DEEPSEEK_V3,
    model_type="mistral4",
    defaults={
        **DEEPSEEK_V3.defaults,
        "num_experts_per_tok": 4,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 256,
        "q_lora_rank": 1024,
        "qk_nope_head_dim": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    normalize=_of_what_turns,
    fixed={},
    derive=lambda mapping: _latent(mapping) | query_growth(mapping),
    block_names={
        **DEEPSEEK_V3.block_names,
        "experts_gate_up": ("mlp.experts.gate_up_proj",),
        "experts_down": ("mlp.experts.down_proj",),
    },
    is_expert_out_in=True,
    ignorable=Family.ignorable,
)
