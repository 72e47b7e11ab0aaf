"""Several residual streams, of which one passes attention and MLPs: alternating updates (AltUp).

A layer guesses all streams from all, runs attention and its MLP on the first guess, and corrects
every guess by what that has changed of the first. Baykal et al. (arXiv:2301.13310).

    streams ─> guesses ─> first ─> attention ─> MLP ─┐
                  └──────────────────────────────> corrections ─> streams

Axes: Y side streams, A = Y + 1 streams.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from folojax.models.core.config import ModelConfig
from folojax.models.core.declared import kernel_of, norm_init
from folojax.models.core.layers import norm
from folojax.models.core.linear import project
from folojax.models.core.stream import Unsummed, summed

if TYPE_CHECKING:
    from folojax.models.core.block import Block
    from folojax.models.core.decoder import Llama

_SMALL = 1e-5  # mean squares are no smaller where they divide


def widen(model: "Llama", hidden: Float[Array, "N E"]) -> Unsummed:
    """What is embedded, and beside it products of that, as large as it."""
    count = model.config.side_streams
    own = project(hidden, model.streams_in, is_rounded=True)
    own = own.reshape(len(own), count, -1)
    return Unsummed(hidden, sides=_as_large(own, hidden))


def narrow(model: "Llama", streams: Unsummed) -> Float[Array, "N E"]:
    """The mean of the first stream and of products of the others, as large as it."""
    first, sides = summed(streams), streams.sides
    assert sides is not None
    count, width = sides.shape[1:]
    kernels = model.streams_out.reshape(count, width, width)
    each = [project(sides[:, i], kernels[i], is_rounded=True) for i in range(count)]
    own = _as_large(jnp.stack(each, axis=1), first)
    total = first.astype(jnp.float32) + own.astype(jnp.float32).sum(axis=1)
    return (total / (count + 1)).astype(first.dtype)


def _as_large(x: Float[Array, "N Y E"], wanted: Float[Array, "N E"]) -> Float[Array, "N Y E"]:
    """Scaled to the root mean square of another stream."""
    wide, large = x.astype(jnp.float32), wanted.astype(jnp.float32)
    target = jnp.mean(large * large, axis=-1, keepdims=True)[:, None]
    found = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jnp.sqrt(target / jnp.maximum(found, _SMALL))).astype(x.dtype)


class Router(NamedTuple):
    """How much of each stream a token wants; guesses and corrections ask the same."""

    kernel: Float[Array, "A E"]
    weight: Float[Array, " E"]  # of the norm before it
    config: ModelConfig

    def __call__(self, stream: Float[Array, "N E"]) -> Float[Array, "N A"]:
        """From -1 to 1."""
        inputs = norm(stream, self.weight, None, self.config) * stream.shape[-1] ** -1
        out = project(inputs, self.kernel)
        return jnp.tanh(out.astype(stream.dtype).astype(jnp.float32)).astype(stream.dtype)


def router_of(block: "Block") -> Router:
    """That of a layer."""
    config, width = block.config, block.config.hidden_size
    kernel = kernel_of(block, "stream_router", config.side_streams + 1, width)
    weight = block.param("stream_router_norm", norm_init(config), (width,), block.dtype)
    return Router(kernel, weight, config)


def guess(block: "Block", router: Router, streams: Unsummed) -> Float[Array, "N A E"]:
    """What the layer expects all streams to become."""
    assert streams.sides is not None
    first = summed(streams)
    count = block.config.side_streams + 1
    factors = block.linear("stream_guess", router(first), count * count, False)
    factors = factors.astype(jnp.float32).reshape(-1, count, count)
    both = jnp.concatenate((first[:, None], streams.sides), axis=1).astype(jnp.float32)
    # Sums of few terms, each in one order whatever the batch.
    guesses = both + sum(factors[:, :, i, None] * both[:, None, i] for i in range(count))
    return guesses.astype(block.dtype)


def correct(
    block: "Block", router: Router, guesses: Float[Array, "N A E"], first: Float[Array, "N E"]
) -> Float[Array, "N A E"]:
    """All streams, now that the first is known."""
    count = block.config.side_streams + 1
    factors = block.linear("stream_correct", router(first), count, False).astype(block.dtype)
    surprise = (first - guesses[:, 0])[:, None]
    return guesses + surprise * (1 + factors)[:, :, None]
