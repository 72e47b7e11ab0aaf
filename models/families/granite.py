"""Granite 3 and 4: four multipliers, experts, state spaces of Mamba-2."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import BLOCK_NAMES, Family
from folojax.models.families.mamba import (
    RECURRENT,
    SPACE_DEFAULTS,
    plain_kinds,
    space_names,
    spaces_by_type,
)

_GRANITE_KEYS = {
    "embedding_multiplier": "embed_scale",
    "attention_multiplier": "attention_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logits_divisor",
}

GRANITE = Family(
    model_type="granite", defaults=dict.fromkeys(_GRANITE_KEYS, 1.0), keys=_GRANITE_KEYS
)


_EXPERT_NAMES = {
    "router": ("block_sparse_moe.router.layer.weight",),
    "experts_gate_up": ("block_sparse_moe.input_linear.weight",),
    "experts_down": ("block_sparse_moe.output_linear.weight",),
}
_SHARED_NAMES = {
    "shared_gate_up": ("shared_mlp.input_linear.weight",),
    "shared_down": ("shared_mlp.output_linear.weight",),
}

# Granite 3 with experts.
GRANITE_MOE = dataclasses.replace(
    GRANITE,
    model_type="granitemoe",
    defaults={
        **GRANITE.defaults,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
    },
    keys={
        **_GRANITE_KEYS,
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "intermediate_size": "expert_size",
    },
    block_names={**BLOCK_NAMES, **_EXPERT_NAMES},
    is_expert_out_in=True,
)

GRANITE_MOE_SHARED = dataclasses.replace(
    GRANITE_MOE,
    model_type="granitemoeshared",
    defaults={**GRANITE_MOE.defaults, "shared_intermediate_size": 0},
    keys={**GRANITE_MOE.keys, "shared_intermediate_size": "shared_expert_size"},
    block_names={**GRANITE_MOE.block_names, **_SHARED_NAMES},
)


def _granite_hybrid(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Positions are learned of the order of states alone, unless rotary embedding is asked for."""
    positions, count = mapping["position_embedding_type"], mapping["num_hidden_layers"]
    if positions not in (None, "nope", "rope"):
        raise ValueError(f"position_embedding_type {positions!r}: only 'rope' and 'nope' are known")
    fields = spaces_by_type(mapping)
    fields["ropeless_layers"] = () if positions == "rope" else tuple(range(count))
    shared = mapping["shared_intermediate_size"]
    if not mapping["num_local_experts"]:
        return fields | {"intermediate_size": shared}
    return fields | {
        "num_experts": mapping["num_local_experts"],
        "num_experts_per_token": mapping["num_experts_per_tok"],
        "expert_size": mapping["intermediate_size"],
        "shared_expert_size": shared,
    }


# Granite 4, of which some have attention alone.
GRANITE_HYBRID = dataclasses.replace(
    GRANITE,
    model_type="granitemoehybrid",
    defaults={
        **GRANITE.defaults,
        **SPACE_DEFAULTS,
        "position_embedding_type": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    },
    normalize=plain_kinds,
    derive=_granite_hybrid,
    recurrent_type=RECURRENT,
    block_names={
        **BLOCK_NAMES,
        **space_names("mamba"),
        "gate_up": ("shared_mlp.input_linear.weight",),
        "down": ("shared_mlp.output_linear.weight",),
        **_SHARED_NAMES,
        **_EXPERT_NAMES,
    },
    is_expert_out_in=True,
)
