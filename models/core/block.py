"""One layer of a decoder: attention and an MLP, with what the flags of a config change."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from folojax.models.core.config import ModelConfig
from folojax.models.core.declared import ONES, ZEROS, kernel_of, norm_init
from folojax.models.core.interface import Attend
from folojax.models.core.latent import heads_of_latents, out_of_latents
from folojax.models.core.layer_embed import embedded_update
from folojax.models.core.layers import (
    cut_gates,
    norm,
    norm_and_rotate,
    rotate,
    scaled,
    scaled_parts,
)
from folojax.models.core.linear import CURVE, activate, gated, project, project_gated
from folojax.models.core.mixers import MIXERS
from folojax.models.core.moe import Experts, mix_experts
from folojax.models.core.shards import sum_parts
from folojax.models.core.side_streams import correct, guess, router_of
from folojax.models.core.stream import Unsummed, normed, summed


class Rotary(NamedTuple):
    """What a layer is told of tokens: how they turn, how queries grow, an embedding of its own."""

    cos: Float[Array, "N 1 R"] | None
    sin: Float[Array, "N 1 R"] | None
    growth: Float[Array, "N 1 1"] | None = None
    embedding: Float[Array, "N P"] | None = None


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to the residual stream.

    Kernels lie as [out, in], as in checkpoints. Those that read the same input are one array, so a
    step has few leaves and fewer, larger products:
        qkv      [(H + 2K) * D, E]   queries | keys | values, head-major
        gate_up  [2F, E]             gate | up
    With gated attention `qkv` begins with 2D rows a head, queries | gate. Where values are keys, it
    is `qk`; where keys and values are another layer's, `q`. A recurrent layer has other kernels in
    place of `qkv` and `o` (`folojax.models.core.mixers`).
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
        config, layer = self.config, self.layer
        lent = hidden.lent if isinstance(hidden, Unsummed) else ()
        out: Any = hidden
        inputs: Any = None
        router = router_of(self) if config.side_streams else None
        guesses: Any = None
        if router is not None:
            guesses = guess(self, router, out)
            out = guesses[:, 0]
        if layer not in config.mixerless_layers:
            with jax.named_scope("attention"):
                stream, inputs = self._normed("attn", out)
                updates = []
                if config.recurrent is not None and config.is_recurrent(layer):
                    update, cache = MIXERS[config.recurrent.kind](self, inputs, cache, attend)
                    updates.append(update)
                if config.has_pages(layer):
                    update, cache, lent = self._attention(inputs, rotary, cache, attend, lent)
                    updates.append(update)
                update = sum(updates[1:], updates[0])
                out = self._after("attn", stream, update)
                if config.bypass_rank:
                    out = (summed(out) + self._bypass(inputs)) * 2**-0.5
        if layer not in config.mlpless_layers:
            with jax.named_scope("mlp"):
                if config.is_parallel:
                    stream = summed(out)
                else:
                    stream, inputs = self._normed("mlp", out)
                out = self._after("mlp", stream, self._mlp(inputs, stream))
        if router is not None:
            out = self._corrected(correct(self, router, guesses, summed(out)), rotary)
        elif self.config.has_layer_scale:
            out = Unsummed(self._last(summed(out), rotary))
        elif not self.leaves_sum:
            out = Unsummed(summed(out))
        if lent or router is not None:
            return out._replace(lent=lent), cache
        return summed(out) if out.update is None else out, cache

    @property
    def place(self) -> int:
        """Of the layer in the cache."""
        return self.layer if self.cache_layer is None else self.cache_layer

    @property
    def _own(self) -> ModelConfig:
        """The config with the sizes of this layer."""
        return self.config.at(self.layer)

    def _last(self, stream: Float[Array, "N E"], rotary: Rotary | None) -> Float[Array, "N E"]:
        """What a layer adds of its own embedding of the tokens, and its scale of everything."""
        if self.config.layer_embed_size:
            stream = stream + embedded_update(self, stream, rotary)
        return stream * self.param("layer_scale", ONES, (1,), self.dtype)[None, :]

    def _corrected(self, streams: Float[Array, "N A E"], rotary: Rotary | None) -> Unsummed:
        """All streams, with what those beside the first get of the layer's embedding."""
        first, sides = streams[:, 0], streams[:, 1:]
        if self.config.layer_embed_size:
            scale = self.param("stream_scale", ONES, first.shape[-1:], self.dtype)
            sides = sides + embedded_update(self, first * scale[None, :], rotary)[:, None]
        return Unsummed(first, sides=sides)

    def _bypass(self, inputs: Float[Array, "N E"]) -> Float[Array, "N E"]:
        """What goes by attention."""
        low = self.linear("bypass_down", inputs, self.config.bypass_rank, False)
        update = self.linear("bypass_up", low.astype(self.dtype), inputs.shape[-1], False)
        return inputs + self.norm_of("bypass_norm", update.astype(self.dtype))

    def _after(
        self, part: str, hidden: Float[Array, "N E"], update: Float[Array, "N E"]
    ) -> Unsummed:
        """The residual stream and what a part adds to it."""
        if self.config.has_post_norm:
            update = self.norm_of(f"{part}_post_norm", update)
        return Unsummed(hidden, scaled(update, self.config.residual_scale).astype(self.dtype))

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
        lent: tuple[Any, ...],
    ) -> tuple[Float[Array, "N E"], Any, tuple[Any, ...]]:
        """What it adds to the stream, the cache, and the keys and values that later layers read."""
        config, kind = self._own, 0 if self.config.scoring(self.layer).window else 1
        heads = config.num_heads
        rest: list[Any] = []
        if config.kv_layer(self.layer) != self.layer:
            # Stored again in this layer's pages: whoever attends finds them where it looks.
            query = self.linear("q", normed, heads * config.head_dim, config.qkv_bias)
            query = query.astype(self.dtype).reshape(-1, heads, config.head_dim)
            query = self._turned("q", query, rotary)
            key, value = lent[kind]
        else:
            make = heads_of_latents if config.kv_rank else Block._heads
            query, key, value, *rest = make(self, normed, rotary)
        if config.lends(self.layer):
            both = [*(lent or (None, None))]
            both[kind] = key, value
            lent = tuple(both)
        options: dict[str, Any] = {"scoring": config.scoring(self.layer)}
        if config.has_sinks:
            options["sinks"] = self.param("sinks", ZEROS, (heads,), self.dtype)
        cache, out = attend(cache, self.place, query, key, value, **options)
        if config.kv_rank:
            out = out_of_latents(out, rest[0], config.value_dim)
        elif rest:
            out = out * jax.nn.sigmoid(rest[0])
        flat = out.reshape(out.shape[0], -1)
        update = self.linear("o", flat, config.hidden_size, config.o_bias, is_part=True)
        return scaled(update, config.attention_out_scale).astype(self.dtype), cache, lent

    def _heads(self, normed: Float[Array, "N E"], rotary: Rotary | None) -> Any:
        """Queries, keys and values, ready to attend; and the gate of gated attention."""
        config = self._own
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        of_queries = heads * (2 if config.has_attention_gate else 1)
        name, count = "qkv", of_queries + 2 * kv_heads
        if config.has_keys_as_values:
            name, count = "qk", of_queries + kv_heads
        qkv = self.linear(name, normed, count * head_dim, config.qkv_bias)
        qkv = qkv.astype(self.dtype).reshape(-1, count, head_dim)
        if config.has_attention_gate:
            query, key, value = jnp.split(qkv, (of_queries, of_queries + kv_heads), axis=1)
            query, gate = query[:, 0::2], query[:, 1::2]
            return *self.norm_and_turn(query, key, rotary), value, gate
        query, key = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
        cos, sin = (None, None) if rotary is None else rotary[:2]
        if cos is not None and sin is not None and config.is_qk_norm_plain:
            of_query, of_key = (self._norm_params(f"{one}_norm", head_dim)[0] for one in "qk")
            return norm_and_rotate(qkv, of_query, of_key, cos, sin, config)
        value = key if config.has_keys_as_values else qkv[:, heads + kv_heads :]
        if config.has_value_norm:
            value = norm(value, jnp.ones(head_dim, self.dtype), None, config)
        return *self.norm_and_turn(query, key, rotary), value

    def norm_and_turn(
        self, query: Float[Array, "N H D"], key: Float[Array, "N K D"], rotary: Rotary | None
    ) -> tuple[Float[Array, "N H D"], Float[Array, "N K D"]]:
        """Both with their norms and rotary embedding, as far as the layer has them."""
        return self._turned("q", query, rotary), self._turned("k", key, rotary)

    def _turned(
        self, name: str, x: Float[Array, "N heads D"], rotary: Rotary | None
    ) -> Float[Array, "N heads D"]:
        """The same of one of them."""
        config = self.config
        if config.qk_norm and not config.is_qk_norm_late:
            x = self._head_norm(f"{name}_norm", x)
        if rotary is not None and rotary.cos is not None and rotary.sin is not None:
            x = rotate(x, rotary.cos, rotary.sin, is_interleaved=config.is_rope_interleaved)
            if config.has_bare_qk_norm:
                x = norm(x, jnp.ones(x.shape[-1], self.dtype), None, config)
        if name == "q" and rotary is not None and rotary.growth is not None:
            x = x * rotary.growth
        if config.qk_norm and config.is_qk_norm_late:
            x = self._head_norm(f"{name}_norm", x)
        return x

    def _head_norm(self, name: str, x: Float[Array, "N heads D"]) -> Float[Array, "N heads D"]:
        if not self.config.is_qk_norm_joint:
            return self.norm_of(name, x)
        flat = x.reshape(x.shape[0], -1)
        weight, bias = self._norm_params(name, flat.shape[-1])
        return norm(flat, weight, bias, self.config, self.config.num_shards).reshape(x.shape)

    def _mlp(self, normed: Float[Array, "N E"], stream: Float[Array, "N E"]) -> Float[Array, "N E"]:
        """What the MLP adds, of the normed stream, and of the stream itself where it is asked."""
        config, width = self._own, self.config.hidden_size
        if not config.is_sparse(self.layer):
            return self._dense("", normed, config.intermediate_size)
        if config.has_dense_beside:
            dense = self._dense("", normed, config.intermediate_size)
            normed = self.norm_of("experts_norm", stream)
            return self.norm_of("dense_post_norm", dense) + self.norm_of(
                "experts_post_norm", self._experts(normed, self._scaled(stream))
            )
        out = self._experts(normed)
        if not config.shared_expert_size:
            return out
        shared = self._dense("shared_", normed, config.shared_expert_size)
        if config.has_shared_gate:
            score = project(normed, kernel_of(self, "shared_gate", 1, width), is_rounded=True)
            shared = jax.nn.sigmoid(score) * shared
        return out + shared

    def _scaled(self, stream: Float[Array, "N E"]) -> Float[Array, "N E"]:
        """What a router reads of the stream itself."""
        width = self.config.hidden_size
        ones = jnp.ones(width, self.dtype)
        scale = self.param("router_scale", ONES, (width,), self.dtype)
        return norm(stream, ones, None, self.config) * scale[None, :] * width**-0.5

    def _experts(
        self, normed: Float[Array, "N E"], routed: Float[Array, "N E"] | None = None
    ) -> Float[Array, "N E"]:
        """The experts of a layer; `routed` is what its router reads, if not what they do."""
        config, width = self.config, self.config.hidden_size
        count, inner_size, latent = config.num_experts, config.expert_size, config.expert_latent
        inputs = normed
        if latent:
            routed = normed
            inputs = self.linear("experts_in", normed, latent, config.mlp_bias).astype(self.dtype)
        name, width_out = ("gate_up", 2 * inner_size) if config.is_gated else ("up", inner_size)
        experts = Experts(
            router=kernel_of(self, "router", count, width),
            gate_up=kernel_of(self, f"experts_{name}", count, inputs.shape[1], width_out),
            down=kernel_of(self, "experts_down", count, inner_size, inputs.shape[1]),
        )
        if config.has_router_correction:
            correction = self.param("router_correction", ZEROS, (count,), jnp.float32)
            experts = experts._replace(correction=correction)
        if config.has_dense_beside:
            experts = experts._replace(
                scale=self.param("experts_scale", ONES, (count,), self.dtype)
            )
        if config.has_expert_bias:
            experts = experts._replace(
                router_bias=kernel_of(self, "router_bias", count, init=ZEROS),
                gate_up_bias=kernel_of(self, "experts_gate_up_bias", count, 2 * inner_size),
                down_bias=kernel_of(self, "experts_down_bias", count, width) / config.num_shards,
            )  # of which every device adds its share
        out, expert = mix_experts(inputs, experts, config, routed)
        self.sow("routing", "experts", expert)  # kept where somebody asks for it
        out = sum_parts(out, config)
        if latent:
            out = self.linear("experts_out", out, width, config.mlp_bias).astype(self.dtype)
        return out

    def _dense(
        self, prefix: str, normed: Float[Array, "N E"], inner_size: int
    ) -> Float[Array, "N E"]:
        """An MLP that every token passes; its kernels are called so."""
        config = self.config
        cutoff = config.gate_cutoff(self.layer)
        is_plain = not config.mlp_bias and cutoff is None and config.gate_scale == 1.0
        if config.is_gated and is_plain:
            kernel = kernel_of(self, f"{prefix}gate_up", 2 * inner_size, normed.shape[-1])
            options = config.activation, self.dtype, config.is_ordered
            inner = project_gated(normed, kernel, *options)
        elif config.is_gated:
            both = self.linear(f"{prefix}gate_up", normed, 2 * inner_size, config.mlp_bias)
            both = both if cutoff is None else cut_gates(both, cutoff, self.config)
            if config.gate_scale != 1.0:
                both = scaled_parts(both, (inner_size, inner_size), (config.gate_scale, 1.0))
            inner = gated(both, config.activation, self.dtype)
        else:
            up = self.linear(f"{prefix}up", normed, inner_size, config.mlp_bias)
            curve = None
            if config.activation == "xielu":
                curve = [self.param(one, ONES, (1,), self.dtype) for one in CURVE]
            inner = activate(up.astype(jnp.float32), config.activation, curve)
        inner, width = inner.astype(self.dtype), config.hidden_size
        update = self.linear(f"{prefix}down", inner, width, config.mlp_bias, is_part=True)
        return scaled(update, config.mlp_scale).astype(self.dtype)

    def linear(
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
            bias = kernel_of(self, f"{name}_bias", width_out, init=ZEROS)
            out = out + bias.astype(jnp.float32)[None, :]
        return out

    def norm_of(self, name: str, x: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        """The norm with the weight of that name."""
        return norm(x, *self._norm_params(name, x.shape[-1]), self.config)

    def _norm_params(self, name: str, width: int) -> tuple[Any, Any]:
        """The weight and, of a LayerNorm, the bias."""
        weight = self.param(name, norm_init(self.config), (width,), self.dtype)
        if not self.config.has_norm_bias:
            return weight, None
        return weight, self.param(f"{name}_bias", ZEROS, (width,), self.dtype)
