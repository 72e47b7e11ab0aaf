"""Mixtures of experts: every token's MLP is a weighted sum of few out of many."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from folojax.models.core.config import ModelConfig
from folojax.models.core.expert_product import by_expert
from folojax.models.core.linear import activate, gated, project


class RoutedKernel(NamedTuple):
    """A router in a parameter tree, in place of the array, and what it is to choose.

    The weights of the experts are those of its own scores.
    """

    kernel: Any  # [X, E]
    expert: Int[Array, "N M"]  # of each token; below 0: the router chooses by itself


def with_routing(
    params: Mapping[str, Any], routing: Int[Array, "N L M"], config: ModelConfig
) -> dict[str, Any]:
    """Parameters of a model whose routers choose what they are told, for N tokens.

    Args:
        params: Of the model.
        routing: Of the L layers that have experts, in their order.
        config: Of the model.
    """
    sparse = [layer for layer in range(config.num_layers) if config.is_sparse(layer)]
    routed = dict(params)
    for place, layer in enumerate(sparse):
        routed[f"layers_{layer}"] = routed_block(params[f"layers_{layer}"], routing[:, place])
    return routed


def routed_block(block: Mapping[str, Any], expert: Int[Array, "N M"] | None) -> Mapping[str, Any]:
    """The parameters of a layer whose router chooses what it is told; None: what it likes."""
    if expert is None:
        return block
    return {**block, "router": RoutedKernel(block["router"], expert)}


class Experts(NamedTuple):
    """The parameters of a layer's experts, and of the router that chooses among them."""

    router: Float[Array, "X E"] | RoutedKernel
    gate_up: Float[Array, "X E FF"]  # [X, E, F] of those without gates
    down: Float[Array, "X F E"]
    correction: Float[Array, " X"] | None = None
    router_bias: Float[Array, " X"] | None = None
    gate_up_bias: Float[Array, "X FF"] | None = None
    down_bias: Float[Array, "X E"] | None = None
    scale: Float[Array, " X"] | None = None  # multiplies the weight of each


def mix_experts(
    x: Float[Array, "N E"],
    experts: Experts,
    config: ModelConfig,
    routed: Float[Array, "N _"] | None = None,
) -> tuple[Float[Array, "N E"], Int[Array, "N M"]]:
    """Sends every token to its likeliest experts and adds what they return, by their weights.

    The (token, expert) pairs are sorted by expert, so each expert multiplies one run of rows:
        pairs   a.2 a.7 b.2 b.5 c.7  ->  a.2 b.2 | b.5 | a.7 c.7
    No loop over tokens or experts, and no capacity that would drop a token for its neighbours.

    Args:
        x: What experts read.
        experts: Of the layer.
        config: Of the model.
        routed: What the router reads; None: what experts do.

    Returns:
        What is to be added to the stream, and which experts each token was sent to.
    """
    num_tokens, width = x.shape
    count, per_token = config.num_experts, config.num_experts_per_token
    router, forced = experts.router, None
    if isinstance(router, RoutedKernel):
        router, forced = router
    with jax.named_scope("route"):
        weight, expert = choose_experts(
            _plus(project(x if routed is None else routed, router), experts.router_bias),
            x.dtype,
            config,
            experts.correction,
            forced,
        )
        if experts.scale is not None:
            weight = weight * experts.scale[expert].astype(weight.dtype)
        pair_expert = expert.reshape(-1)
        order = jnp.argsort(pair_expert)
        sizes = jnp.bincount(pair_expert, length=count)
    rows = x[order // per_token]
    if config.router == "sigmoid_of_input":
        rows = rows * weight.reshape(-1)[order][:, None].astype(x.dtype)
        weight = jnp.ones_like(weight)
    of_row = pair_expert[order]
    both = _plus(by_expert(rows, experts.gate_up, sizes), experts.gate_up_bias, of_row)
    inner = _gated(both, config).astype(x.dtype)
    sorted_out = _plus(by_expert(inner, experts.down, sizes), experts.down_bias, of_row)
    out = jnp.zeros_like(sorted_out).at[order].set(sorted_out, unique_indices=True)
    mixed = (out.reshape(num_tokens, per_token, width) * weight[:, :, None]).sum(1)
    return mixed.astype(x.dtype), expert


def choose_experts(
    scores: Float[Array, "N X"],
    dtype: DTypeLike,
    config: ModelConfig,
    correction: Float[Array, " X"] | None = None,
    forced: Int[Array, "N M"] | None = None,
) -> tuple[Float[Array, "N M"], Int[Array, "N M"]]:
    """The M experts of every token, and what each is multiplied by.

    Scores of kind "softmax" are rounded to `dtype` before, like the product of any linear layer.
    With groups, the best ones are those whose best experts have most together. Experts that are
    `forced` are taken in place of the likeliest, where they are not below 0.
    """
    if config.router.startswith("sigmoid"):
        weights = jax.nn.sigmoid(scores)
    else:
        weights = jax.nn.softmax(scores.astype(dtype).astype(jnp.float32), axis=-1)
    wanted = weights if correction is None else weights + correction[None, :]
    groups = config.num_expert_groups
    if groups > 1:
        grouped = wanted.reshape(len(scores), groups, -1)
        of_group = jax.lax.top_k(grouped, config.num_best_of_group)[0].sum(axis=-1)
        _, best = jax.lax.top_k(of_group, config.num_groups_per_token)
        is_best = (best[:, :, None] == jnp.arange(groups)[None, None, :]).any(axis=1)
        wanted = jnp.where(is_best[:, :, None], grouped, -jnp.inf).reshape(scores.shape)
    _, expert = jax.lax.top_k(wanted, config.num_experts_per_token)
    if forced is not None:
        expert = jnp.where(forced >= 0, forced, expert)
    weight = jnp.take_along_axis(weights, expert, axis=-1)
    if config.is_expert_weight_normed:
        tiny = 1e-20 if config.router == "sigmoid" else 0.0
        weight = weight / (weight.sum(axis=-1, keepdims=True) + tiny)
    return weight * config.expert_scale, expert


def _plus(x: Array, bias: Array | None, of_row: Array | None = None) -> Array:
    """With the bias, if there is one: the same for all rows, or that of each row's expert."""
    if bias is None:
        return x
    return x + (bias[None, :] if of_row is None else bias[of_row]).astype(x.dtype)


def _gated(both: Float[Array, "M FF"], config: ModelConfig) -> Float[Array, "M F"]:
    limit = config.swiglu_limit
    if not config.is_gated:
        return activate(both, config.activation)
    if limit is None:
        return gated(both, config.activation)
    gate, up = jnp.minimum(both[:, 0::2], limit), jnp.clip(both[:, 1::2], -limit, limit)
    return (up + 1.0) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)
