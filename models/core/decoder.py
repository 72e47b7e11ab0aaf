"""The Llama decoder as a Flax module, and every family that differs from it by a config's flags."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, UInt32

from folojax.models.core.config import ModelConfig
from folojax.models.core.dense_attend import dense_attend
from folojax.models.core.interface import Attend
from folojax.models.core.layers import (
    activate,
    embed_rows,
    gated,
    norm,
    project,
    rotary_tables,
    rotate,
    softcap,
)
from folojax.models.core.moe import mix_experts
from folojax.models.quantized.quantize import is_quantized

# As transformers initialises: a fresh model is only ever a stand-in of the right shapes.
_KERNEL_INIT = nn.initializers.normal(0.02)
_ONES, _ZEROS = nn.initializers.ones, nn.initializers.zeros

Rotary: TypeAlias = tuple[Float[Array, "N 1 R"], Float[Array, "N 1 R"]]


def _norm_init(config: ModelConfig) -> Any:
    """Fresh norms change nothing."""
    return _ZEROS if config.norm == "rms_offset" else _ONES


def _kernel(module: nn.Module, name: str, *shape: int) -> Any:
    """A module's kernel of that name and shape; quantised, if that is what it was given."""
    if module.has_variable("params", name):
        given: Any = module.get_variable("params", name)
        if is_quantized(given):
            if given.shape != shape:
                raise ValueError(f"{name} is {given.shape}, the model needs {shape}")
            return given
    return module.param(name, _KERNEL_INIT, shape, module.dtype)


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to the residual stream.

    Kernels lie as [out, in], as in checkpoints. Those that read the same input are one array, so a
    step has few leaves and fewer, larger products:
        qkv      [(H + 2K) * D, E]   queries | keys | values, head-major
        gate_up  [2F, E]             gate | up
    A layer of X experts has router [X, E], experts_gate_up [X, E, 2F] and experts_down [X, F, E].
    `qkv`, `o`, `gate_up`, `up` and `down` may each be a `QuantizedKernel` instead of an array.

    `layer` says what the config asks of it; `cache_layer`, if given, its place in the cache.
    """

    config: ModelConfig
    dtype: Any
    layer: int
    cache_layer: int | None = None

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "N E"],
        rotary: Rotary | None,
        cache: Any,
        attend: Attend,
    ) -> tuple[Float[Array, "N E"], Any]:
        """Returns the residual stream after this layer and the cache `attend` gave back."""
        with jax.named_scope("attention"):
            update, cache = self._attention(self._before("attn", hidden), rotary, cache, attend)
            hidden = self._add(hidden, update, "attn")
        with jax.named_scope("mlp"):
            return self._add(hidden, self._mlp(self._before("mlp", hidden)), "mlp"), cache

    def _before(self, part: str, hidden: Float[Array, "N E"]) -> Float[Array, "N E"]:
        return self._norm(f"{part}_norm", hidden) if self.config.has_pre_norm else hidden

    def _add(
        self, hidden: Float[Array, "N E"], update: Float[Array, "N E"], part: str
    ) -> Float[Array, "N E"]:
        """The residual stream with what a part has made of it."""
        if self.config.has_post_norm:
            update = self._norm(f"{part}_post_norm", update)
        if self.config.residual_scale != 1.0:
            scaled = update.astype(jnp.float32) * self.config.residual_scale
            update = scaled.astype(self.dtype)
        return hidden + update

    def _attention(
        self,
        normed: Float[Array, "N E"],
        rotary: Rotary | None,
        cache: Any,
        attend: Attend,
    ) -> tuple[Float[Array, "N E"], Any]:
        config = self.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = self._linear("qkv", normed, (heads + 2 * kv_heads) * head_dim, config.qkv_bias)
        qkv = qkv.astype(self.dtype).reshape(-1, heads + 2 * kv_heads, head_dim)
        query, key, value = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
        if config.qk_norm:
            query, key = self._head_norm("q_norm", query), self._head_norm("k_norm", key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        place = self.layer if self.cache_layer is None else self.cache_layer
        cache, out = attend(cache, place, query, key, value, scoring=config.scoring(self.layer))
        flat = out.reshape(-1, heads * head_dim)
        update = self._linear("o", flat, config.hidden_size, config.o_bias)
        return update.astype(self.dtype), cache

    def _head_norm(self, name: str, x: Float[Array, "N heads D"]) -> Float[Array, "N heads D"]:
        if not self.config.is_qk_norm_joint:
            return self._norm(name, x)
        return self._norm(name, x.reshape(x.shape[0], -1)).reshape(x.shape)

    def _mlp(self, normed: Float[Array, "N E"]) -> Float[Array, "N E"]:
        config, width = self.config, self.config.hidden_size
        if config.is_sparse(self.layer):
            count, inner_size = config.num_experts, config.expert_size
            router = _kernel(self, "router", count, width)
            gate_up = _kernel(self, "experts_gate_up", count, width, 2 * inner_size)
            down = _kernel(self, "experts_down", count, inner_size, width)
            return mix_experts(normed, router, gate_up, down, config)
        if config.is_gated:
            both = self._linear("gate_up", normed, 2 * config.intermediate_size, config.mlp_bias)
            inner = gated(both.astype(jnp.float32), config.activation)
        else:
            up = self._linear("up", normed, config.intermediate_size, config.mlp_bias)
            inner = activate(up.astype(jnp.float32), config.activation)
        update = self._linear("down", inner.astype(self.dtype), width, config.mlp_bias)
        return update.astype(self.dtype)

    def _linear(
        self, name: str, x: Float[Array, "N I"], width_out: int, has_bias: bool
    ) -> Float[Array, "N O"]:
        """A product with the kernel of that name; with a bias it is float32.

        The bias is added before the cast, as a fused linear layer does: one rounding, not two.
        """
        kernel = _kernel(self, name, width_out, x.shape[-1])
        out = project(x, kernel, is_rounded=not has_bias)
        if has_bias:
            bias = self.param(f"{name}_bias", _ZEROS, (width_out,), self.dtype)
            out = out + bias.astype(jnp.float32)[None, :]
        return out

    def _norm(self, name: str, x: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        weight = self.param(name, _norm_init(self.config), (x.shape[-1],), self.dtype)
        bias = None
        if self.config.norm == "layer":
            bias = self.param(f"{name}_bias", _ZEROS, (x.shape[-1],), self.dtype)
        return norm(x, weight, bias, self.config)


class Llama(nn.Module):
    """A decoder from token ids to the hidden states that `logits` turns into scores.

    Parameters, all in `dtype`: `embed` [V, E], `layers_<i>` (see Block), `final_norm` [E], and
    `lm_head` [V, E] unless the embedding is tied; `position_embed` where positions are learned.
    `quantize_params` makes quantised kernels of those that linear layers and the embedding read.
    Layers are a Python loop: under `lax.scan` XLA copies each layer's weights every step.
    """

    config: ModelConfig
    dtype: Any

    def setup(self) -> None:
        """Declares what `__call__` and `logits` share."""
        config = self.config
        width, vocab = config.hidden_size, config.vocab_size
        self.embed = _kernel(self, "embed", vocab, width)
        self.layers = [
            Block(config, self.dtype, layer, name=f"layers_{layer}")
            for layer in range(config.num_layers)
        ]
        self.final_norm = self.param("final_norm", _norm_init(config), (width,), self.dtype)
        self.final_norm_bias = None
        if config.norm == "layer":
            self.final_norm_bias = self.param("final_norm_bias", _ZEROS, (width,), self.dtype)
        if config.has_learned_positions:
            shape = (config.max_position, width)
            self.position_embed = _kernel(self, "position_embed", *shape)
        if not config.tie_embeddings:
            self.lm_head = _kernel(self, "lm_head", vocab, width)

    def __call__(
        self,
        tokens: Int[Array, " N"],
        positions: Int[Array, " N"],
        cache: Any,
        attend: Attend,
    ) -> tuple[Float[Array, "N E"], Any]:
        """Runs every layer over a flat axis of tokens.

        Args:
            tokens: Token ids; one outside the vocabulary reads the nearest row, so that padding
                may hold anything.
            positions: Each token's place in its own sequence, from 0.
            cache: Whatever `attend` carries from layer to layer; opaque here.
            attend: Attention (see interface.py); called once a layer, in order.

        Returns:
            The hidden states after the final norm, in `dtype`, and the cache of the last call.
        """
        hidden, shared = self.begin(tokens, positions)
        for layer, block in enumerate(self.layers):
            hidden, cache = block(hidden, self.layer_rotary(shared, layer), cache, attend)
        return self.end(hidden), cache

    def begin(
        self, tokens: Int[Array, " N"], positions: Int[Array, " N"]
    ) -> tuple[Float[Array, "N E"], tuple[Rotary | None, Rotary | None]]:
        """What comes before the layers: the residual stream, and rotations of either kind."""
        config = self.config
        with jax.named_scope("embed"):
            hidden = embed_rows(self.embed, tokens).astype(self.dtype)
            if config.embed_scale != 1.0:
                # Rounded first, as transformers keeps it.
                hidden = hidden * jnp.asarray(config.embed_scale, self.dtype)
            if config.has_learned_positions:
                return hidden + jnp.take(self.position_embed, positions, axis=0, mode="clip"), (
                    None,
                    None,
                )
        everywhere, local = rotary_tables(positions, config), None
        if config.local_rope_theta is not None:
            local = rotary_tables(positions, config, is_local=True)
        return hidden, (everywhere, local)

    def end(self, hidden: Float[Array, "N E"]) -> Float[Array, "N E"]:
        """What comes after the layers."""
        return norm(hidden, self.final_norm, self.final_norm_bias, self.config)

    @nn.nowrap
    def layer_rotary(self, shared: Any, layer: int) -> Any:
        """Of what `begin` gave, or of its shapes: the rotation of a layer, None for one without."""
        everywhere, local = shared
        if layer in self.config.ropeless_layers:
            return None
        is_local = local is not None and self.config.scoring(layer).window is not None
        return local if is_local else everywhere

    @nn.nowrap
    def alone(self, layer: int) -> Block:
        """A layer as a module of its own; layers that compute the same are equal modules."""
        config = self.config
        kinds = [(config.scoring(i), config.is_sparse(i)) for i in range(layer + 1)]
        first = kinds.index(kinds[layer])
        return Block(config, self.dtype, first, cache_layer=0, parent=None)

    def logits(self, hidden: Float[Array, "M E"]) -> Float[Array, "M V"]:
        """Scores of the next token in float32, for hidden states that `__call__` returned."""
        config = self.config
        with jax.named_scope("logits"):
            if config.tie_embeddings:
                scores = project(hidden, self.embed)
            else:
                scores = project(hidden, self.lm_head)
            if config.logits_divisor != 1.0:
                scores = scores / config.logits_divisor
            return softcap(scores, config.logits_softcap)


def init_params(module: nn.Module, rng: Key[Array, ""] | UInt32[Array, " 2"]) -> dict[str, Any]:
    """Random parameters, of the tree and shapes a checkpoint of `module.config` is loaded into.

    For shapes alone, without memory: `jax.eval_shape(functools.partial(init_params, module), rng)`.
    """
    token = jnp.zeros((1,), jnp.int32)
    return module.init(rng, token, token, None, dense_attend)["params"]
