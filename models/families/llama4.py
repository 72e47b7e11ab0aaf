"""Llama 4: attention in chunks, layers without rotary embedding, experts of scaled inputs."""

from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import BLOCK_NAMES, Family
from folojax.models.families.ropeless import ropeless_layers

_CHUNKED, _FULL = "chunked_attention", "full_attention"


def _normalize(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """`intermediate_size` is that of dense MLPs, as in other families, and not that of experts."""
    words = dict(mapping)
    words["expert_size"] = mapping.get("intermediate_size", 8192)
    words["intermediate_size"] = mapping.get("intermediate_size_mlp", 16_384)
    kinds = words["kinds"] = words.pop("layer_types", None)
    unknown = sorted(set(kinds or ()) - {_CHUNKED, _FULL})
    if unknown:
        raise ValueError(f"layer_types {unknown}: supported here are {_CHUNKED}, {_FULL}")
    return words


def _derive(mapping: Mapping[str, Any]) -> dict[str, Any]:
    layers, kinds = range(mapping["num_hidden_layers"]), mapping["kinds"]
    ropeless = ropeless_layers(mapping)["ropeless_layers"]
    if kinds is not None and len(kinds) != len(layers):
        raise ValueError(f"layer_types has {len(kinds)} entries for {len(layers)} layers")
    is_chunked = [kinds[i] == _CHUNKED if kinds else i not in ropeless for i in layers]
    step, sparse = mapping["interleave_moe_layer_step"], mapping.get("moe_layers")
    sparse = range(step - 1, len(layers), step) if sparse is None else sparse
    fields: dict[str, Any] = {
        "ropeless_layers": ropeless,
        "attention_chunk": mapping["attention_chunk_size"],
        "chunked_layers": tuple(i for i in layers if is_chunked[i]),
        "dense_layers": tuple(i for i in layers if i not in sparse),
        "shared_expert_size": mapping["expert_size"],
    }
    if fields["attention_chunk"] is None:
        fields["chunked_layers"] = ()
    if mapping["attn_temperature_tuning"]:
        fields |= {
            "query_growth": float(mapping["attn_scale"]),
            "query_growth_length": mapping["floor_scale"],
        }
    return fields


LLAMA4 = Family(
    model_type="llama4_text",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    normalize=_normalize,
    fixed={
        "is_rope_interleaved": True,
        "is_growth_ropeless": True,
        "router": "sigmoid_of_input",
        "is_expert_weight_normed": False,
    },
    keys={
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "expert_size": "expert_size",
        "use_qk_norm": "has_bare_qk_norm",
    },
    derive=_derive,
    block_names={
        **BLOCK_NAMES,
        "gate_up": ("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight"),
        "down": ("feed_forward.down_proj.weight",),
        "router": ("feed_forward.router.weight",),
        "experts_gate_up": ("feed_forward.experts.gate_up_proj",),
        "experts_down": ("feed_forward.experts.down_proj",),
        "shared_gate_up": (
            "feed_forward.shared_expert.gate_proj.weight",
            "feed_forward.shared_expert.up_proj.weight",
        ),
        "shared_down": ("feed_forward.shared_expert.down_proj.weight",),
    },
)
