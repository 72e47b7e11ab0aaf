"""An embedding of the tokens that each layer has of its own, and what the layer makes of it."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from folojax.models.core.layers import embed_rows, norm
from folojax.models.core.linear import activate, project

if TYPE_CHECKING:
    from folojax.models.core.block import Block
    from folojax.models.core.decoder import Llama


def layer_embeddings(
    model: "Llama", tokens: Int[Array, " N"], hidden: Float[Array, "N E"]
) -> tuple[Float[Array, "N P"], ...]:
    """Of each layer: by tokens, and by what is embedded of them."""
    config, size = model.config, model.config.layer_embed_size
    vocab = config.layer_embed_vocab
    known = jnp.where((tokens >= 0) & (tokens < vocab), tokens, 0)
    found = embed_rows(model.layer_embed, known, vocab, config).astype(model.dtype)
    found = found * jnp.asarray(size**0.5, model.dtype)
    own = project(hidden, model.layer_proj, is_rounded=True) * config.hidden_size**-0.5
    own = norm(own.reshape(len(own), -1, size), model.layer_proj_norm, None, config)
    both = (own + found.reshape(own.shape)) * 2.0**-0.5
    return tuple(both[:, layer] for layer in range(config.num_layers))


def embedded_update(
    block: "Block", stream: Float[Array, "N E"], rotary: Any
) -> Float[Array, "N E"]:
    """What a layer adds of its embedding, which the stream gates."""
    config, size = block.config, block.config.layer_embed_size
    gate = block.linear("layer_gate", stream, size, False)
    inner = activate(gate.astype(block.dtype), config.activation) * rotary.embedding
    update = block.linear("layer_up", inner, config.hidden_size, False)
    return block.norm_of("layer_post_norm", update.astype(block.dtype))
