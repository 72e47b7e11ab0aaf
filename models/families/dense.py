"""Families that differ from Llama in few words: Seed-OSS, ERNIE 4.5, Arcee, Apertus, Nemotron."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import BLOCK_NAMES, Family, renamed

SEED_OSS = Family(
    model_type="seed_oss",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "attention_bias": True,
        "attention_out_bias": False,
    },
    derive=lambda mapping: {"o_bias": bool(mapping["attention_out_bias"])},
)


def _all_biases(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), bool(mapping["use_bias"]))


ERNIE4_5 = Family(
    model_type="ernie4_5",
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "use_bias": False,
    },
    fixed={"is_rope_interleaved": True},
    derive=_all_biases,
)

# AFM.
ARCEE = Family(
    model_type="arcee",
    defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    fixed={"is_gated": False},
    block_names={**BLOCK_NAMES, "up": ("mlp.up_proj.weight",)},
)

_CURVE = {"act_above": "alpha_p", "act_below": "alpha_n", "act_slope": "beta", "act_edge": "eps"}

APERTUS = dataclasses.replace(
    ARCEE,
    model_type="apertus",
    defaults={
        "hidden_act": "xielu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 65_536,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 12_000_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    fixed={"is_gated": False, "qk_norm": True, "mlp_bias": False},
    block_names={
        **ARCEE.block_names,
        "attn_norm": ("attention_layernorm.weight",),
        "mlp_norm": ("feedforward_layernorm.weight",),
        **{name: (f"mlp.act_fn.{word}",) for name, word in _CURVE.items()},
    },
    vectors=dict.fromkeys(("act_slope", "act_edge"), lambda shape: ()),
)

# Nemotron 3 and 4, Minitron.
NEMOTRON = dataclasses.replace(
    ARCEE,
    model_type="nemotron",
    defaults={
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.5,
    },
    normalize=lambda mapping: renamed(mapping, {"norm_eps": "rms_norm_eps"}),
    fixed={"is_gated": False, "norm": "layer_offset"},
    has_partial_rotary=True,
)

# Code World Model.
CWM = Family(
    model_type="cwm",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "sliding_window": 8192,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    fixed={"qkv_bias": False, "o_bias": False},
    is_local=lambda mapping, layer: layer % 4 != 0,
    has_layer_types=True,
)
