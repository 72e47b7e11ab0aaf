"""GPT-2: learned positions, LayerNorm, biases everywhere, a plain MLP, kernels as [in, out]."""

from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import Family, renamed

_WORDS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}


def _normalize(mapping: Mapping[str, Any]) -> dict[str, Any]:
    words = renamed(mapping, _WORDS)
    if words.get("intermediate_size") is None and isinstance(words.get("hidden_size"), int):
        words["intermediate_size"] = 4 * words["hidden_size"]
    return words


def _derive(mapping: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if mapping.get(name):
            raise ValueError(f"{name} true is not supported")
    return {"attention_scale": None if mapping.get("scale_attn_weights", True) else 1.0}


GPT2 = Family(
    model_type="gpt2",
    defaults={
        "tie_word_embeddings": True,
        "vocab_size": 50257,
        "max_position_embeddings": 1024,
        "hidden_act": "gelu_new",
        "rms_norm_eps": 1e-5,
    },
    normalize=_normalize,
    fixed={
        "norm": "layer",
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "is_gated": False,
        "has_learned_positions": True,
    },
    derive=_derive,
    head_names={
        "embed": ("transformer.wte.weight",),
        "position_embed": ("transformer.wpe.weight",),
        "final_norm": ("transformer.ln_f.weight",),
        "lm_head": ("lm_head.weight",),
    },
    block_names={
        "attn_norm": ("ln_1.weight",),
        "qkv": ("attn.c_attn.weight",),
        "o": ("attn.c_proj.weight",),
        "mlp_norm": ("ln_2.weight",),
        "up": ("mlp.c_fc.weight",),
        "down": ("mlp.c_proj.weight",),
    },
    block_prefix="transformer.h.{}.",
    is_kernel_in_out=True,
    # Causal masks, which the first exports kept.
    ignorable=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
)
