"""The seam between a model and whoever runs it: attention is a callable the caller provides."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """What attention makes of the products of queries and keys; hashable, static under jit."""

    scale: float | None = None
    """Multiplies them; None: 1 / sqrt(D)."""
    softcap: float | None = None
    """Scores become cap * tanh(scores / cap)."""
    window: int | None = None
    """A token sees so many tokens, itself included; None: all before it."""

    def scores(self, products: Float[Array, "*shape"], head_dim: int) -> Float[Array, "*shape"]:
        """Scaled and capped, not masked yet."""
        scores = products * (head_dim**-0.5 if self.scale is None else self.scale)
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def is_visible(self, age: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether a key is seen, by how many positions it lies before the query."""
        return age >= 0 if self.window is None else (age >= 0) & (age < self.window)


PLAIN = Scoring()


# Checkable at run time, so annotations can be checked under pytest.
@runtime_checkable
class Attend(Protocol):
    """Stores the keys and values of N tokens and attends with their queries.

    The model knows nothing of sequences, pages or masks: it hands over one layer's query, key and
    value for a flat axis of tokens, already normed and rotated, and threads `cache` through.
    What is to be done with the scores comes along, as it may differ from layer to layer.
    """

    def __call__(
        self,
        cache: Any,
        layer: int,
        query: Float[Array, "N H D"],
        key: Float[Array, "N K D"],
        value: Float[Array, "N K D"],
        scoring: Scoring = PLAIN,
    ) -> tuple[Any, Float[Array, "N H D"]]:
        """Returns the new cache and each token's attention output, in the query's dtype."""
        ...


@runtime_checkable
class Layered(Protocol):
    """A model that can be run some layers at a time, each call a program of its own.

    The same as its `__call__`, cut in pieces: `begin`, then `alone(i)` with the parameters
    `layers_<i>` on what `layer_rotary` picks, then `end`.
    """

    config: Any

    def begin(self, tokens: Int[Array, " N"], positions: Int[Array, " N"]) -> tuple[Any, Any]:
        """The residual stream before the first layer, and what all layers share."""
        ...

    def end(self, hidden: Float[Array, "N E"]) -> Float[Array, "N E"]:
        """The hidden states, from the residual stream after the last layer."""
        ...

    def layer_rotary(self, shared: Any, layer: int) -> Any:
        """The part of what all layers share that a layer takes."""
        ...

    def alone(self, layer: int) -> Any:
        """A layer as a module; hashable, and equal for layers that compute the same.

        Called as (hidden, rotary, cache, attend), with a cache of this layer alone, of index 0.
        """
        ...
