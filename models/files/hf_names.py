"""Where each parameter of a decoder lies in a Hugging Face checkpoint, under which names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.core.family import Family
from folojax.models.core.registry import family_of


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors that make up one parameter.

    A parameter joins the linear layers that read the same input, which a checkpoint keeps apart,
    and lies as [out, in] like them; GPT-2's Conv1D lies as [in, out] there.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """(name, shape) in the checkpoint, joined along their first axis in this order."""
    is_transposed: bool = False
    """The parameter is the transpose of the joined tensors."""
    num_stacked: int | None = None
    """The tensors are so many equal groups, one for each expert: each is joined and transposed on
    its own, and they are stacked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        group = self.tensors[: len(self.tensors) // (self.num_stacked or 1)]
        joined = (sum(shape[0] for _, shape in group), *group[0][1][1:])
        one = joined[::-1] if self.is_transposed else joined
        return one if self.num_stacked is None else (self.num_stacked, *one)

    def views(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Each tensor's name, and its part of the parameter in the tensor's own orientation.

        Views, so a tensor may be read from the parameter or written into it.
        """
        stacked = array if self.num_stacked is not None else array[None]
        per_group = len(self.tensors) // len(stacked)
        for index, one in enumerate(stacked):
            rows, start = one.T if self.is_transposed else one, 0
            for name, shape in self.tensors[index * per_group : (index + 1) * per_group]:
                yield name, rows[start : start + shape[0]]
                start += shape[0]


def parameter_sources(config: ModelConfig) -> dict[str, Any]:
    """The tree of `init_params`, with a `Source` in the place of each array."""
    _, family = family_of(config.architecture)
    names, width = family.head_names, config.hidden_size
    sources: dict[str, Any] = {
        "embed": Source(((names["embed"][0], (config.vocab_size, width)),)),
        **_norm(config, "final_norm", names["final_norm"], width),
    }
    if config.has_learned_positions:
        shape = (config.max_position, width)
        sources["position_embed"] = Source(((names["position_embed"][0], shape),))
    if not config.tie_embeddings:
        # A Linear also where the layers have Conv1D.
        lm_head = ((names["lm_head"][0], (config.vocab_size, width)),)
        sources["lm_head"] = Source(lm_head)
    for layer in range(config.num_layers):
        sources[f"layers_{layer}"] = _block_sources(config, family, layer)
    return sources


def is_ignorable(name: str, config: ModelConfig) -> bool:
    """Whether a tensor that no parameter asks for may be passed over.

    True for what old exports store though the config determines it, and for the output projection
    of a model that ties it to the embedding.
    """
    _, family = family_of(config.architecture)
    if name in family.head_names["lm_head"]:
        return config.tie_embeddings
    return re.fullmatch(family.ignorable, name) is not None


def _block_sources(config: ModelConfig, family: Family, layer: int) -> dict[str, Source]:
    width, head_dim = config.hidden_size, config.head_dim
    prefix = family.block_prefix.format(layer)
    names = {
        parameter: tuple(prefix + name for name in tensors)
        for parameter, tensors in family.block_names.items()
    }
    queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
    sources: dict[str, Source] = {}

    def add(parameter: str, width_in: int, rows: tuple[int, ...], has_bias: bool) -> None:
        """A kernel of several outputs, which may be one tensor in the checkpoint, and its bias."""
        tensors = names[parameter]
        if len(tensors) == 1:
            rows = (sum(rows),)
        if family.is_kernel_in_out:
            sources[parameter] = Source(((tensors[0], (width_in, *rows)),), is_transposed=True)
        else:
            shapes = tuple((name, (r, width_in)) for name, r in zip(tensors, rows, strict=True))
            sources[parameter] = Source(shapes)
        if has_bias:
            biases = (name.removesuffix("weight") + "bias" for name in tensors)
            sources[f"{parameter}_bias"] = Source(
                tuple((name, (r,)) for name, r in zip(biases, rows, strict=True))
            )

    for part in ("attn", "mlp"):
        if config.has_pre_norm:
            sources |= _norm(config, f"{part}_norm", names[f"{part}_norm"], width)
        if config.has_post_norm:
            sources |= _norm(config, f"{part}_post_norm", names[f"{part}_post_norm"], width)
    add("qkv", width, (queries, keys, keys), config.qkv_bias)
    if config.qk_norm:
        for part, size in (("q_norm", queries), ("k_norm", keys)):
            shape = (size if config.is_qk_norm_joint else head_dim,)
            sources[part] = Source(((names[part][0], shape),))
    add("o", queries, (width,), config.o_bias)
    if config.is_sparse(layer):
        return sources | _expert_sources(config, names)
    inner = config.intermediate_size
    if config.is_gated:
        add("gate_up", width, (inner, inner), config.mlp_bias)
    else:
        add("up", width, (inner,), config.mlp_bias)
    add("down", inner, (width,), config.mlp_bias)
    return sources


def _expert_sources(config: ModelConfig, names: dict[str, tuple[str, ...]]) -> dict[str, Source]:
    """The router, and the kernels of all experts, each in one array."""
    width, inner, count = config.hidden_size, config.expert_size, config.num_experts

    def stack(parameter: str, shape: tuple[int, int]) -> Source:
        tensors = tuple(
            (name.format(expert), shape) for expert in range(count) for name in names[parameter]
        )
        return Source(tensors, is_transposed=True, num_stacked=count)

    return {
        "router": Source(((names["router"][0], (count, width)),)),
        "experts_gate_up": stack("experts_gate_up", (inner, width)),
        "experts_down": stack("experts_down", (width, inner)),
    }


def _norm(
    config: ModelConfig, parameter: str, names: tuple[str, ...], width: int
) -> dict[str, Source]:
    """A norm's weight, and its bias if it is a LayerNorm."""
    sources = {parameter: Source(((names[0], (width,)),))}
    if config.norm == "layer":
        bias = names[0].removesuffix("weight") + "bias"
        sources[f"{parameter}_bias"] = Source(((bias, (width,)),))
    return sources
