"""What the metadata of GGUF files of experts says, in the words of a `config.json`."""

from typing import Any

from folojax.models.files.gguf_family import (
    Read,
    expert_sizes,
    experts_alone,
    kinds_of,
    local_layers,
    num_layers,
    shortest,
    window,
)

_SOFTMAX, _SIGMOID = 1, 2
"""Of `expert_gating_func`."""

_GROUPS = {256: (8, 4), 160: (8, 3)}
"""By the number of experts of DeepSeek V3 and V2: of groups, and of those that a token goes to."""


def mixtral(read: Read) -> dict[str, Any]:
    """Of Mixtral."""
    experts = {
        "num_local_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
    }
    return experts | window(read)


def qwen3_moe(read: Read) -> dict[str, Any]:
    """Of Qwen 3; all weights are normed."""
    return experts_alone(read) | {
        "moe_intermediate_size": read("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def qwen2_moe(read: Read) -> dict[str, Any]:
    """Of Qwen 1.5 and 2, and what of later ones is likewise."""
    shared = read("expert_shared_feed_forward_length")
    return expert_sizes(read) | {"shared_expert_intermediate_size": shared}


def routed(read: Read) -> dict[str, Any]:
    """Of GLM-4.5 and dots.llm1; groups are stated by newer files alone."""
    return {
        "n_routed_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "moe_intermediate_size": read("expert_feed_forward_length"),
        "n_shared_experts": read("expert_shared_count"),
        "first_k_dense_replace": read("leading_dense_block_count", 0),
        "routed_scaling_factor": read("expert_weights_scale", 1.0),
        "norm_topk_prob": read("expert_weights_norm", False),
        "n_group": read("expert_group_count", 1),
        "topk_group": read("expert_group_used_count", 1),
        "sliding_window": None,
    }


def ernie_moe(read: Read) -> dict[str, Any]:
    """Of ERNIE 4.5."""
    return {
        "moe_num_experts": read("expert_count"),
        "moe_k": read("expert_used_count"),
        "moe_intermediate_size": read("expert_feed_forward_length"),
        "moe_num_shared_experts": read("expert_shared_count", 0),
        "moe_layer_start_index": read("leading_dense_block_count"),
        "moe_layer_end_index": -1,
        "moe_layer_interval": read("interleave_moe_layer_step"),
    }


def minimax(read: Read) -> dict[str, Any]:
    """Of MiniMax M2, whose MLPs are all experts."""
    return {
        "num_local_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "intermediate_size": read("expert_feed_forward_length"),
    }


def gpt_oss(read: Read) -> dict[str, Any]:
    """Of gpt-oss, whose rates have no whole steps."""
    size = read("attention.sliding_window")
    kinds = {"sliding_window": size, "layer_types": kinds_of(local_layers(read, 2))}
    return minimax(read) | kinds | {"further_rope": {"truncate": False}}


def deepseek2(read: Read) -> dict[str, Any]:
    """Of DeepSeek V3, Kimi K2, GLM-4.7-Flash.

    Raises:
        ValueError: it is another family of that name.
    """
    if read("attention.temperature_scale", None) is not None:
        raise ValueError(
            "deepseek2 with attention.temperature_scale (Mistral Large 3) is not supported: use a "
            "model of a family that docs/gguf.md lists"
        )
    return latent(read, _SIGMOID)


def deepseek_v2(read: Read) -> dict[str, Any]:
    """Of DeepSeek V2."""
    return latent(read, _SOFTMAX)


def latent(read: Read, gating: int) -> dict[str, Any]:
    """Sizes of what keys and values come from, and of experts whose router is of that kind.

    Files have the sizes of heads under further names where `key_length` is that of what is kept.
    Older ones do not state groups. Its two factors of attention never differed, and the file has a
    tenth of one.

    Raises:
        ValueError: the router is of another kind.
    """
    stated = read("expert_gating_func", gating)
    if stated != gating:
        raise ValueError(
            f"expert_gating_func is {stated}, and a model with these tensors has {gating}: use its "
            "safetensors version"
        )
    turning, heads = read("rope.dimension_count"), read("attention.head_count")
    of_key = read("attention.key_length_mla", None) or read("attention.key_length")
    of_value = read("attention.value_length_mla", None) or read("attention.value_length")
    groups, used = _GROUPS.get(read("expert_count"), (1, 1))
    factor = read("rope.scaling.yarn_log_multiplier", None)
    factors = {} if factor is None else dict.fromkeys(_FACTORS, shortest(10 * factor))
    words = routed(read) | {
        "num_key_value_heads": heads,
        "head_dim": turning,
        "kv_lora_rank": read("attention.kv_lora_rank"),
        "q_lora_rank": read("attention.q_lora_rank", None),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": of_key - turning,
        "v_head_dim": of_value,
        "rope_interleave": True,
        "n_group": read("expert_group_count", groups),
        "topk_group": read("expert_group_used_count", used),
        "further_rope": factors,
    }
    words["topk_method"] = "group_limited_greedy" if words["n_group"] > 1 else "greedy"
    return words


_FACTORS = ("mscale", "mscale_all_dim")


def mistral4(read: Read) -> dict[str, Any]:
    """How much queries grow never differed, and not all files state it."""
    words = latent(read, _SOFTMAX)
    words["head_dim"] = words["qk_nope_head_dim"] + words["qk_rope_head_dim"]
    words["further_rope"]["llama_4_scaling_beta"] = read("attention.temperature_scale", 0.1)
    return words


def llama4(read: Read) -> dict[str, Any]:
    """What never differed is not stated; queries and keys of Maverick alone are not normed.

    Raises:
        ValueError: it is another family of that name.
    """
    if read("attention.sliding_window", None) == 0 or read("interleave_moe_layer_step") == 0:
        raise ValueError(
            "llama4 with attention.sliding_window or interleave_moe_layer_step 0 (MobileLLM-R1) is "
            "not supported: use a model of a family that docs/gguf.md lists"
        )
    return {
        "intermediate_size": read("expert_feed_forward_length"),
        "intermediate_size_mlp": read("feed_forward_length"),
        "num_local_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "interleave_moe_layer_step": read("interleave_moe_layer_step"),
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(num_layers(read))],
        "use_qk_norm": read("expert_count") != 128,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }
