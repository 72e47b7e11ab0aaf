"""What stands in the place of attention in layers that keep a state of each sequence."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from folojax.models.core.declared import ONES, ZEROS, kernel_of
from folojax.models.core.layers import norm, scaled, scaled_parts
from folojax.models.core.recurrence import l2_normed, split_inputs

if TYPE_CHECKING:
    from folojax.models.core.block import Block


def delta_rule(
    block: "Block", normed: Float[Array, "N E"], cache: Any, attend: Any
) -> tuple[Float[Array, "N E"], Any]:
    """The gated delta rule (`folojax.models.core.recurrence`).

    Its kernels, of K heads of keys and H of values:
        in_proj  [2K*D + 2H*Z, E]    queries | keys | values | gate of what is read
        ba_proj  [2H, E]             rate | decay, before their nonlinearities
        conv     [2K*D + H*Z, 1, W]  of queries, keys and values
    """
    config, sizes = block.config, block.config.recurrent
    assert sizes is not None, "the layer is recurrent"
    place = block.place
    heads, keys, values = sizes.num_value_heads, sizes.num_keys, sizes.num_values
    mixed = block.linear("in_proj", normed, sizes.num_channels + values, False)
    rates = block.linear("ba_proj", normed, 2 * heads, False)
    mixed, gate, rate, step = split_inputs(
        mixed.astype(block.dtype), rates.astype(block.dtype), sizes
    )
    kernel = kernel_of(block, "conv", sizes.num_channels, 1, sizes.conv_width)
    cache, mixed = attend.convolve(cache, place, mixed, kernel[:, 0])
    mixed = jax.nn.silu(mixed.astype(block.dtype))
    query, key, value = jnp.split(mixed, (keys, 2 * keys), axis=1)
    by_key = (-1, sizes.num_key_heads, sizes.key_dim)
    log_rate = block.param("a_log", ZEROS, (heads,), jnp.float32)
    bias = block.param("dt_bias", ONES, (heads,), jnp.float32)
    step = jax.nn.softplus(step.astype(jnp.float32) + bias[None, :])
    cache, out = attend.recur(
        cache,
        place,
        l2_normed(query.reshape(by_key)) * sizes.key_dim**-0.5,
        l2_normed(key.reshape(by_key)),
        value.reshape(-1, heads, sizes.value_dim),
        decay=-jnp.exp(log_rate)[None, :] * step,
        beta=jax.nn.sigmoid(rate.astype(jnp.float32)),
    )
    weight = block.param("state_norm", ONES, (sizes.value_dim,), block.dtype)
    # Its weight has no offset, whatever the other norms have.
    out = norm(out.astype(block.dtype), weight, None, dataclasses.replace(config, norm="rms"))
    gate = jax.nn.silu(gate.astype(jnp.float32)).reshape(out.shape)
    flat = (out * gate).astype(block.dtype).reshape(-1, values)
    out = block.linear("out_proj", flat, config.hidden_size, False, is_part=True)
    return out.astype(block.dtype), cache


def state_space(
    block: "Block", normed: Float[Array, "N E"], cache: Any, attend: Any
) -> tuple[Float[Array, "N E"], Any]:
    """The state space of Mamba-2: gated linear attention whose gates and values have a step.

    Its kernels, of K heads of keys and H of values:
        in_proj  [2H*Z + 2K*D + H, E]  gate of what is read | values | keys | queries | steps
        conv     [H*Z + 2K*D, 1, W]    of values, keys and queries
    What is read is normed in K groups. Dao and Gu (arXiv:2405.21060).
    """
    config, sizes = block.config, block.config.recurrent
    assert sizes is not None, "the layer is recurrent"
    heads, keys, values = sizes.num_value_heads, sizes.num_keys, sizes.num_values
    channels = sizes.num_channels
    mixed = block.linear("in_proj", normed, values + channels + heads, sizes.has_bias)
    mixed = mixed.astype(block.dtype)
    if sizes.in_scales:
        mixed = scaled_parts(mixed, (values, values, keys, keys, heads), sizes.in_scales)
    gate, mixed, step = jnp.split(mixed, (values, values + channels), axis=1)
    kernel = kernel_of(block, "conv", channels, 1, sizes.conv_width)
    cache, mixed = attend.convolve(cache, block.place, mixed, kernel[:, 0])
    if sizes.has_conv_bias:
        bias = kernel_of(block, "conv_bias", channels, init=ZEROS)
        mixed = mixed + bias.astype(jnp.float32)[None, :]
    mixed = jax.nn.silu(mixed.astype(block.dtype)).astype(jnp.float32)
    value, key, query = jnp.split(mixed, (values, values + keys), axis=1)
    value = value.reshape(-1, heads, sizes.value_dim)
    by_key = (-1, sizes.num_key_heads, sizes.key_dim)
    log_rate, skip, bias = (
        block.param(name, init, (heads,), jnp.float32)
        for name, init in (("a_log", ZEROS), ("state_skip", ONES), ("dt_bias", ONES))
    )
    step = jax.nn.softplus(step.astype(jnp.float32) + bias[None, :])
    step = jnp.clip(step, *sizes.step_limits)
    cache, out = attend.recur(
        cache,
        block.place,
        query.reshape(by_key),
        key.reshape(by_key),
        value * step[:, :, None],
        decay=-jnp.exp(log_rate)[None, :] * step,
    )
    out = (out + skip[None, :, None] * value).reshape(-1, values)
    gate = jax.nn.silu(gate.astype(jnp.float32))
    if not sizes.has_norm:
        flat = (out * gate).astype(block.dtype)
    elif sizes.is_normed_first:
        flat = (_normed_groups(block, out).astype(jnp.float32) * gate).astype(block.dtype)
    else:
        flat = _normed_groups(block, out * gate)
    out = block.linear("out_proj", flat, config.hidden_size, sizes.has_bias, is_part=True)
    return scaled(out, sizes.out_scale).astype(block.dtype), cache


def _normed_groups(block: "Block", out: Float[Array, "N W"]) -> Float[Array, "N W"]:
    """What is read of a state space, normed in groups as many as heads of keys."""
    sizes = block.config.recurrent
    assert sizes is not None, "the layer is recurrent"
    groups = out.reshape(-1, sizes.num_key_heads, out.shape[1] // sizes.num_key_heads)
    plain = jnp.ones(groups.shape[-1], jnp.float32)
    config = dataclasses.replace(block.config, norm="rms")
    groups = norm(groups, plain, None, config, sizes.key_copies)
    weight = block.param("state_norm", ONES, (sizes.num_values,), block.dtype)
    return groups.reshape(out.shape).astype(block.dtype) * weight[None, :]


def short_convolution(
    block: "Block", normed: Float[Array, "N E"], cache: Any, attend: Any
) -> tuple[Float[Array, "N E"], Any]:
    """A gate, each channel's sum over its last inputs, and another gate (LFM2).

    Its kernels, of Z channels:
        in_proj  [3Z, E]    first gate | second gate | inputs
        conv     [Z, 1, W]
    """
    sizes = block.config.recurrent
    assert sizes is not None, "the layer is recurrent"
    channels = sizes.num_channels
    mixed = block.linear("in_proj", normed, 3 * channels, sizes.has_bias).astype(block.dtype)
    first, second, inputs = jnp.split(mixed, 3, axis=1)
    kernel = kernel_of(block, "conv", channels, 1, sizes.conv_width)
    cache, out = attend.convolve(cache, block.place, first * inputs, kernel[:, 0])
    if sizes.has_conv_bias:
        bias = kernel_of(block, "conv_bias", channels, init=ZEROS)
        out = out + bias.astype(jnp.float32)[None, :]
    flat = second * out.astype(block.dtype)
    width = block.config.hidden_size
    out = block.linear("out_proj", flat, width, sizes.has_bias, is_part=True)
    return out.astype(block.dtype), cache


MIXERS = {"delta": delta_rule, "space": state_space, "convolution": short_convolution}
"""By `Recurrent.kind`."""
