"""A model over several devices: which part of each parameter one of them has.

Attention and recurrences are cut by heads, MLPs by their inner width, embedding and head by the
vocabulary; all else each device has whole. A device then runs the module of a smaller config
(`part_of`), and what its part of a layer adds to the stream is summed over all (`sum_parts`), twice
a layer:

    stream ─> qkv of some heads ─> attention ─> o ─┐ sum ─> gate and up ─> down ─┐ sum ─> stream

A kernel that several products share lies in parts, one for each device, [n, rows, E]: contiguous
pieces of [queries | keys | values] would be no device's heads. That form is `cut`; `join` is the
inverse. Both take NumPy arrays, on the host, and JAX's.

Axes: n devices, H query heads, K key and value heads, D head dim, E stream, F inner width, V
vocabulary, X experts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from folojax.models.core import peer_sum
from folojax.models.core.config import ModelConfig
from folojax.models.core.recurrent_shards import cut_recurrent, join_recurrent, part_of_recurrent
from folojax.models.quantized.by_outputs import arrays_by_output, axes_of, kernel_by_output
from folojax.models.quantized.quantize import VOCABULARY, is_quantized

AXIS = "tensor"
"""Of the mesh over which a model is cut."""

STATE_SPECS = PartitionSpec(None, None, AXIS), PartitionSpec(None, AXIS)
"""How the arrays of a recurrent layer's state lie (`recurrence.RecurrentState`)."""

VOCAB_BLOCK = 128
"""Tokens that a sampler looks at together (`folojax.sampling.draws`)."""

_MOST_FILLED = 1.125
"""Rows of the vocabulary with those that fill the devices' blocks, to those without."""

_AXES = {
    "embed": 0,
    "lm_head": 0,
    "layer_embed": 0,
    "up": 0,
    "up_bias": 0,
    "shared_up": 0,
    "shared_up_bias": 0,
    "experts_up": 2,
    "o": 1,
    "down": 1,
    "experts_down": 1,
    "shared_down": 1,
    "sinks": 0,
    "q": 0,
    "q_b": 0,
    "kv_b": 0,
    "a_log": 0,
    "dt_bias": 0,
    "state_skip": 0,
    "out_proj": 1,
}
"""The axis along which a parameter is cut, in the order in which it has it anyway."""

_RANKS = {
    "qkv": 2,
    "qkv_bias": 1,
    "qk": 2,
    "qk_bias": 1,
    "gate_up": 2,
    "gate_up_bias": 1,
    "experts_gate_up": 3,
    "experts_gate_up_bias": 2,
    "shared_gate_up": 2,
    "shared_gate_up_bias": 1,
    "in_proj": 2,
    "in_proj_bias": 1,
    "ba_proj": 2,
    "conv": 3,
    "conv_bias": 1,
}
"""Axes of those that lie in parts, which are one more axis, in front."""

_RECURRENT = ("in_proj", "in_proj_bias", "ba_proj", "conv", "conv_bias")
"""Those of recurrent layers among them."""

_JOINT = ("q_norm", "k_norm")
"""Cut by heads where one norm is over all of them."""


def problems_of(config: ModelConfig, count: int) -> list[str]:
    """Why a model cannot be cut for so many devices."""
    sizes = {"num_heads": config.num_heads}
    layers = set(range(config.num_layers)) - {*config.mlpless_layers}
    if config.has_dense_beside or not all(map(config.is_sparse, layers)):
        sizes["intermediate_size"] = config.intermediate_size
        widths = enumerate(config.intermediate_sizes)
        sizes |= {f"intermediate_size of layer {layer}": width for layer, width in widths}
    if config.num_experts:
        sizes |= {name: getattr(config, name) for name in ("expert_size", "shared_expert_size")}
    if config.recurrent and not config.recurrent.has_memory:
        sizes["num_channels of short convolutions"] = config.recurrent.num_channels
    elif config.recurrent:
        sizes["num_value_heads of recurrent layers"] = config.recurrent.num_value_heads
        if config.recurrent.is_by_key_head:
            sizes["num_key_heads of recurrent layers"] = config.recurrent.num_key_heads
    found = [
        f"{name} is {size}, not a multiple of it" for name, size in sizes.items() if size % count
    ]
    for name in ("num_kv_heads", "full_kv_heads"):
        heads = getattr(config, name)
        if heads and heads % count and count % heads:
            found.append(f"{name} is {heads}, neither a multiple nor a part of it")
    if config.full_kv_heads and not config.has_keys_as_values and count > 1:
        # A kernel is cut by the heads that its name tells (`ModelConfig.heads_in`).
        found.append(
            "full_kv_heads is set and has_keys_as_values is not: qkv has heads of two kinds"
        )
    keys = config.recurrent.num_key_heads if config.recurrent else count
    if keys % count and count % keys:
        found.append(
            f"num_key_heads of recurrent layers is {keys}, neither a multiple nor a part of it"
        )
    return found


