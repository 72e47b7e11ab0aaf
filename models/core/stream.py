"""The residual stream between layers: what is not added to it yet, and what lies beside it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from folojax.models.core.config import ModelConfig
from folojax.models.core.layers import add_and_norm, norm


class Unsummed(NamedTuple):
    """A residual stream and what is still to be added to it, by the norm that comes next.

    Beside it, in models whose layers share keys and values, those that later layers read: of the
    last layer with a window that has some, and of the last without. In models of several residual
    streams these lie beside the first.
    """

    stream: Float[Array, "N E"]
    update: Float[Array, "N E"] | None = None
    lent: tuple[Any, ...] = ()
    sides: Float[Array, "N Y E"] | None = None


def summed(stream: Float[Array, "N E"] | Unsummed) -> Float[Array, "N E"]:
    """The residual stream."""
    if not isinstance(stream, Unsummed):
        return stream
    return stream.stream if stream.update is None else stream.stream + stream.update


def with_stream(
    old: Float[Array, "N E"] | Unsummed, stream: Float[Array, "N E"]
) -> Float[Array, "N E"] | Unsummed:
    """Another residual stream, beside what lies beside the old one."""
    lent, sides = (old.lent, old.sides) if isinstance(old, Unsummed) else ((), None)
    return stream if not lent and sides is None else Unsummed(stream, lent=lent, sides=sides)


def normed(
    stream: Float[Array, "N E"] | Unsummed, weight: Any, bias: Any, config: ModelConfig
) -> tuple[Float[Array, "N E"], Float[Array, "N E"]]:
    """The residual stream and its norm."""
    update = stream.update if isinstance(stream, Unsummed) else None
    plain = stream.stream if isinstance(stream, Unsummed) else stream
    if config.is_ordered and update is None:
        update = jnp.zeros_like(plain)  # for the kernel that sums in order
    if update is not None:
        return add_and_norm(plain, update, weight, bias, config)
    return plain, norm(plain, weight, bias, config)
