"""Gemma 4: heads of two sizes, keys and values that layers share, embeddings by layer."""

from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import BLOCK_NAMES, HEAD_NAMES, POST_NORM_NAMES, Family

_FULL, _LOCAL = "full_attention", "sliding_attention"

NORMS: dict[str, Any] = {
    "norm": "rms_wide",
    "has_post_norm": True,
    "qk_norm": True,
    "has_value_norm": True,
    "attention_scale": 1.0,
}
"""What stands fixed of Gemma 3n and 4: norms of all that attention takes, and so no scale."""


def _normalize(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Kinds of layers are spelt out, and in two words what those without a window differ in."""
    words = {**mapping, "hidden_act": mapping.get("hidden_activation") or "gelu_pytorch_tanh"}
    layers = range(mapping.get("num_hidden_layers") or 0)
    kinds = mapping.get("layer_types") or [_LOCAL if (i + 1) % 6 else _FULL for i in layers]
    words["layer_types"] = [*kinds[:-1], _FULL]  # as transformers has it, whatever is stated
    by_layer = words.pop("per_layer_config", None)
    if by_layer:  # transformers 5 writes these, and published files the two words below
        full = {str(i) for i, kind in enumerate(words["layer_types"]) if kind == _FULL}
        first, *others = by_layer.values()
        known = {"head_dim", "num_key_value_heads"}
        if set(by_layer) != full or any(one != first for one in others) or set(first) - known:
            raise ValueError(
                "per_layer_config: only head_dim and num_key_value_heads of all layers of "
                "full_attention may differ from the others"
            )
        words["global_head_dim"] = first.get("head_dim")
        words["num_global_key_value_heads"] = first.get("num_key_value_heads")
    return words


def kv_layers(mapping: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the last layers, which read what the last of their kind before them has stored."""
    kinds, count = mapping["layer_types"], mapping["num_hidden_layers"]
    first = count - mapping["num_kv_shared_layers"]
    own = kinds[:first]
    missing = sorted(set(kinds) - set(own))
    if missing:
        raise ValueError(
            f"num_kv_shared_layers is {count - first} of {count}: no layer before them is of kind "
            f"{' or '.join(missing)}"
        )
    lenders = {kind: first - 1 - own[::-1].index(kind) for kind in own}
    return tuple(i if i < first else lenders[kinds[i]] for i in range(count))


def _widths(mapping: Mapping[str, Any]) -> tuple[int, ...]:
    """MLPs of the last layers are twice as wide."""
    count, shared = mapping["num_hidden_layers"], mapping["num_kv_shared_layers"]
    width = mapping["intermediate_size"]
    return (width,) * (count - shared) + (2 * width,) * shared


def _derive(mapping: Mapping[str, Any]) -> dict[str, Any]:
    if mapping.get("use_bidirectional_attention") == "all":
        raise ValueError("use_bidirectional_attention 'all': only causal attention is supported")
    is_tied = bool(mapping["attention_k_eq_v"])
    fields: dict[str, Any] = {
        "embed_scale": mapping["hidden_size"] ** 0.5,
        "full_head_dim": mapping["global_head_dim"] or 0,
        "full_kv_heads": (mapping["num_global_key_value_heads"] or 0) if is_tied else 0,
        "kv_layers": kv_layers(mapping) if mapping["num_kv_shared_layers"] else (),
        "intermediate_sizes": _widths(mapping) if mapping["use_double_wide_mlp"] else (),
        "layer_embed_size": mapping["hidden_size_per_layer_input"] or 0,
    }
    if fields["layer_embed_size"]:
        fields["layer_embed_vocab"] = mapping["vocab_size_per_layer_input"]
    if mapping["enable_moe_block"]:
        fields |= {
            "num_experts": mapping["num_experts"],
            "num_experts_per_token": mapping["top_k_experts"],
            "expert_size": mapping["moe_intermediate_size"],
            "has_dense_beside": True,
        }
    return fields


EMBEDDING_NAMES = {
    **HEAD_NAMES,
    "layer_embed": ("model.embed_tokens_per_layer.weight",),
    "layer_proj": ("model.per_layer_model_projection.weight",),
    "layer_proj_norm": ("model.per_layer_projection_norm.weight",),
}
LAYER_NAMES = {
    **BLOCK_NAMES,
    **POST_NORM_NAMES,
    "q": ("self_attn.q_proj.weight",),
    "layer_gate": ("per_layer_input_gate.weight",),
    "layer_up": ("per_layer_projection.weight",),
    "layer_post_norm": ("post_per_layer_input_norm.weight",),
}

GEMMA4 = Family(
    model_type="gemma4_text",
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "rope_parameters": {
            _LOCAL: {"rope_type": "default", "rope_theta": 1e4},
            _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        },
        "rope_local_base_freq": 1e4,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262_144,
    },
    normalize=_normalize,
    fixed={**NORMS, "has_layer_scale": True},
    keys={
        "attention_k_eq_v": "has_keys_as_values",
        "final_logit_softcapping": "logits_softcap",
    },
    derive=_derive,
    has_layer_types=True,
    has_rope_by_kind=True,
    head_names=EMBEDDING_NAMES,
    block_names={
        **LAYER_NAMES,
        "qk": ("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
        "layer_scale": ("layer_scalar",),
        "dense_post_norm": ("post_feedforward_layernorm_1.weight",),
        "experts_norm": ("pre_feedforward_layernorm_2.weight",),
        "experts_post_norm": ("post_feedforward_layernorm_2.weight",),
        "router": ("router.proj.weight",),
        "router_scale": ("router.scale",),
        "experts_scale": ("router.per_expert_scale",),
        "experts_gate_up": ("experts.gate_up_proj",),
        "experts_down": ("experts.down_proj",),
    },
    is_expert_out_in=True,
    # Keys and values of layers that read those of others.
    ignorable=r"model\.layers\.\d+\.self_attn\.([kv]_proj|[kv]_norm)\.weight",
)
