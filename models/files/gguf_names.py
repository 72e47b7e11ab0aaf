"""Which tensors of a GGUF file are which of a Hugging Face checkpoint.

The names in GGUF are the gguf library's to know.
"""

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import TypeAlias

import jax
import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.files import gguf_joins as joins
from folojax.models.files.hf_names import Shape, parameter_sources

_JOINT = r"(\.experts|\.altup_\w*projections)\.\d+"
"""What precedes a number of which GGUF has no tensors of their own."""

_RENAMED = {
    r"(e_score_correction)_bias$": r"\1.bias",
    r"expert_bias$": "expert_bias.bias",
    r"dt_bias$": "dt_proj.bias",
    r"sinks$": "sinks.weight",
    r"((\.experts\.(gate_up|down)_proj)|layer_scalar)$": r"\1.weight",
    r"^model\.(layers\.\d+\.feed_forward\.experts)": r"\1",
    r"^backbone(\.layers\.\d+)\.mixer\.experts": r"model\1.mlp.experts",
}
"""How llama.cpp's converter spells tensors before it asks the library."""

_UNKNOWN = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
"""Tensors of a layer of which the library does not know the names."""

_LINEAR = re.compile(r"(.*)\.(block_sparse_moe|shared_mlp)\.(input|output)_linear\.weight")
"""Granite joins what GGUF keeps apart, and calls an MLP without experts a shared one."""

_TURNED = re.compile(r"(?<=\.experts)\.(gate_up|down)_proj(_bias)?$")
"""Experts of gpt-oss, all in one."""

_SCALAR = re.compile(r"\.layers\.(\d+)\.mlp\.act_fn\.(\w+)$")
"""Numbers of a layer's activation, which GGUF has in its metadata."""


