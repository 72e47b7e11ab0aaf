"""The Llama decoder as a Flax module, and every family that differs from it by a config's flags."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, UInt32

from folojax.models.core.block import Block, Rotary
from folojax.models.core.config import ModelConfig
from folojax.models.core.declared import kernel_of, norm_init
from folojax.models.core.dense_attend import dense_attend
from folojax.models.core.interface import Attend
from folojax.models.core.layer_embed import layer_embeddings
from folojax.models.core.layers import embed_rows, rotary_tables, softcap
from folojax.models.core.linear import project
from folojax.models.core.shards import join_scores, vocab_rows
from folojax.models.core.side_streams import narrow, widen
from folojax.models.core.stream import Unsummed, normed


@jax.tree_util.register_static  # as an argument of a jitted function it need not be named static
class Llama(nn.Module):
    """A decoder from token ids to the hidden states that `logits` turns into scores.

    Parameters, all in `dtype` but corrections of routers: `embed` [V, E], `layers_<i>` (see Block),
    `final_norm` [E], and `lm_head` [V, E] unless the embedding is tied; `position_embed` where
    positions are learned. `quantize_params` makes quantised kernels of those that linear layers and
    the embedding read.
    Layers are a Python loop: under `lax.scan` XLA copies each layer's weights every step.

    It can also be run in pieces, each a program of its own: `begin`, then each layer `alone` with
    the parameters `layers_<i>`, what `layer_rotary` picks and a cache of index 0, then `end`.
    """

    config: ModelConfig
    dtype: Any

    def setup(self) -> None:
        """Declares what `__call__` and `logits` share."""
        config = self.config
        width = config.hidden_size
        vocab = vocab_rows(config.vocab_size, config.num_shards)
        self.embed = kernel_of(self, "embed", vocab, width)
        self.layers = [
            Block(config, self.dtype, layer, leaves_sum=True, name=f"layers_{layer}")
            for layer in range(config.num_layers)
        ]
        self.final_norm = self.param("final_norm", norm_init(config), (width,), self.dtype)
        self.final_norm_bias = None
        if config.has_norm_bias:
            self.final_norm_bias = self.param(
                "final_norm_bias", nn.initializers.zeros, (width,), self.dtype
            )
        if config.has_learned_positions:
            shape = (config.max_position, width)
            self.position_embed = kernel_of(self, "position_embed", *shape)
        if config.layer_embed_size:
            size = config.num_layers * config.layer_embed_size
            rows = vocab_rows(config.layer_embed_vocab, config.num_shards)
            self.layer_embed = kernel_of(self, "layer_embed", rows, size)
            self.layer_proj = kernel_of(self, "layer_proj", size, width)
            of_norm = norm_init(config), (config.layer_embed_size,), self.dtype
            self.layer_proj_norm = self.param("layer_proj_norm", *of_norm)
        if config.side_streams:
            shape = (config.side_streams * width, width)
            self.streams_in, self.streams_out = (
                kernel_of(self, name, *shape) for name in ("streams_in", "streams_out")
            )
        if not config.tie_embeddings:
            self.lm_head = kernel_of(self, "lm_head", vocab, width)

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
        stream, shared = self.begin(tokens, positions)
        for layer, block in enumerate(self.layers):
            stream, cache = block(stream, self.layer_rotary(shared, layer), cache, attend)
        return self.end(stream), cache

    def begin(
        self, tokens: Int[Array, " N"], positions: Int[Array, " N"]
    ) -> tuple[Float[Array, "N E"] | Unsummed, tuple[Any, ...]]:
        """What comes before the layers: the residual stream, and what these are told of tokens.

        That is rotations of either kind, and by layer its own embedding, where there are any.
        """
        config = self.config
        with jax.named_scope("embed"):
            hidden = embed_rows(self.embed, tokens, config.vocab_size, config).astype(self.dtype)
            if config.embed_scale != 1.0:
                # Rounded first, as transformers keeps it.
                hidden = hidden * jnp.asarray(config.embed_scale, self.dtype)
            if config.has_learned_positions:
                places = jnp.take(self.position_embed, positions, axis=0, mode="clip")
                return hidden + places, (None, None, ())
        everywhere, local = Rotary(*rotary_tables(positions, config)), None
        if config.query_growth is not None:
            places = positions + 1 if config.is_growth_ropeless else positions
            steps = places // config.query_growth_length
            growth = 1 + config.query_growth * jnp.log1p(steps.astype(jnp.float32))
            everywhere = everywhere._replace(growth=growth.astype(self.dtype)[:, None, None])
        if config.local_rope_theta is not None:
            local = Rotary(*rotary_tables(positions, config, is_local=True))
        embeddings = layer_embeddings(self, tokens, hidden) if config.layer_embed_size else ()
        stream = widen(self, hidden) if config.side_streams else hidden
        return stream, (everywhere, local, embeddings)

    def end(self, hidden: Float[Array, "N E"] | Unsummed) -> Float[Array, "N E"]:
        """What comes after the layers."""
        if isinstance(hidden, Unsummed) and hidden.sides is not None:
            hidden = narrow(self, hidden)
        return normed(hidden, self.final_norm, self.final_norm_bias, self.config)[1]

    @nn.nowrap
    def layer_rotary(self, shared: Any, layer: int) -> Any:
        """Of what `begin` gave, or of its shapes: the a layer's part, None if it has none."""
        everywhere, local, embeddings = shared
        config = self.config
        if layer in config.ropeless_layers:
            is_growing = config.is_growth_ropeless and everywhere.growth is not None
            return Rotary(None, None, everywhere.growth) if is_growing else None
        if config.is_growth_ropeless:
            everywhere = everywhere._replace(growth=None)
        is_local = local is not None and self.config.scoring(layer).window is not None
        rotary = local if is_local else everywhere
        return rotary._replace(embedding=embeddings[layer]) if embeddings else rotary

    @nn.nowrap
    def alone(self, layer: int, leaves_sum: bool = False) -> Block:
        """A layer as a module of its own; layers that compute the same are equal modules."""
        config = self.config
        kinds = [config.kind(i) for i in range(layer + 1)]
        first = kinds.index(kinds[layer])
        return Block(config, self.dtype, first, 0, leaves_sum, parent=None)

    def logits(self, hidden: Float[Array, "M E"]) -> Float[Array, "M V"]:
        """Scores of the next token in float32, for hidden states that `__call__` returned."""
        return join_scores(self.own_logits(hidden), self.config)

    def own_logits(self, hidden: Float[Array, "M E"]) -> Float[Array, "M _"]:
        """The same of those tokens alone that the device has, and of what fills its part."""
        config = self.config
        with jax.named_scope("logits"):
            kernel = self.embed if config.tie_embeddings else self.lm_head
            scores = project(hidden, kernel, is_ordered=config.is_ordered)
            if config.logits_divisor != 1.0:
                scores = scores / config.logits_divisor
            return softcap(scores, config.logits_softcap)


def init_params(module: nn.Module, rng: Key[Array, ""] | UInt32[Array, " 2"]) -> dict[str, Any]:
    """Random parameters, of the tree and shapes a checkpoint of `module.config` is loaded into.

    For shapes alone, without memory: `jax.eval_shape(functools.partial(init_params, module), rng)`.
    """
    token = jnp.zeros((1,), jnp.int32)
    return module.init(rng, token, token, None, dense_attend)["params"]
