"""Where each parameter of a decoder lies in a Hugging Face checkpoint, under which names."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.core.linear import CURVE
from folojax.models.families.families import family_of
from folojax.models.families.family import Family, Names

Shape: TypeAlias = tuple[int, ...]
_WIDE = ("router_correction", "a_log", "dt_bias", "state_skip")
"""Parameters that are of float32 in whatever dtype a model computes."""

Parts: TypeAlias = tuple[list[Shape], bool]
"""Shapes that are joined along their first axis, and whether there is a bias too."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors that make up one parameter.

    A parameter joins the linear layers that read the same input, which a checkpoint keeps apart,
    and lies as [out, in] like them; GPT-2's Conv1D lies as [in, out] there.
    """

    tensors: tuple[tuple[str, Shape], ...]
    """(name, shape) in the checkpoint, joined along their first axis in this order."""
    is_transposed: bool = False  # the parameter is the transpose of the joined tensors
    num_stacked: int | None = None
    """The tensors are so many equal groups, one for each expert: each is joined and transposed on
    its own, and they are stacked."""
    is_wide: bool = False  # float32, in whatever dtype a model computes
    is_vector: bool = False  # the parameter has one axis, whatever shape its one tensor has

    @property
    def shape(self) -> Shape:
        """The shape of the parameter."""
        if self.is_vector:
            return (math.prod(self.tensors[0][1]),)
        group = self.tensors[: len(self.tensors) // (self.num_stacked or 1)]
        joined = (sum(shape[0] for _, shape in group), *group[0][1][1:])
        one = (*joined[:-2], *joined[:-3:-1]) if self.is_transposed else joined
        return one if self.num_stacked is None else (self.num_stacked, *one)

    def dtype(self, wanted: Any) -> np.dtype:
        """What it is kept in by a model that computes in `wanted`."""
        return np.dtype(np.float32 if self.is_wide else wanted)

    def views(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Each tensor's name, and its part of the parameter in the tensor's own orientation.

        Views, so a tensor may be read from the parameter or written into it.
        """
        if self.is_vector:
            name, shape = self.tensors[0]
            yield name, array.reshape(shape)
            return
        stacked = array if self.num_stacked is not None else array[None]
        per_group = len(self.tensors) // len(stacked)
        for index, one in enumerate(stacked):
            rows, start = one.swapaxes(-1, -2) if self.is_transposed else one, 0
            for name, shape in self.tensors[index * per_group : (index + 1) * per_group]:
                yield name, rows[start : start + shape[0]]
                start += shape[0]


def parameter_sources(config: ModelConfig) -> dict[str, Any]:
    """The tree of `init_params`, with a `Source` in the place of each array."""
    _, family = family_of(config.architecture)
    width, vocab = config.hidden_size, config.vocab_size
    parts: dict[str, Parts] = {
        "embed": ([(vocab, width)], False),
        "final_norm": ([(width,)], config.has_norm_bias),
    }
    if config.layer_embed_size:
        of_layers = config.num_layers * config.layer_embed_size
        parts["layer_embed"] = ([(config.layer_embed_vocab, of_layers)], False)
        parts["layer_proj"] = ([(of_layers, width)], False)
        parts["layer_proj_norm"] = ([(config.layer_embed_size,)], False)
    if config.side_streams:
        squares: list[Shape] = [(width, width)] * config.side_streams
        parts |= {"streams_in": (squares, False), "streams_out": (squares, False)}
    if config.has_learned_positions:
        parts["position_embed"] = ([(config.max_position, width)], False)
    if not config.tie_embeddings:
        parts["lm_head"] = ([(vocab, width)], False)
    sources: dict[str, Any] = _sources(parts, family, family.head_names, "")
    for layer in range(config.num_layers):
        prefix = family.block_prefix.format(layer)
        parts = _block_parts(config, layer)
        block = _sources(parts, family, family.block_names, prefix)
        if config.is_sparse(layer):
            block |= _expert_sources(config, family, prefix)
        sources[f"layers_{layer}"] = block
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


