"""The Llama decoder, and with its config's flags Qwen2 and Qwen3, as a Flax module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, UInt32

from folojax.models.config import ModelConfig
from folojax.models.dense_attend import dense_attend
from folojax.models.interface import Attend
from folojax.models.layers import (
    project,
    project_transposed,
    rms_norm,
    rotary_tables,
    rotate,
    swiglu,
)

# As transformers initialises: a fresh model is only ever a stand-in of the right shapes.
_KERNEL_INIT = nn.initializers.normal(0.02)
_ONES, _ZEROS = nn.initializers.ones, nn.initializers.zeros


class Block(nn.Module):
    """One layer: attention, then a gated MLP, each added to the residual stream.

    Kernels that read the same input are one array, so a step has few leaves and fewer, larger
    products:
        qkv      [E, (H + 2K) * D]   queries | keys | values, head-major
        gate_up  [E, 2F]             gate | up
    """

    config: ModelConfig
    dtype: Any
    layer: int

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "N E"],
        rotary: tuple[Float[Array, "N 1 R"], Float[Array, "N 1 R"]],
        cache: Any,
        attend: Attend,
    ) -> tuple[Float[Array, "N E"], Any]:
        """Returns the residual stream after this layer and the cache `attend` gave back."""
        with jax.named_scope("attention"):
            update, cache = self._attention(hidden, rotary, cache, attend)
            hidden = hidden + update
        with jax.named_scope("mlp"):
            return hidden + self._mlp(hidden), cache

    def _attention(
        self,
        hidden: Float[Array, "N E"],
        rotary: tuple[Float[Array, "N 1 R"], Float[Array, "N 1 R"]],
        cache: Any,
        attend: Attend,
    ) -> tuple[Float[Array, "N E"], Any]:
        config = self.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        normed = self._norm("attn_norm", hidden)
        qkv = project(
            normed, self._kernel("qkv", config.hidden_size, (heads + 2 * kv_heads) * head_dim)
        )
        if config.qkv_bias:
            # Added before the cast, as a fused linear layer does: one rounding instead of two.
            bias = self.param("qkv_bias", _ZEROS, (qkv.shape[-1],), self.dtype)
            qkv = qkv + bias.astype(jnp.float32)[None, :]
        qkv = qkv.astype(self.dtype).reshape(-1, heads + 2 * kv_heads, head_dim)
        query, key, value = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
        if config.qk_norm:
            query = self._norm("q_norm", query)
            key = self._norm("k_norm", key)
        cache, out = attend(cache, self.layer, rotate(query, *rotary), rotate(key, *rotary), value)
        kernel = self._kernel("o", heads * head_dim, config.hidden_size)
        return project(out.reshape(-1, heads * head_dim), kernel).astype(self.dtype), cache

    def _mlp(self, hidden: Float[Array, "N E"]) -> Float[Array, "N E"]:
        config = self.config
        normed = self._norm("mlp_norm", hidden)
        gate_up = self._kernel("gate_up", config.hidden_size, 2 * config.intermediate_size)
        down = self._kernel("down", config.intermediate_size, config.hidden_size)
        inner = swiglu(project(normed, gate_up)).astype(self.dtype)
        return project(inner, down).astype(self.dtype)

    def _kernel(self, name: str, width_in: int, width_out: int) -> Float[Array, "I O"]:
        return self.param(name, _KERNEL_INIT, (width_in, width_out), self.dtype)

    def _norm(self, name: str, x: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        weight = self.param(name, _ONES, (x.shape[-1],), self.dtype)
        return rms_norm(x, weight, self.config.rms_norm_eps)


class Llama(nn.Module):
    """A decoder from token ids to the hidden states that `logits` turns into scores.

    Parameters, all in `dtype`: `embed` [V, E], `layers_<i>` (see Block), `final_norm` [E], and
    `lm_head` [E, V] unless the embedding is tied. Layers are a Python loop: under `lax.scan` XLA
    copies each layer's weights every step.
    """

    config: ModelConfig
    dtype: Any

    def setup(self) -> None:
        """Declares what `__call__` and `logits` share."""
        config = self.config
        width, vocab = config.hidden_size, config.vocab_size
        self.embed = self.param("embed", _KERNEL_INIT, (vocab, width), self.dtype)
        self.layers = [
            Block(config, self.dtype, layer, name=f"layers_{layer}")
            for layer in range(config.num_layers)
        ]
        self.final_norm = self.param("final_norm", _ONES, (width,), self.dtype)
        if not config.tie_embeddings:
            self.lm_head = self.param("lm_head", _KERNEL_INIT, (width, vocab), self.dtype)

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
        hidden, rotary = self.begin(tokens, positions)
        for layer, block in enumerate(self.layers):
            hidden, cache = block(hidden, self.layer_rotary(rotary, layer), cache, attend)
        return self.end(hidden), cache

    def begin(self, tokens: Int[Array, " N"], positions: Int[Array, " N"]) -> tuple[Any, Any]:
        """What comes before the layers: the residual stream, and what all layers share."""
        rotary = rotary_tables(positions, self.config)
        with jax.named_scope("embed"):
            return jnp.take(self.embed, tokens, axis=0, mode="clip"), rotary

    def end(self, hidden: Float[Array, "N E"]) -> Float[Array, "N E"]:
        """What comes after the layers."""
        return rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)

    @nn.nowrap
    def layer_rotary(self, shared: Any, layer: int) -> Any:
        """A layer's part of what all layers share."""
        return shared

    @nn.nowrap
    def alone(self, layer: int) -> Block:
        """A layer as a module of its own; layers that compute the same are equal modules."""
        return Block(self.config, self.dtype, layer=0, parent=None)

    def logits(self, hidden: Float[Array, "M E"]) -> Float[Array, "M V"]:
        """Scores of the next token in float32, for hidden states that `__call__` returned."""
        with jax.named_scope("logits"):
            if self.config.tie_embeddings:
                return project_transposed(hidden, self.embed)
            return project(hidden, self.lm_head)


def init_params(module: nn.Module, rng: Key[Array, ""] | UInt32[Array, " 2"]) -> dict[str, Any]:
    """Random parameters, of the tree and shapes a checkpoint of `module.config` is loaded into.

    For shapes alone, without memory: `jax.eval_shape(functools.partial(init_params, module), rng)`.
    """
    token = jnp.zeros((1,), jnp.int32)
    return module.init(rng, token, token, None, dense_attend)["params"]
