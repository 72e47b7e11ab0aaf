"""Mistral: Llama with a sliding window; Mixtral: the same with experts in place of the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from folojax.models.core.family import BLOCK_NAMES, Family, windows


def _fields(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Every layer has the window, or none."""
    has_window = mapping.get("sliding_window") is not None
    return {"windows": windows(mapping, lambda layer: True) if has_window else ()}


def _expert_fields(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return _fields(mapping) | {
        "num_experts": mapping["num_local_experts"],
        "num_experts_per_token": mapping["num_experts_per_tok"],
        "expert_size": mapping["intermediate_size"],
    }


MISTRAL = Family(
    defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    fields=_fields,
)

MIXTRAL = Family(
    defaults={
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    fields=_expert_fields,
    block_names={
        **BLOCK_NAMES,
        "router": ("block_sparse_moe.gate.weight",),
        "experts_gate_up": (
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
        ),
        "experts_down": ("block_sparse_moe.experts.{}.w2.weight",),
    },
)
