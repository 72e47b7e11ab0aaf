"""The seam between a model and whoever runs it: attention is a callable the caller provides."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """What attention makes of the products of queries and keys; hashable, static under jit."""

    scale: float | None = None  # multiplies them; None: 1 / sqrt(D)
    softcap: float | None = None  # scores become cap * tanh(scores / cap)
    window: int | None = None  # a token sees so many tokens, itself included; None: all before it
    chunk: int | None = None  # a token sees those of its chunk of so many positions; None: all
    has_sinks: bool = False  # each head has one more score, of a key without a value
    value_dim: int | None = None
    """V: values are the first V numbers of keys, and are not given; None: they are."""

    def scores(self, products: Float[Array, "*shape"], head_dim: int) -> Float[Array, "*shape"]:
        """Scaled and capped, not masked yet."""
        scores = products * (head_dim**-0.5 if self.scale is None else self.scale)
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def is_visible(
        self, query: Int[Array, "*shape"], key: Int[Array, "*others"]
    ) -> Bool[Array, "*both"]:
        """Whether a token sees another, by their positions."""
        age = query - key
        is_seen = age >= 0 if self.window is None else (age >= 0) & (age < self.window)
        return is_seen if self.chunk is None else is_seen & (age <= query % self.chunk)


PLAIN = Scoring()


# Checkable at run time, so annotations can be checked under pytest.
@runtime_checkable
class Attend(Protocol):
    """Stores the keys and values of N tokens and attends with their queries.

    The model knows nothing of sequences, pages or masks: it hands over one layer's query, key and
    value for a flat axis of tokens, already normed and rotated, and threads `cache` through.
    What is to be done with the scores comes along, as it may differ from layer to layer. V, numbers
    of a value, is D, or else what `scoring` says.
    """

    def __call__(
        self,
        cache: Any,
        layer: int,
        query: Float[Array, "N H D"],
        key: Float[Array, "N K D"],
        value: Float[Array, "N K D"] | None,
        scoring: Scoring = PLAIN,
        sinks: Float[Array, " H"] | None = None,
    ) -> tuple[Any, Float[Array, "N H V"]]:
        """Returns the new cache and each token's attention output, in the query's dtype.

        `value` is None where values are a part of keys. `sinks` are given only where `scoring` has
        them: those scores, neither scaled nor capped.
        """
        ...


@runtime_checkable
class Recur(Protocol):
    """What an `Attend` needs beside its call, for layers that keep a state of each sequence.

    Again the model knows nothing of sequences, nor of where a state is kept: it hands over what the
    recurrence reads, for a flat axis of tokens, and `cache` comes back with the new states. The
    recurrences themselves are those of `folojax.models.core.recurrence`.
    """

    def convolve(
        self, cache: Any, layer: int, x: Float[Array, "N X"], kernel: Float[Array, "X W"]
    ) -> tuple[Any, Float[Array, "N X"]]:
        """Returns the new cache, and in float32 each channel's sum over its last W tokens."""
        ...

    def recur(
        self,
        cache: Any,
        layer: int,
        query: Float[Array, "N K D"],
        key: Float[Array, "N K D"],
        value: Float[Array, "N H Z"],
        decay: Float[Array, "N H"],
        beta: Float[Array, "N H"] | None = None,
    ) -> tuple[Any, Float[Array, "N H Z"]]:
        """Returns the new cache, and in float32 what each token reads of its state.

        With `beta` it is the gated delta rule, without it gated linear attention.
        """
        ...
