"""The seam between a model and whoever runs it: attention is a callable the caller provides."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float


# Checkable at run time, so annotations can be checked under pytest.
@runtime_checkable
class Attend(Protocol):
    """Stores the keys and values of N tokens and attends with their queries.

    The model knows nothing of sequences, pages or masks: it hands over one layer's query, key and
    value for a flat axis of tokens, already normed and rotated, and threads `cache` through.
    Scaling by 1/sqrt(D) and masking are the callable's own.
    """

    def __call__(
        self,
        cache: Any,
        layer: int,
        query: Float[Array, "N H D"],
        key: Float[Array, "N K D"],
        value: Float[Array, "N K D"],
    ) -> tuple[Any, Float[Array, "N H D"]]:
        """Returns the new cache and each token's attention output, in the query's dtype."""
        ...
