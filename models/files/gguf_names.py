"""Which tensors of a GGUF file are which of a Hugging Face checkpoint.

The names in GGUF are the gguf library's to know.
"""

import dataclasses
import re

import jax
import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.files.hf_names import Shape, parameter_sources

_JOINT = r"(\.experts|\.altup_\w*projections)\.\d+"
"""What precedes a number of which GGUF has no tensors of their own."""

_RENAMED = {
    r"(e_score_correction)_bias$": r"\1.bias",
    r"expert_bias$": "expert_bias.bias",
    r"dt_bias$": "dt_proj.bias",
    r"sinks$": "sinks.weight",
    r"^model\.(layers\.\d+\.feed_forward\.experts)": r"\1",
}
"""How llama.cpp's converter spells tensors before it asks the library."""

_LINEAR = re.compile(r"(.*)\.(block_sparse_moe|shared_mlp)\.(input|output)_linear\.weight")
"""Granite joins what GGUF keeps apart, and calls an MLP without experts a shared one."""

_TURNED = re.compile(r"(?<=\.experts)\.(gate_up|down)_proj(_bias)?$")
"""Experts of gpt-oss, all in one."""

_SCALAR = re.compile(r"\.layers\.(\d+)\.mlp\.act_fn\.(\w+)$")
"""Numbers of a layer's activation, which GGUF has in its metadata."""


@dataclasses.dataclass
class Places:
    """Where everything lies that a model asks for."""

    uses: dict[str, list[tuple[str, Shape]]] = dataclasses.field(default_factory=dict)
    """Names and shapes of what each GGUF tensor holds: one Hugging Face tensor, or those of all
    experts or streams, or the part of one."""
    joined: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """GGUF tensors that `joined_parts` makes a Hugging Face tensor of."""
    scalars: dict[str, tuple[str, int, Shape]] = dataclasses.field(default_factory=dict)
    """Hugging Face tensors that are entry i of a list of the metadata: its key, i and the shape."""


def places(architecture: str, config: ModelConfig) -> Places:
    """Finds every tensor of a model in the files of a GGUF architecture.

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
            spelled = _spelled(hf_name, config)
            asked = [names.get_name(one, try_suffixes=(".weight", ".bias")) for one in spelled]
            parts = [name for name in asked if name is not None]
            if len(parts) < len(asked):
                raise ValueError(f"{hf_name} has no place in GGUF files of {architecture!r}")
            if config.has_expert_bias and _TURNED.search(hf_name):
                found.joined[hf_name] = parts
                shape = (shape[0], shape[-1] // len(parts), *shape[1:-1])
            elif len(parts) > 1:
                found.joined[hf_name] = parts
                shape = (*shape[:-2], shape[-2] // len(parts), shape[-1])
            for name in parts:
                found.uses.setdefault(name, []).append((hf_name, shape))
    return found


def joined_parts(hf_name: str, parts: list[np.ndarray]) -> np.ndarray:
    """What one tensor of a checkpoint is in GGUF, in one.

    Parts lie behind each other, those of Granite; rows of gpt-oss take turns, and its kernels lie
    as [in, out].
    """
    if not _TURNED.search(hf_name):
        return np.concatenate(parts, axis=-2)
    count, _, *width = parts[0].shape
    rows = np.stack(parts, axis=2).reshape(count, -1, *width)
    return rows.swapaxes(1, 2) if width else rows


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
