"""What a family of models is: how its config.json reads, and what its tensors are called."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama

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

    model_type: str
    """`model_type` of its config.json; one that disagrees with the architecture is refused."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What config.json may leave out, in its words."""
    normalize: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Puts a config.json into the words that Llama's has; called first. See `renamed`."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of ModelConfig that every model of the family has, whatever its config.json says."""
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further keys of config.json, each with the field of ModelConfig that it is."""
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda mapping: {}
    """Further fields of ModelConfig, from a normalised config.json that has all sizes. ValueError
    for what is not supported."""
    is_local: Callable[[Mapping[str, Any], int], bool] = lambda mapping, layer: False
    """Whether a layer has the window of `sliding_window`, where no `layer_types` says so."""
    has_window_switch: bool = False  # there are windows only if `use_sliding_window` is true
    has_layer_types: bool = False
    """`layer_types` may name layers with a window; elsewhere transformers has no eye for it."""
    recurrent_type: str | None = None
    """What `layer_types` calls the layers that keep a state instead of keys and values."""
    has_rope_by_kind: bool = False
    """`rope_parameters` has settings for layers with a window and for those without. Where the
    first state no base, it is `rope_local_base_freq`."""
    has_partial_rotary: bool = False  # `partial_rotary_factor` may be other than 1
    head_names: Names = dataclasses.field(default_factory=lambda: HEAD_NAMES)
    """Tensors of each parameter outside the layers; several, or those numbered at {}, are joined in
    one array."""
    block_names: Names = dataclasses.field(default_factory=lambda: BLOCK_NAMES)
    """Tensors of each parameter of a layer, behind `block_prefix`."""
    block_prefix: str = "model.layers.{}."
    """What stands before the names of a layer's tensors; {} is its number."""
    other_prefix: str = ""
    """What files may have in the place of the first part of all names; "": nothing."""
    is_kernel_in_out: bool = False
    """Kernels lie as [in, out] in the checkpoint (Conv1D), not as [out, in] (Linear)."""
    is_expert_out_in: bool = False
    """Each lies as [out, in] where the kernels of all experts are one tensor, not as [in, out]."""
    vectors: Mapping[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = dataclasses.field(
        default_factory=dict
    )
    """Parameters of one axis whose tensors have others: from the shape here to the one there."""
    ignorable: str = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    """Regular expression of tensors that old exports have and that mean nothing."""
    module: Callable[[ModelConfig, Any], Llama] = Llama
    """Makes the Flax module, of a config and the dtype that it computes in."""


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