Make: TypeAlias = Callable[[list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Join:
    """GGUF tensors that make a Hugging Face tensor."""

    parts: tuple[str, ...]
    make: Make


@dataclasses.dataclass
class Places:
    """Where everything lies that a model asks for."""

    uses: dict[str, list[tuple[str, Shape]]] = dataclasses.field(default_factory=dict)
    """Names and shapes of what each GGUF tensor holds: one Hugging Face tensor, or several, the
    rows of one behind those of the other, or the part of one."""
    joined: dict[str, Join] = dataclasses.field(default_factory=dict)
    """How Hugging Face tensors are made that lie in several GGUF tensors, or in another order."""
    scalars: dict[str, tuple[str, int, Shape]] = dataclasses.field(default_factory=dict)
    """Hugging Face tensors that are entry i of a list of the metadata: its key, i and the shape."""


def places(architecture: str, config: ModelConfig, present: Collection[str]) -> Places:
    """Finds every tensor of a model in a file of a GGUF architecture that has these tensors.

    Raises:
        ValueError: one has no place there.
    """
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_layers)
    found = Places()
    for source in jax.tree.leaves(parameter_sources(config)):
        for hf_name, shape in source.tensors:
            scalar = _SCALAR.search(hf_name)
            if scalar:
                found.scalars[hf_name] = (f"xielu.{scalar[2]}", int(scalar[1]), shape)
                continue
            join = _further_join(hf_name, shape, config, present)
            if join is not None:
                parts, make = join
                found.joined[hf_name] = Join(tuple(parts), make)
                for name, of_part in parts.items():
                    found.uses.setdefault(name, []).append((hf_name, of_part))
                continue
            spelled = _spelled(hf_name, config)
            asked = [names.get_name(one, try_suffixes=(".weight", ".bias")) for one in spelled]
            known = [name for name in asked if name is not None]
            if len(known) < len(asked):
                raise ValueError(f"{hf_name} has no place in GGUF files of {architecture!r}")
            if config.has_expert_bias and _TURNED.search(hf_name):
                found.joined[hf_name] = Join(tuple(known), joins.take_turns)
                shape = (shape[0], shape[-1] // len(known), *shape[1:-1])
            elif len(known) > 1:
                found.joined[hf_name] = Join(tuple(known), joins.behind_each_other)
                shape = (*shape[:-2], shape[-2] // len(known), shape[-1])
            for name in known:
                whole = _whole(name)
                name = name if name in present or whole not in present else whole
                found.uses.setdefault(name, []).append((hf_name, shape))
    return found


def _whole(name: str) -> str:
    """The tensor that some files have in the place of several."""
    joint = re.sub(r"\.attn_[qkv]\.", ".attn_qkv.", name)
    return re.sub(r"\.ffn_(gate|up)_exps\.", ".ffn_gate_up_exps.", joint)


def _further_join(
    hf_name: str, shape: Shape, config: ModelConfig, present: Collection[str]
) -> tuple[dict[str, Shape], Make] | None:
    """Names and shapes of the parts of a tensor that the library does not know as such.

    A file may have the whole instead, which it does know: None.
    """
    layer = re.search(r"layers\.(\d+)\.(.*)", hf_name)
    if layer is None:
        return None
    prefix, role, sizes = f"blk.{layer[1]}.", layer[2], config.recurrent
    parts: dict[str, Shape]
    if role in _UNKNOWN:
        return {prefix + _UNKNOWN[role]: shape}, joins.alone
    if role == "linear_attn.in_proj_qkvz.weight" and f"{prefix}attn_gate.weight" in present:
        assert sizes is not None, "the layer is recurrent"
        parts = {f"{prefix}attn_qkv.weight": (sizes.num_channels, shape[1])}
        parts[f"{prefix}attn_gate.weight"] = (sizes.num_values, shape[1])
        return parts, joins.by_key_head(sizes)
    if role == "self_attn.kv_b_proj.weight" and f"{prefix}attn_k_b.weight" in present:
        heads, rank = config.num_heads, config.kv_rank
        parts = {f"{prefix}attn_k_b.weight": (heads, rank, config.head_dim - _turning(config))}
        parts[f"{prefix}attn_v_b.weight"] = (heads, config.value_dim, rank)
        return parts, joins.keys_and_values
    count, inner, width = config.num_experts, config.expert_size, config.hidden_size
    parts = {f"{prefix}ffn_{one}_exps.weight": (count, inner, width) for one in ("gate", "up")}
    if role == "feed_forward.experts.gate_up_proj":
        return parts, joins.in_out
    if role == "feed_forward.experts.down_proj":
        return {f"{prefix}ffn_down_exps.weight": (count, width, inner)}, joins.in_out
    is_apart = parts.keys() <= set(present)
    if role.endswith("experts.gate_up_proj") and is_apart and not config.has_expert_bias:
        return parts, joins.behind_each_other
    return None


def _turning(config: ModelConfig) -> int:
    """Dimensions of a head that turn, where keys come from latents."""
    return config.rotary_dim or 0


def _spelled(hf_name: str, config: ModelConfig) -> list[str]:
    """The name as the library knows it, or those of the parts."""
    spelled = re.sub(_JOINT, r"\1", hf_name)
    for pattern, other in _RENAMED.items():
        spelled = re.sub(pattern, other, spelled)
    turned = _TURNED.search(hf_name) if config.has_expert_bias else None
    if turned is not None:
        kind = "bias" if turned[2] else "weight"
        whole = hf_name.removesuffix(turned[0])
        return [f"{whole}.{part}_proj.{kind}" for part in turned[1].split("_")]
    linear = _LINEAR.fullmatch(spelled)
    if linear is None:
        return [spelled]
    layer, module, side = linear.groups()
    inner = "mlp.experts"
    if module == "shared_mlp":
        inner = "mlp.shared_experts" if config.num_experts else "mlp"
    parts = ("gate_proj", "up_proj") if side == "input" else ("down_proj",)
    return [f"{layer}.{inner}.{part}.weight" for part in parts]
