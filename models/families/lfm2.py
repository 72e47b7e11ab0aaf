"""LFM2: short convolutions with gates in most layers, attention in the others."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from folojax.models.core.recurrent import Recurrent
from folojax.models.families.family import BLOCK_NAMES, HEAD_NAMES, Family, renamed

_CONV, _FULL = "conv", "full_attention"


def _normalize(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Published files have other words, which count where they stand beside those of Llama."""
    words = renamed(mapping, {"norm_eps": "rms_norm_eps"})
    for theirs, ours in (
        ("tie_embedding", "tie_word_embeddings"),
        ("block_ff_dim", "intermediate_size"),
    ):
        if words.get(theirs) is not None:
            words[ours] = words.pop(theirs)
    full, layers = words.get("full_attn_idxs"), range(words.get("num_hidden_layers") or 0)
    if not words.get("layer_types"):
        words["layer_types"] = [_FULL if full is None or i in full else _CONV for i in layers]
    return words


def _convolutions(mapping: Mapping[str, Any]) -> dict[str, Any]:
    kinds, has_bias = mapping["layer_types"], bool(mapping["conv_bias"])
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == _CONV)
    if not layers:
        return {}
    sizes = Recurrent(
        kind="convolution",
        layers=layers,
        num_key_heads=1,
        num_value_heads=1,
        key_dim=1,
        value_dim=mapping["hidden_size"],
        conv_width=mapping["conv_L_cache"],
        has_conv_bias=has_bias,
        has_bias=has_bias,
    )
    return {"recurrent": sizes}


def _derive(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """MLPs are narrower than stated, by two thirds and a multiple."""
    width = mapping["intermediate_size"]
    if mapping["block_auto_adjust_ff_dim"]:
        width, step = int(2 * width / 3), mapping["block_multiple_of"]
        if mapping["block_ffn_dim_multiplier"] is not None:
            width = int(mapping["block_ffn_dim_multiplier"] * width)
            width = step * -(-width // step)
    return {"intermediate_size": width, **_convolutions(mapping)}


LFM2 = Family(
    model_type="lfm2",
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128_000,
        "rope_theta": 1e6,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    normalize=_normalize,
    fixed={"qk_norm": True, "qkv_bias": False, "o_bias": False},
    derive=_derive,
    recurrent_type=_CONV,
    head_names={**HEAD_NAMES, "final_norm": ("model.embedding_norm.weight",)},
    block_names={
        **BLOCK_NAMES,
        "attn_norm": ("operator_norm.weight",),
        "mlp_norm": ("ffn_norm.weight",),
        "q_norm": ("self_attn.q_layernorm.weight",),
        "k_norm": ("self_attn.k_layernorm.weight",),
        "o": ("self_attn.out_proj.weight",),
        "in_proj": ("conv.in_proj.weight",),
        "conv": ("conv.conv.weight",),
        "out_proj": ("conv.out_proj.weight",),
        "gate_up": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
        "down": ("feed_forward.w2.weight",),
    },
)


def _experts(mapping: Mapping[str, Any]) -> dict[str, Any]:
    if not mapping["use_expert_bias"]:
        raise ValueError("use_expert_bias false: not supported, as no published model has it")
    first_sparse = min(mapping["num_dense_layers"], mapping["num_hidden_layers"])
    return {"dense_layers": tuple(range(first_sparse)), **_convolutions(mapping)}


LFM2_MOE = dataclasses.replace(
    LFM2,
    model_type="lfm2_moe",
    defaults={
        **LFM2.defaults,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
    },
    normalize=lambda mapping: _normalize(renamed(mapping, {"num_local_experts": "num_experts"})),
    fixed={**LFM2.fixed, "router": "sigmoid"},
    keys={
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "moe_intermediate_size": "expert_size",
        "routed_scaling_factor": "expert_scale",
        "norm_topk_prob": "is_expert_weight_normed",
    },
    derive=_experts,
    block_names={
        **LFM2.block_names,
        "router": ("feed_forward.gate.weight",),
        "router_correction": ("feed_forward.expert_bias",),
        "experts_gate_up": (
            "feed_forward.experts.{}.w1.weight",
            "feed_forward.experts.{}.w3.weight",
        ),
        "experts_down": ("feed_forward.experts.{}.w2.weight",),
    },
)
