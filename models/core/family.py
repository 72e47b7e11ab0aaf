"""What a family of models is: how its config.json reads, and what its tensors are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Names = Mapping[str, tuple[str, ...]]

HEAD_NAMES: Names = {
    "embed": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    "lm_head": ("lm_head.weight",),
}
"""Names of the tensors of each parameter outside the layers."""

BLOCK_NAMES: Names = {
    "attn_norm": ("input_layernorm.weight",),
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "o": ("self_attn.o_proj.weight",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
    "router": ("mlp.gate.weight",),
    "experts_gate_up": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "experts_down": ("mlp.experts.{}.down_proj.weight",),
}
"""The same for a layer. Biases are called alike, with `bias` in the place of `weight`."""

POST_NORM_NAMES: Names = {
    "attn_post_norm": ("post_attention_layernorm.weight",),
    "mlp_norm": ("pre_feedforward_layernorm.weight",),
    "mlp_post_norm": ("post_feedforward_layernorm.weight",),
}
"""What families with norms behind attention and MLP call these, and the one before the MLP."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture differs from Llama; a family that says nothing is Llama."""

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What config.json may leave out, in its words."""
    normalize: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Puts a config.json into the words that Llama's has; called first. See `renamed`."""
    fields: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda mapping: {}
    """Fields of ModelConfig that are not as in Llama, from a normalised config.json that has all
    sizes. ValueError for what is not supported."""
    has_layer_types: bool = False
    """`layer_types` may name layers with a window; elsewhere transformers has no eye for it."""
    has_rope_by_kind: bool = False
    """`rope_parameters` has settings for layers with a window and for those without."""
    has_partial_rotary: bool = False
    """`partial_rotary_factor` may be other than 1."""
    head_names: Names = dataclasses.field(default_factory=lambda: HEAD_NAMES)
    block_names: Names = dataclasses.field(default_factory=lambda: BLOCK_NAMES)
    block_prefix: str = "model.layers.{}."
    is_kernel_in_out: bool = False
    """Kernels lie as [in, out] in the checkpoint (Conv1D), not as [out, in] (Linear)."""
    ignorable: str = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    """Regular expression of tensors that old exports have and that mean nothing."""
    module: str = "folojax.models.core.decoder:Llama"
    """`package.module:Class` of the Flax module."""


LLAMA = Family()


def renamed(mapping: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    """A config.json with other names for some of its keys.

    Raises:
        ValueError: it has both names of a key, with different values.
    """
    clashes = [
        f"{name} is {mapping[name]!r} and {other} is {mapping[other]!r}"
        for name, other in words.items()
        if name in mapping and other in mapping and mapping[name] != mapping[other]
    ]
    if clashes:
        raise ValueError(
            f"config.json contradicts itself: {'; '.join(clashes)}, two names of the same: "
            "keep one of them"
        )
    return {words.get(name, name): value for name, value in mapping.items()}


def windows(mapping: Mapping[str, Any], is_local: Callable[[int], bool]) -> tuple[int | None, ...]:
    """By layer, `sliding_window` where `is_local` says so, else None."""
    window = mapping.get("sliding_window")
    return tuple(
        window if is_local(layer) else None for layer in range(mapping["num_hidden_layers"])
    )


def local_rope_theta(mapping: Mapping[str, Any], default: float) -> float:
    """The base of the rotary rates of layers with a window; `default` where none is stated.

    Raises:
        ValueError: those layers scale their rates.
    """
    local = (mapping.get("rope_parameters") or {}).get("sliding_attention") or {}
    if (local.get("rope_type") or "default") != "default":
        raise ValueError(f"rope type {local['rope_type']!r} of local layers: only 'default' is")
    return local.get("rope_theta") or default
