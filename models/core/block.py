"""One layer of a decoder: attention and an MLP, with what the flags of a config change."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from folojax.models.core.adapted import AdaptedKernel
from folojax.models.core.config import ModelConfig
from folojax.models.core.interface import Attend
from folojax.models.core.latent import into_latents, out_of_latents
from folojax.models.core.layers import (
    activate,
    add_and_norm,
    gated,
    norm,
    norm_and_rotate,
    project,
    rotate,
)
from folojax.models.core.moe import Experts, RoutedKernel, mix_experts
from folojax.models.core.recurrence import l2_normed, split_inputs
from folojax.models.core.shards import sum_parts
from folojax.models.quantized.quantize import is_quantized

# As transformers initialises: a fresh model is only ever a stand-in of the right shapes.
_KERNEL_INIT = nn.initializers.normal(0.02)
_ONES, _ZEROS = nn.initializers.ones, nn.initializers.zeros


class Rotary(NamedTuple):
    """How the queries and keys of tokens turn, and what multiplies queries that grow."""

    cos: Float[Array, "N 1 R"]
    sin: Float[Array, "N 1 R"]
    growth: Float[Array, "N 1 1"] | None = None


def norm_init(config: ModelConfig) -> Any:
    """Fresh norms change nothing."""
    return _ZEROS if config.norm == "rms_offset" else _ONES


def kernel_of(module: nn.Module, name: str, *shape: int, init: Any = _KERNEL_INIT) -> Any:
    """A module's kernel of that name and shape; it may be one of parts, or more than an array."""
    if module.has_variable("params", name):
        given: Any = module.get_variable("params", name)
        around = given if isinstance(given, AdaptedKernel | RoutedKernel) else None
        kernel = given if around is None else around.kernel
        if kernel.shape == (1, *shape):
            kernel = kernel[0]
        if around is not None or is_quantized(kernel) or kernel is not given:
            if kernel.shape != shape:
                raise ValueError(f"{name} is {kernel.shape}, the model needs {shape}")
            return kernel if around is None else around._replace(kernel=kernel)
    return module.param(name, init, shape, module.dtype)


class Unsummed(NamedTuple):
    """A residual stream and what is still to be added to it, by the norm that comes next."""

    stream: Float[Array, "N E"]
    update: Float[Array, "N E"]


def summed(stream: Float[Array, "N E"] | Unsummed) -> Float[Array, "N E"]:
    """The residual stream."""
    return stream.stream + stream.update if isinstance(stream, Unsummed) else stream