def _block_parts(config: ModelConfig, layer: int) -> dict[str, Parts]:
    """What each parameter of a layer joins, kernels as [out, in]; experts apart."""
    config = config.at(layer)
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    has_norm_bias = config.has_norm_bias
    of_queries = queries * (2 if config.has_attention_gate else 1)
    is_borrowing = config.kv_layer(layer) != layer
    parts: dict[str, Parts] = {
        "qkv": ([(of_queries, width), (keys, width), (keys, width)], config.qkv_bias)
    }
    if is_borrowing:
        parts = {"q": ([(queries, width)], config.qkv_bias)}
    elif config.has_keys_as_values:
        parts = {"qk": ([(queries, width), (keys, width)], config.qkv_bias)}
    is_recurrent = config.is_recurrent(layer)
    if config.kv_rank:
        parts = _latent_parts(config)
    if not config.has_pages(layer):
        parts = {}
    else:
        of_values = config.num_heads * (config.value_dim or config.head_dim)
        parts["o"] = ([(width, of_values)], config.o_bias)
    has_mlp = layer not in config.mlpless_layers
    if is_recurrent:
        parts |= _recurrent_parts(config)
    for part in ("attn",) * (layer not in config.mixerless_layers) + ("mlp",) * has_mlp:
        if config.has_pre_norm and not (config.is_parallel and part == "mlp"):
            parts[f"{part}_norm"] = ([(width,)], has_norm_bias)
        if config.has_post_norm:
            parts[f"{part}_post_norm"] = ([(width,)], has_norm_bias)
    has_attention = config.has_pages(layer)
    if config.has_sinks and has_attention:
        parts["sinks"] = ([(config.num_heads,)], False)
    if config.qk_norm and has_attention:
        is_joint, head_dim = config.is_qk_norm_joint, config.head_dim
        parts["q_norm"] = ([(queries if is_joint else head_dim,)], has_norm_bias)
        if not is_borrowing:
            parts["k_norm"] = ([(keys if is_joint else head_dim,)], has_norm_bias)
    if config.layer_embed_size:
        parts["layer_gate"] = ([(config.layer_embed_size, width)], False)
        parts["layer_up"] = ([(width, config.layer_embed_size)], False)
        parts["layer_post_norm"] = ([(width,)], False)
    if config.has_layer_scale:
        parts["layer_scale"] = ([(1,)], False)
    if config.side_streams:
        count = config.side_streams + 1
        parts["stream_router"] = ([(count, width)], False)
        parts["stream_router_norm"] = ([(width,)], False)
        parts["stream_guess"] = ([(count * count, count)], False)
        parts["stream_correct"] = ([(count, count)], False)
        if config.layer_embed_size:
            parts["stream_scale"] = ([(width,)], False)
    if config.bypass_rank:
        parts["bypass_down"] = ([(config.bypass_rank, width)], False)
        parts["bypass_up"] = ([(width, config.bypass_rank)], False)
        parts["bypass_norm"] = ([(width,)], False)
    if config.is_sparse(layer):
        count = config.num_experts
        parts["router"] = ([(count, width)], config.has_expert_bias)
        if config.has_expert_bias:
            parts["experts_gate_up_bias"] = ([(count, 2 * config.expert_size)], False)
            parts["experts_down_bias"] = ([(count, width)], False)
        if config.expert_latent:
            latent = config.expert_latent
            parts["experts_in"] = ([(latent, width)], config.mlp_bias)
            parts["experts_out"] = ([(width, latent)], config.mlp_bias)
        if config.has_router_correction:
            parts["router_correction"] = ([(count,)], False)
        if config.has_shared_gate:
            parts["shared_gate"] = ([(1, width)], False)
        if config.shared_expert_size:
            shared = config.shared_expert_size
            if config.is_gated:
                parts["shared_gate_up"] = ([(shared, width), (shared, width)], False)
            else:
                parts["shared_up"] = ([(shared, width)], False)
            parts["shared_down"] = ([(width, shared)], False)
        if not config.has_dense_beside:
            return parts
        for name in ("experts_norm", "experts_post_norm", "dense_post_norm", "router_scale"):
            parts[name] = ([(width,)], False)
        parts["experts_scale"] = ([(count,)], False)
    if not has_mlp:
        return parts
    if config.is_gated:
        parts["gate_up"] = ([(inner, width), (inner, width)], config.mlp_bias)
    else:
        parts["up"] = ([(inner, width)], config.mlp_bias)
    if config.activation == "xielu":
        parts |= {name: ([(1,)], False) for name in CURVE}
    return parts | {"down": ([(width, inner)], config.mlp_bias)}


