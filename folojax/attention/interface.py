"""What an attention kernel is: a reason to refuse, and a function from queries and pages."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from folojax.kv.cache import PageFormat
from folojax.kv.placement import Placement
from folojax.models.core.interface import Scoring


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What decides whether a kernel takes a layer."""

    dtype: jnp.dtype  # of queries, keys and values
    storage_dtype: jnp.dtype  # of the pages
    head_dim: int  # D, of a key
    page_format: PageFormat  # how pages lie
    scoring: Scoring  # what becomes of the products of queries and keys

    @property
    def value_dim(self) -> int:
        """V, numbers of a value."""
        return self.head_dim if self.scoring.value_dim is None else self.scoring.value_dim


# Checkable at run time, so annotations can be checked under pytest.
@runtime_checkable
class Kernel(Protocol):
    """A way to attend."""

    def refusal(self, spec: AttentionSpec) -> str | None:
        """Why it is not for such layers, as the rest of a sentence; None: it is."""
        ...

    def attend(
        self,
        query: Float[Array, "T H D"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T K D"] | None,
        pages: Num[Array, "P N _ _ D"],
        placement: Placement,
        spec: AttentionSpec,
        sinks: Float[Array, " H"] | None = None,
    ) -> tuple[Num[Array, "P N _ _ D"], Float[Array, "T H V"]]:
        """Stores the tokens, and causal attention of each to its row, softmax in float32.

        Args:
            query: In any dtype, which is that of the result.
            key: Of the tokens themselves, to be stored as `folojax.kv.cache.write` does.
            value: Likewise; None where `spec.scoring` says that values are a part of keys.
            pages: One layer of a cache. Behind a row's last token and in pages of padding, keys
                may be NaN; all values are finite.
            placement: Of the rows.
            spec: That the kernel does not refuse.
            sinks: As of `Attend`.

        Returns:
            The result for each token; finite and of no meaning for one of padding.
        """
        ...
