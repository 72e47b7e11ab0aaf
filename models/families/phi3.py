"""Phi-3, Phi-3.5 and Phi-4: fused projections, heads of which a part may rotate, a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from folojax.models.core.family import BLOCK_NAMES, Family, windows


def _fields(mapping: Mapping[str, Any]) -> dict[str, Any]:
    has_window = mapping.get("sliding_window") is not None
    return {
        "windows": windows(mapping, lambda layer: True) if has_window else (),
        # Published files state it, and the model has none.
        "qkv_bias": False,
        "o_bias": False,
    }


PHI3 = Family(
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    fields=_fields,
    has_partial_rotary=True,
    block_names={
        **BLOCK_NAMES,
        "qkv": ("self_attn.qkv_proj.weight",),
        "gate_up": ("mlp.gate_up_proj.weight",),
    },
)
