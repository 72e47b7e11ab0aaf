"""Falcon-H1: attention and the state space of Mamba-2 beside each other in every layer."""

from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import HEAD_NAMES, Family
from folojax.models.families.mamba import BAMBA, SPACE_DEFAULTS, state_space


def _derive(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Multipliers of what goes into attention are those of its scores and of what it returns."""
    into = mapping["attention_in_multiplier"]
    if mapping.get("attention_bias") and into != 1:
        raise ValueError("attention_bias true beside an attention_in_multiplier: not supported")
    has_bias = bool(mapping["mamba_proj_bias"])
    if has_bias != bool(mapping["projectors_bias"]) or (
        has_bias and mapping["ssm_in_multiplier"] != 1
    ):
        raise ValueError(
            "mamba_proj_bias and projectors_bias that differ, or beside an ssm_in_multiplier: not "
            "supported"
        )
    gate, down = mapping["mlp_multipliers"] or (1.0, 1.0)
    scales = mapping["ssm_multipliers"] or (1.0,) * 5
    if len(scales) != 5:
        raise ValueError(f"ssm_multipliers are {scales}; they must be five numbers")
    heads = mapping["num_attention_heads"]
    head_dim = mapping.get("head_dim") or mapping["hidden_size"] // heads
    return {
        "logits_divisor": 1 / mapping["lm_head_multiplier"],
        "attention_scale": head_dim**-0.5 * into**2 * mapping["key_multiplier"],
        "attention_out_scale": into * mapping["attention_out_multiplier"],
        "gate_scale": gate,
        "mlp_scale": down,
        **state_space(
            mapping,
            range(mapping["num_hidden_layers"]),
            mapping["mamba_d_ssm"],
            is_beside=True,
            in_scales=tuple(mapping["ssm_in_multiplier"] * one for one in scales),
            out_scale=float(mapping["ssm_out_multiplier"]),
            has_norm=bool(mapping["mamba_rms_norm"]),
            is_normed_first=bool(mapping["mamba_norm_before_gate"]),
        ),
    }


ONES = ("lm_head", "embedding", "key", "attention_out", "attention_in", "ssm_in", "ssm_out")
"""What has a multiplier of its own."""

FALCON_H1 = Family(
    model_type="falcon_h1",
    defaults={
        **SPACE_DEFAULTS,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "mamba_d_ssm": 1024,
        "mamba_rms_norm": False,
        "mamba_norm_before_gate": True,
        "projectors_bias": False,
        "mlp_multipliers": None,
        "ssm_multipliers": None,
        **{f"{name}_multiplier": 1.0 for name in ONES},
    },
    keys={"embedding_multiplier": "embed_scale"},
    derive=_derive,
    head_names={**HEAD_NAMES, "final_norm": ("model.final_layernorm.weight",)},
    block_names=BAMBA.block_names,
)