def normed(
    stream: Float[Array, "N E"] | Unsummed, weight: Any, bias: Any, config: ModelConfig
) -> tuple[Float[Array, "N E"], Float[Array, "N E"]]:
    """The residual stream and its norm."""
    if config.is_ordered and not isinstance(stream, Unsummed):
        stream = Unsummed(stream, jnp.zeros_like(stream))  # for the kernel that sums in order
    if isinstance(stream, Unsummed):
        return add_and_norm(*stream, weight, bias, config)
    return stream, norm(stream, weight, bias, config)


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to the residual stream.

    Kernels lie as [out, in], as in checkpoints. Those that read the same input are one array, so a
    step has few leaves and fewer, larger products:
        qkv      [(H + 2K) * D, E]   queries | keys | values, head-major
        gate_up  [2F, E]             gate | up
    With gated attention `qkv` begins with 2D rows a head, queries | gate. A recurrent layer has
    other kernels in place of `qkv` and `o` (`_recurrent`).
    A layer of X experts has router [X, E], experts_gate_up [X, E, 2F] and experts_down [X, F, E];
    one that is shared by all tokens, shared_gate_up and shared_down.
    Those of linear layers may each be a `QuantizedKernel` or an `AdaptedKernel` instead.

    `layer` says what the config asks of it; `cache_layer`, if given, its place in the cache. With
    `leaves_sum` the last sum is left to the next layer's norm.
    """

    config: ModelConfig
    dtype: Any
    layer: int
    cache_layer: int | None = None
    leaves_sum: bool = False

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "N E"] | Unsummed,
        rotary: Rotary | None,
        cache: Any,
        attend: Attend,
    ) -> tuple[Float[Array, "N E"] | Unsummed, Any]:
        """Returns the residual stream after this layer and the cache `attend` gave back."""
        with jax.named_scope("attention"):
            hidden, inputs = self._normed("attn", hidden)
            mix = self._recurrent if self.config.is_recurrent(self.layer) else self._attention
            update, cache = mix(inputs, rotary, cache, attend)
        with jax.named_scope("mlp"):
            stream = self._after("attn", hidden, update)
            if self.config.is_parallel:
                hidden = summed(stream)
            else:
                hidden, inputs = self._normed("mlp", stream)
            out = self._after("mlp", hidden, self._mlp(inputs))
            return out if self.leaves_sum else summed(out), cache

    def _after(
        self, part: str, hidden: Float[Array, "N E"], update: Float[Array, "N E"]
    ) -> Unsummed:
        """The residual stream and what a part adds to it."""
        if self.config.has_post_norm:
            update = self._norm(f"{part}_post_norm", update)
        if self.config.residual_scale != 1.0:
            scaled = update.astype(jnp.float32) * self.config.residual_scale
            update = scaled.astype(self.dtype)
        return Unsummed(hidden, update)

    def _normed(
        self, part: str, stream: Float[Array, "N E"] | Unsummed
    ) -> tuple[Float[Array, "N E"], Float[Array, "N E"]]:
        """The residual stream, and what a part reads of it."""
        if not self.config.has_pre_norm:
            return summed(stream), summed(stream)
        weight, bias = self._norm_params(f"{part}_norm", self.config.hidden_size)
        return normed(stream, weight, bias, self.config)

    def _attention(
        self,
        normed: Float[Array, "N E"],
        rotary: Rotary | None,
        cache: Any,
        attend: Attend,
    ) -> tuple[Float[Array, "N E"], Any]:
        config = self.config
        make = self._heads_of_latents if config.kv_rank else self._heads
        query, key, value, *rest = make(normed, rotary)
        place = self.layer if self.cache_layer is None else self.cache_layer
        options: dict[str, Any] = {"scoring": config.scoring(self.layer)}
        if config.has_sinks:
            options["sinks"] = self.param("sinks", _ZEROS, (config.num_heads,), self.dtype)
        cache, out = attend(cache, place, query, key, value, **options)
        if config.kv_rank:
            out = out_of_latents(out, rest[0], config.value_dim)
        elif rest:
            out = out * jax.nn.sigmoid(rest[0])
        flat = out.reshape(out.shape[0], -1)
        update = self._linear("o", flat, config.hidden_size, config.o_bias, is_part=True)
        return update.astype(self.dtype), cache

    def _heads(self, normed: Float[Array, "N E"], rotary: Rotary | None) -> Any:
        """Queries, keys and values, ready to attend; and the gate of gated attention."""
        config = self.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        of_queries = heads * (2 if config.has_attention_gate else 1)
        count = of_queries + 2 * kv_heads
        qkv = self._linear("qkv", normed, count * head_dim, config.qkv_bias)
        qkv = qkv.astype(self.dtype).reshape(-1, count, head_dim)
        if config.has_attention_gate:
            query, key, value = jnp.split(qkv, (of_queries, of_queries + kv_heads), axis=1)
            query, gate = query[:, 0::2], query[:, 1::2]
            return *self._norm_and_turn(query, key, rotary), value, gate
        query, key, value = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
        if rotary is not None and config.is_qk_norm_plain:
            of_query, of_key = (self._norm_params(f"{one}_norm", head_dim)[0] for one in "qk")
            return norm_and_rotate(qkv, of_query, of_key, rotary.cos, rotary.sin, config)
        return *self._norm_and_turn(query, key, rotary), value

    def _heads_of_latents(self, normed: Float[Array, "N E"], rotary: Rotary | None) -> Any:
        """The same in the space of latents, which are the values; and what leads out of it.

        Latents come first in queries and keys, then what turns; one key is that of all heads.
        """
        config, heads = self.config, self.config.num_heads
        assert config.rotary_dim is not None
        still = config.head_dim - config.rotary_dim
        latent, name = normed, "q"
        if config.query_rank:
            latent, name = self._latent("q", normed, config.query_rank)[0], "q_b"
        query = self._linear(name, latent, heads * config.head_dim, False).astype(self.dtype)
        query = query.reshape(-1, heads, config.head_dim)
        latent, turning = self._latent("kv", normed, config.kv_rank, config.rotary_dim)
        kernel = kernel_of(self, "kv_b", heads * (still + config.value_dim), config.kv_rank)
        query_turn, key_turn = self._norm_and_turn(query[..., still:], turning[:, None], rotary)
        absorbed = into_latents(query[..., :still], kernel, config.value_dim)
        query = jnp.concatenate((absorbed, query_turn), axis=-1)
        return query, jnp.concatenate((latent[:, None], key_turn), axis=-1), None, kernel

    def _latent(self, name: str, x: Float[Array, "N E"], rank: int, rest: int = 0) -> Any:
        """A normed latent, and what a product has beside it."""
        config = self.config
        out = self._linear(f"{name}_a", x, rank + rest, config.qkv_bias).astype(self.dtype)
        weight = self.param(f"{name}_a_norm", _ONES, (rank,), self.dtype)
        # Whatever the other norms have, as in transformers.
        small = dataclasses.replace(config, rms_norm_eps=1e-6)
        return norm(out[:, :rank], weight, None, small), out[:, rank:]

    def _recurrent(
        self, normed: Float[Array, "N E"], rotary: Rotary | None, cache: Any, attend: Any
    ) -> tuple[Float[Array, "N E"], Any]:
        """The gated delta rule in place of attention (`folojax.models.core.recurrence`).

        Its kernels, of K heads of keys and H of values:
            in_proj  [2K*D + 2H*Z, E]    queries | keys | values | gate of what is read
            ba_proj  [2H, E]             rate | decay, before their nonlinearities
            conv     [2K*D + H*Z, 1, W]  of queries, keys and values
        """
        config, sizes = self.config, self.config.recurrent
        assert sizes is not None, "the layer is recurrent"
        del rotary
        place = self.layer if self.cache_layer is None else self.cache_layer
        heads, keys, values = sizes.num_value_heads, sizes.num_keys, sizes.num_values
        mixed = self._linear("in_proj", normed, sizes.num_channels + values, False)
        rates = self._linear("ba_proj", normed, 2 * heads, False)
        mixed, gate, rate, step = split_inputs(
            mixed.astype(self.dtype), rates.astype(self.dtype), sizes
        )
        kernel = self.param(
            "conv", _KERNEL_INIT, (sizes.num_channels, 1, sizes.conv_width), self.dtype
        )
        cache, mixed = attend.convolve(cache, place, mixed, kernel[:, 0])
        mixed = jax.nn.silu(mixed.astype(self.dtype))
        query, key, value = jnp.split(mixed, (keys, 2 * keys), axis=1)
        by_key = (-1, sizes.num_key_heads, sizes.key_dim)
        log_rate = self.param("a_log", _ZEROS, (heads,), jnp.float32)
        bias = self.param("dt_bias", _ONES, (heads,), jnp.float32)
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
        weight = self.param("state_norm", _ONES, (sizes.value_dim,), self.dtype)
        # Its weight has no offset, whatever the other norms have.
        out = norm(out.astype(self.dtype), weight, None, dataclasses.replace(config, norm="rms"))
        gate = jax.nn.silu(gate.astype(jnp.float32)).reshape(out.shape)
        flat = (out * gate).astype(self.dtype).reshape(-1, values)
        return self._linear("out_proj", flat, config.hidden_size, False).astype(self.dtype), cache

    def _norm_and_turn(
        self, query: Float[Array, "N H D"], key: Float[Array, "N K D"], rotary: Rotary | None
    ) -> tuple[Float[Array, "N H D"], Float[Array, "N K D"]]:
        """Both with their norms and rotary embedding, as far as the layer has them."""
        config = self.config
        if config.qk_norm and not config.is_qk_norm_late:
            query, key = self._head_norm("q_norm", query), self._head_norm("k_norm", key)
        if rotary is not None:
            cos, sin, growth = rotary
            is_interleaved = config.is_rope_interleaved
            query = rotate(query, cos, sin, is_interleaved=is_interleaved)
            key = rotate(key, cos, sin, is_interleaved=is_interleaved)
            query = query if growth is None else query * growth
        if config.qk_norm and config.is_qk_norm_late:
            query, key = self._head_norm("q_norm", query), self._head_norm("k_norm", key)
        return query, key

    def _head_norm(self, name: str, x: Float[Array, "N heads D"]) -> Float[Array, "N heads D"]:
        if not self.config.is_qk_norm_joint:
            return self._norm(name, x)
        flat = x.reshape(x.shape[0], -1)
        weight, bias = self._norm_params(name, flat.shape[-1])
        return norm(flat, weight, bias, self.config, is_part=True).reshape(x.shape)

    def _mlp(self, normed: Float[Array, "N E"]) -> Float[Array, "N E"]:
        config, width = self.config, self.config.hidden_size
        if not config.is_sparse(self.layer):
            return self._dense("", normed, config.intermediate_size)
        count, inner_size = config.num_experts, config.expert_size
        experts = Experts(
            router=kernel_of(self, "router", count, width),
            gate_up=kernel_of(self, "experts_gate_up", count, width, 2 * inner_size),
            down=kernel_of(self, "experts_down", count, inner_size, width),
        )
        if config.router == "sigmoid":
            correction = self.param("router_correction", _ZEROS, (count,), jnp.float32)
            experts = experts._replace(correction=correction)
        if config.has_expert_bias:
            experts = experts._replace(
                router_bias=kernel_of(self, "router_bias", count, init=_ZEROS),
                gate_up_bias=kernel_of(self, "experts_gate_up_bias", count, 2 * inner_size),
                down_bias=kernel_of(self, "experts_down_bias", count, width) / config.num_shards,
            )  # of which every device adds its share
        out, expert = mix_experts(normed, experts, config)
        self.sow("routing", "experts", expert)  # kept where somebody asks for it
        out = sum_parts(out, config)
        if not config.shared_expert_size:
            return out
        shared = self._dense("shared_", normed, config.shared_expert_size)
        if config.has_shared_gate:
            score = project(normed, kernel_of(self, "shared_gate", 1, width), is_rounded=True)
            shared = jax.nn.sigmoid(score) * shared
        return out + shared

    def _dense(
        self, prefix: str, normed: Float[Array, "N E"], inner_size: int
    ) -> Float[Array, "N E"]:
        """An MLP that every token passes; its kernels are called so."""
        config = self.config
        if config.is_gated:
            both = self._linear(f"{prefix}gate_up", normed, 2 * inner_size, config.mlp_bias)
            inner = gated(both, config.activation, self.dtype)
        else:
            up = self._linear(f"{prefix}up", normed, inner_size, config.mlp_bias)
            inner = activate(up.astype(jnp.float32), config.activation)
        inner, width = inner.astype(self.dtype), config.hidden_size
        update = self._linear(f"{prefix}down", inner, width, config.mlp_bias, is_part=True)
        return update.astype(self.dtype)

    def _linear(
        self,
        name: str,
        x: Float[Array, "N I"],
        width_out: int,
        has_bias: bool,
        is_part: bool = False,
    ) -> Float[Array, "N O"]:
        """A product with the kernel of that name; with a bias it is float32.

        The bias is added before the cast, as a fused linear layer does: one rounding, not two.
        With `is_part`, `x` is one device's part of the inputs.
        """
        kernel = kernel_of(self, name, width_out, x.shape[-1])
        is_ordered = self.config.is_ordered
        out = project(x, kernel, is_rounded=not has_bias, is_ordered=is_ordered)
        out = sum_parts(out, self.config) if is_part else out
        if has_bias:
            bias = kernel_of(self, f"{name}_bias", width_out, init=_ZEROS)
            out = out + bias.astype(jnp.float32)[None, :]
        return out

    def _norm(self, name: str, x: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        return norm(x, *self._norm_params(name, x.shape[-1]), self.config)

    def _norm_params(self, name: str, width: int) -> tuple[Any, Any]:
        """The weight and, of a LayerNorm, the bias."""
        weight = self.param(name, norm_init(self.config), (width,), self.dtype)
        if self.config.norm != "layer":
            return weight, None
        return weight, self.param(f"{name}_bias", _ZEROS, (width,), self.dtype)