def part_of(config: ModelConfig, count: int, peers: int = 0) -> ModelConfig:
    """The config of what one of `count` devices runs; `problems_of` are none.

    `peers` is that of the config.
    """
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // count,
        num_kv_heads=max(config.num_kv_heads // count, 1),
        full_kv_heads=config.full_kv_heads and max(config.full_kv_heads // count, 1),
        intermediate_size=max(config.intermediate_size // count, 1),
        intermediate_sizes=tuple(one // count for one in config.intermediate_sizes),
        expert_size=config.expert_size // count,
        shared_expert_size=config.shared_expert_size // count,
        recurrent=config.recurrent and part_of_recurrent(config.recurrent, count),
        num_shards=count,
        peers=peers,
    )


def kv_copies(num_kv_heads: int, count: int) -> int:
    """How many devices have the same heads of keys and values: 1 unless these are too few."""
    return max(1, count // num_kv_heads)


def sum_parts(x: Any, config: ModelConfig, num_parts: int | None = None) -> Any:
    """The sum of what each device has computed; of a model that is not cut, `x` itself.

    With `num_parts` it is of so many neighbours, which have the same one.
    """
    count = config.num_shards
    if num_parts not in (None, count):
        if num_parts == 1:
            return x
        groups = np.arange(count).reshape(-1, num_parts).tolist()
        return jax.lax.psum(x, AXIS, axis_index_groups=groups)
    if count == 1:
        return x
    if peer_sum.is_taken(x, config.peers):
        return peer_sum.sum_over_peers(x, config.peers)
    return jax.lax.psum(x, AXIS)


def spec_of(name: str, config: ModelConfig) -> PartitionSpec:
    """How a parameter lies over the mesh, in the form of `cut`."""
    if name in _RANKS or (name in _JOINT and config.is_qk_norm_joint):
        return PartitionSpec(AXIS)
    if name == "state_norm" and config.recurrent and config.recurrent.kind == "space":
        return PartitionSpec(AXIS)  # over all values
    axis = _AXES.get(name)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)


def stack_specs(name: str) -> tuple[PartitionSpec, PartitionSpec]:
    """How the low-rank updates of a kernel lie (`adapted.Stack`): each `a`, and each `b`.

    Where a kernel is cut by its outputs, `b` is; where by its inputs, `a` is: then each device adds
    its part of the update to its part of the product, before these are summed.
    """
    if name in _RANKS or _AXES.get(name) == 0:
        return PartitionSpec(), PartitionSpec(None, None, AXIS)
    if _AXES.get(name) == 1:
        return PartitionSpec(None, None, None, AXIS), PartitionSpec()
    return PartitionSpec(), PartitionSpec()


def specs_of(name: str, leaf: Any, config: ModelConfig) -> list[PartitionSpec]:
    """The same of all arrays of a parameter, of which a quantised one has several."""
    spec, axis = spec_of(name, config), _AXES.get(name)
    if not is_quantized(leaf):
        return [spec]
    if name in _RANKS or axis is None:
        return [spec] * len(leaf)
    return [
        PartitionSpec() if one is None else PartitionSpec(*[None] * one, AXIS)
        for one in axes_of(leaf, axis)
    ]


def part_shape(name: str, kernel: Any, config: ModelConfig, count: int) -> tuple[int, int]:
    """Outputs and inputs that a device has of a kernel [O, I]; 0 inputs if these do not divide."""
    whole = jax.ShapeDtypeStruct(kernel.shape, jnp.bool_)
    form = jax.eval_shape(lambda whole: _cut_rows(name, whole, config, count), whole)
    *_, outputs, inputs = form.shape
    axis = _AXES.get(name)
    if axis == 1:
        inputs = 0 if inputs % count else inputs // count
    return outputs // count if axis == 0 else outputs, inputs


def is_cut(name: str, leaf: Any) -> bool:
    """Whether a parameter lies in parts."""
    return name in _RANKS and len(leaf.shape) == _RANKS[name] + 1


def parts_of(params: Any) -> int:
    """How many devices parameters are cut for; 1: they are as the module has them."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    found = (leaf.shape[0] for path, leaf in flat if is_cut(_name(path), leaf))
    return next(found, 1)


def cut(name: str, leaf: Any, config: ModelConfig, count: int) -> Any:
    """A parameter as it lies over `count` devices; one that lies so already stays as it is."""
    if is_quantized(leaf):
        return _cut_kernel(name, leaf, config, count)
    return leaf if is_cut(name, leaf) else _cut_rows(name, leaf, config, count)


def _cut_kernel(name: str, kernel: Any, config: ModelConfig, count: int) -> Any:
    if is_cut(name, kernel) or (name not in _RANKS and name not in VOCABULARY):
        return kernel
    arrays = [_cut_rows(name, one, config, count) for one in arrays_by_output(kernel)]
    if name in VOCABULARY:
        return kernel_by_output(type(kernel), arrays)
    parts = [kernel_by_output(type(kernel), [one[part] for one in arrays]) for part in range(count)]
    xp: Any = np if isinstance(arrays[0], np.ndarray) else jnp
    return type(kernel)(*(xp.stack(some) for some in zip(*parts, strict=True)))


def _cut_rows(name: str, leaf: Any, config: ModelConfig, count: int) -> Any:
    """Of an array that does not lie in parts; its first axis are outputs, but of experts."""
    xp: Any = np if isinstance(leaf, np.ndarray) else jnp
    if name in VOCABULARY:
        missing = max(count * vocab_rows(_vocab(name, config), count) - leaf.shape[0], 0)
        return xp.pad(leaf, ((0, missing), *[(0, 0)] * (leaf.ndim - 1))) if missing else leaf
    copies, dim = kv_copies(config.num_kv_heads, count), config.head_dim
    if name == "k_norm" and config.is_qk_norm_joint and leaf.size == config.num_kv_heads * dim:
        return xp.repeat(leaf.reshape(-1, dim), copies, axis=0).reshape(-1)
    if name not in _RANKS:
        return leaf
    if name.startswith("experts_gate_up") and config.swiglu_limit is not None:  # in turn, [_, 2F]
        return xp.moveaxis(leaf.reshape(*leaf.shape[:-1], count, -1), -2, 0)
    if name == "experts_gate_up":  # [X, E, 2F]
        halves = leaf.reshape(*leaf.shape[:2], 2, count, -1)
        return xp.moveaxis(halves, 3, 0).reshape(count, *leaf.shape[:2], -1)
    rest = leaf.shape[1:]
    if name in _RECURRENT and config.recurrent:
        return cut_recurrent(name, leaf, config.recurrent, count)
    if "gate_up" in name:
        return leaf.reshape(2, count, -1, *rest).swapaxes(0, 1).reshape(count, -1, *rest)
    heads = config.heads_in(name)
    query, *others = xp.split(leaf.reshape(sum(heads), -1, *rest), np.cumsum(heads[:-1]).tolist())
    others = [xp.repeat(one, kv_copies(heads[1], count), axis=0) for one in others]
    return xp.concatenate([one.reshape(count, -1, *rest) for one in (query, *others)], axis=1)


def join(name: str, leaf: Any, config: ModelConfig, count: int) -> Any:
    """A parameter as the module has it; the inverse of `cut`."""
    if not is_quantized(leaf):
        is_whole = name in _RANKS and not is_cut(name, leaf)
        return leaf if is_whole else _join_rows(name, leaf, config, count)
    if name in VOCABULARY:
        arrays = arrays_by_output(leaf)
    elif is_cut(name, leaf):
        parts = [arrays_by_output(type(leaf)(*(one[i] for one in leaf))) for i in range(count)]
        xp: Any = np if isinstance(parts[0][0], np.ndarray) else jnp
        arrays = [xp.stack(some) for some in zip(*parts, strict=True)]
    else:
        return leaf
    arrays = [_join_rows(name, one, config, count) for one in arrays]
    return kernel_by_output(type(leaf), arrays)


def _join_rows(name: str, leaf: Any, config: ModelConfig, count: int) -> Any:
    """The inverse of `_cut_rows`."""
    xp: Any = np if isinstance(leaf, np.ndarray) else jnp
    if name in VOCABULARY:
        return leaf[: _vocab(name, config)]
    copies, dim = kv_copies(config.num_kv_heads, count), config.head_dim
    if name == "k_norm" and config.is_qk_norm_joint:
        heads = leaf.reshape(-1, dim)
        return leaf if len(heads) == config.num_kv_heads else heads[::copies].reshape(-1)
    if name not in _RANKS:
        return leaf
    if name.startswith("experts_gate_up") and config.swiglu_limit is not None:
        return xp.moveaxis(leaf, 0, -2).reshape(*leaf.shape[1:-1], -1)
    if name == "experts_gate_up":
        halves = leaf.reshape(*leaf.shape[:3], 2, -1)
        return xp.moveaxis(halves, 0, 3).reshape(*leaf.shape[1:3], -1)
    rest = leaf.shape[2:]
    if name in _RECURRENT and config.recurrent:
        return join_recurrent(name, leaf, config.recurrent, count)
    if "gate_up" in name:
        return leaf.reshape(count, 2, -1, *rest).swapaxes(0, 1).reshape(-1, *rest)
    heads = part_of(config, count).heads_in(name)
    copies = kv_copies(config.heads_in(name)[1], count)
    parts = leaf.reshape(count, sum(heads), -1, *rest)
    query, *others = (
        one.reshape(-1, *one.shape[2:])
        for one in xp.split(parts, np.cumsum(heads[:-1]).tolist(), axis=1)
    )
    return xp.concatenate([query, *(one[::copies] for one in others)]).reshape(-1, *rest)


def cut_params(params: Any, config: ModelConfig, count: int) -> Any:
    """Parameters as they lie over so many devices, of those that the module has."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: cut(_name(path), leaf, config, count), params, is_leaf=is_quantized
    )


def join_params(params: Any, config: ModelConfig) -> Any:
    """Parameters as the module has them, of `LLM.params` of an engine on however many devices.

    Pure: what lies in parts is copied, the rest and the parameters of one device are not.

    Args:
        params: `LLM.params`, or what a function has made of them; of NumPy or JAX.
        config: Of the model.
    """
    count = parts_of(params)
    if count == 1:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: join(_name(path), leaf, config, count), params, is_leaf=is_quantized
    )


def whole_shapes(params: Any, config: ModelConfig) -> Any:
    """Shapes of parameters as the module has them, of those of an engine, or of shapes."""
    return jax.eval_shape(lambda params: join_params(params, config), params)


def _name(path: Any) -> str:
    """Of a parameter in its layer or model; "" of what is none."""
    return str(getattr(path[-1], "key", "")) if path else ""


def _vocab(name: str, config: ModelConfig) -> int:
    """How many tokens an embedding tells apart."""
    return config.layer_embed_vocab if name == "layer_embed" else config.vocab_size


def vocab_rows(vocab_size: int, count: int) -> int:
    """Rows of the embedding that each of so many devices has.

    Whole blocks of the sampler, so that each draws from its own (`has_whole_blocks`), unless that
    were many more rows.
    """
    rows = -(-vocab_size // count)
    whole = rows + -rows % VOCAB_BLOCK
    return whole if count > 1 and count * whole <= vocab_size * _MOST_FILLED else rows


def has_whole_blocks(config: ModelConfig) -> bool:
    """Whether a device has rows of the vocabulary that it can draw from."""
    return vocab_rows(config.vocab_size, config.num_shards) % VOCAB_BLOCK == 0


def own_rows(
    index: Int[Array, " N"], vocab_size: int, count: int
) -> tuple[Int[Array, " N"], Bool[Array, " N"]]:
    """Where rows of an embedding lie in a device's part of it, and which of them lie there."""
    rows = vocab_rows(vocab_size, count)
    index = jnp.clip(index, 0, vocab_size - 1) - jax.lax.axis_index(AXIS) * rows
    return index, (index >= 0) & (index < rows)


def join_scores(scores: Float[Array, "M _"], config: ModelConfig) -> Float[Array, "M V"]:
    """Scores of the whole vocabulary, of which a device has computed some."""
    if config.num_shards == 1:
        return scores
    return jax.lax.all_gather(scores, AXIS, axis=1, tiled=True)[:, : config.vocab_size]
