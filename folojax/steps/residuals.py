"""The residual stream: reading it, and edits of it that are compiled into the model's step.

Both take hold of what a layer returns, through Flax's own interception of methods, so that models
need not know of it: a layer is a submodule `layers_<i>` that returns the residual stream first.
Where a layer is edited and read, what is read is edited: what the next layer sees.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from folojax.models.core.decoder import summed
from folojax.models.core.dense_attend import dense_attend

LAYER = "layers_"
"""What the names of layers begin with, in modules and in their parameters."""

Residuals: TypeAlias = dict[int, Any]
"""By layer, the residual stream [T, E] behind it, of all tokens of a call, padding included."""


@dataclasses.dataclass(frozen=True)
class ActivationEdit:
    """A function of the residual stream behind some layers, by name.

    Attributes:
        name: What `SamplingParams.activation_edits` calls it.
        layers: Behind which layers it is applied, from 0.
        apply: From the stream of one token [E], in the model's dtype, and the number of the layer
            to the new stream. Pure, traced once a layer.
    """

    name: str
    layers: Sequence[int]
    apply: Callable[[Any, int], Any]

    def __post_init__(self) -> None:
        # Of a list no hash could be taken, and steps are compiled by it.
        object.__setattr__(self, "layers", tuple(self.layers))


class StepExtras(NamedTuple):
    """What a step of the model does beside its work, because a row asks for it; static.

    Attributes:
        activation_edits: In the order in which they apply.
        residual_layers: Behind which layers the residual stream is read.
    """

    activation_edits: tuple[ActivationEdit, ...] = ()
    residual_layers: tuple[int, ...] = ()


NO_EXTRAS = StepExtras()


@contextlib.contextmanager
def with_extras(
    extras: StepExtras, is_edited: Bool[Array, "T Z"] | None = None
) -> Iterator[Residuals]:
    """A context in which a model's layers are edited and read; gives what is read, as it comes.

    What is read belongs to the trace in which the model runs.

    Args:
        extras: With Z edits; where there are neither edits nor layers, nothing is intercepted.
        is_edited: Which tokens each edit is on for; None without edits.
    """
    found: Residuals = {}
    edits, layers = extras

    def behind(layer: int, hidden: Array) -> Array:
        for index, one in enumerate(edits):
            if layer in one.layers:
                assert is_edited is not None, "edits come with the tokens that they are on for"
                changed = jax.vmap(lambda x, one=one: one.apply(x, layer))(hidden)
                is_on = is_edited[:, index][:, None]
                hidden = jnp.where(is_on, changed.astype(hidden.dtype), hidden)
        if layer in layers:
            found[layer] = hidden
        return hidden

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        name = context.module.name or ""
        if context.method_name != "__call__" or not name.startswith(LAYER):
            return out
        hidden, *rest = out
        return (behind(int(name.removeprefix(LAYER)), summed(hidden)), *rest)

    is_plain = extras == NO_EXTRAS
    with contextlib.nullcontext() if is_plain else nn.intercept_methods(interceptor):
        yield found


def read_residuals(
    params: Any, tokens: Int[Array, " N"], layers: Sequence[int], *, model: nn.Module
) -> Float[Array, "L N E"]:
    """The residual stream behind some layers, for every token of one sequence.

    Pure: jit, differentiate or vmap it.

    Args:
        params: The module's parameters.
        tokens: A sequence from its first token on.
        layers: Which, from 0; they come in this order.
        model: A module of `folojax.models`.

    Raises:
        ValueError: the model has no such layer.
    """
    with with_extras(StepExtras(residual_layers=tuple(layers))) as found:
        model.apply({"params": params}, tokens, jnp.arange(len(tokens)), None, dense_attend)
    missing = sorted(set(layers) - found.keys())
    if missing:
        last = model.config.num_layers - 1
        raise ValueError(f"layers holds {missing}; the model has layers 0 to {last}")
    return jnp.stack([found[layer] for layer in layers])