def _latent_parts(config: ModelConfig) -> dict[str, Parts]:
    """What queries, keys and values come from, where these come from latents."""
    width, rank, heads = config.hidden_size, config.kv_rank, config.num_heads
    turning, has_bias = config.rotary_dim or 0, config.qkv_bias
    of_head = config.head_dim - turning + config.value_dim
    parts: dict[str, Parts] = {
        "kv_a": ([(rank + turning, width)], has_bias),
        "kv_a_norm": ([(rank,)], False),
        "kv_b": ([(heads * of_head, rank)], False),
    }
    if not config.query_rank:
        parts["q"] = ([(heads * config.head_dim, width)], False)
        return parts
    parts["q_a"] = ([(config.query_rank, width)], has_bias)
    parts["q_a_norm"] = ([(config.query_rank,)], False)
    parts["q_b"] = ([(heads * config.head_dim, config.query_rank)], False)
    return parts


def _recurrent_parts(config: ModelConfig) -> dict[str, Parts]:
    """What a layer that keeps a state has in place of attention."""
    sizes, width = config.recurrent, config.hidden_size
    assert sizes is not None, "the layer is recurrent"
    heads, channels, values = sizes.num_value_heads, sizes.num_channels, sizes.num_values
    if sizes.kind == "convolution":
        return {
            "in_proj": ([(3 * channels, width)], sizes.has_bias),
            "conv": ([(channels, 1, sizes.conv_width)], sizes.has_conv_bias),
            "out_proj": ([(width, channels)], sizes.has_bias),
        }
    if sizes.kind == "space":
        return {
            "in_proj": ([(values + channels + heads, width)], sizes.has_bias),
            "conv": ([(channels, 1, sizes.conv_width)], sizes.has_conv_bias),
            "a_log": ([(heads,)], False),
            "dt_bias": ([(heads,)], False),
            "state_skip": ([(heads,)], False),
            "out_proj": ([(width, values)], sizes.has_bias),
            **({"state_norm": ([(values,)], False)} if sizes.has_norm else {}),
        }
    return {
        "in_proj": ([(channels, width), (values, width)], False),
        "ba_proj": ([(heads, width), (heads, width)], False),
        "conv": ([(channels, 1, sizes.conv_width)], False),
        "a_log": ([(heads,)], False),
        "dt_bias": ([(heads,)], False),
        "state_norm": ([(sizes.value_dim,)], False),
        "out_proj": ([(width, values)], False),
    }


def _sources(
    parts: dict[str, Parts], family: Family, names: Names, prefix: str
) -> dict[str, Source]:
    """Parameters with the names of their tensors; one name for several shapes has them joined.

    Where it has {}, they are numbered.
    """
    sources = {}
    for parameter, (shapes, has_bias) in parts.items():
        tensors = [prefix + name for name in names[parameter]]
        if "{}" in tensors[0]:
            tensors = [tensors[0].format(number) for number in range(len(shapes))]
        if len(tensors) == 1:
            shapes = [(sum(shape[0] for shape in shapes), *shapes[0][1:])]
        if has_bias:
            biases = [name.removesuffix("weight") + "bias" for name in tensors]
            rows = [shape[:1] for shape in shapes]
            sources[f"{parameter}_bias"] = Source(tuple(zip(biases, rows, strict=True)))
        is_in_out = family.is_kernel_in_out and names is family.block_names
        is_transposed = is_in_out and len(shapes[0]) == 2
        is_vector = parameter in family.vectors
        if is_vector:
            shapes = [family.vectors[parameter](shapes[0])]
        if is_transposed:
            shapes = [shape[::-1] for shape in shapes]
        sources[parameter] = Source(
            tuple(zip(tensors, shapes, strict=True)),
            is_transposed,
            is_wide=parameter in _WIDE,
            is_vector=is_vector,
        )
    return sources


def _expert_sources(config: ModelConfig, family: Family, prefix: str) -> dict[str, Source]:
    """The kernels of all experts, in one array each; some checkpoints have them so."""
    width, inner, count = config.hidden_size, config.expert_size, config.num_experts
    width = config.expert_latent or width
    if "{}" not in family.block_names["experts_down"][0]:
        wholes = {"experts_gate_up": (count, width, 2 * inner)}
        wholes["experts_down"] = (count, inner, width)
        is_turned = family.is_expert_out_in
        if is_turned:
            wholes = {name: (count, *shape[:0:-1]) for name, shape in wholes.items()}
        return {
            parameter: Source(((prefix + family.block_names[parameter][0], shape),), is_turned)
            for parameter, shape in wholes.items()
        }
    up = "experts_gate_up" if config.is_gated else "experts_up"
    shapes = {up: (inner, width), "experts_down": (width, inner)}
    return {
        parameter: Source(
            tuple(
                (prefix + name.format(expert), shape)
                for expert in range(count)
                for name in family.block_names[parameter]
            ),
            is_transposed=True,
            num_stacked=count,
        )
        for parameter, shape in shapes.items()
    }
