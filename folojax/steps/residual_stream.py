"""The residual stream: reading it, and edits of it that are compiled into the model's step.

Both take hold of what a layer returns, through Flax's own interception of methods, so that models
need not know of it: a layer is a submodule `layers_<i>` that returns the stream first. Where a
layer is edited and read, what is read is the edited stream: what the next layer sees.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from folojax.models.core.decoder import summed
from folojax.models.core.dense_attend import dense_attend

_PREFIX = "layers_"

Streams: TypeAlias = dict[int, Any]
"""The residual streams [T, E] of all tokens of a call, padding included, by layer."""


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


def intercept(
    edits: tuple[ActivationEdit, ...], is_on: Bool[Array, "N Z"] | None
) -> contextlib.AbstractContextManager[None]:
    """A context in which a model's layers are edited, for the tokens whose request asks for it.

    Args:
        edits: Z of them, in order; none: nothing is intercepted.
        is_on: By token and edit.
    """
    if not edits:
        return contextlib.nullcontext()
    assert is_on is not None, "edits come with the rows that they are on for"

    def edit(layer: int, hidden: Array) -> Array:
        for index, one in enumerate(edits):
            if layer in one.layers:
                changed = jax.vmap(lambda x, one=one: one.apply(x, layer))(hidden)
                kept = is_on[:, index][:, None]
                hidden = jnp.where(kept, changed.astype(hidden.dtype), hidden)
        return hidden

    return nn.intercept_methods(_behind_layers(edit))


@contextlib.contextmanager
def read_layers(layers: Collection[int]) -> Iterator[dict[int, Array]]:
    """A context in which the streams behind some layers of a model are kept, by layer.

    Around `intercept`, not inside of it. What is kept belongs to the trace in which the model ran.
    """
    found: dict[int, Array] = {}

    def keep(layer: int, hidden: Array) -> Array:
        if layer in layers:
            found[layer] = hidden
        return hidden

    with nn.intercept_methods(_behind_layers(keep)) if layers else contextlib.nullcontext():
        yield found


@functools.partial(
    jax.jit, static_argnames=("function", "taps", "model", "edits"), donate_argnames="cache"
)
def with_taps(
    params: Any,
    cache: Any,
    *args: Any,
    function: Callable[..., Any],
    taps: tuple[int, ...],
    model: nn.Module,
    edits: tuple[ActivationEdit, ...],
) -> tuple[Any, dict[int, Float[Array, "T E"]]]:
    """A step of the model, and the streams behind some of its layers, for all T tokens of the call.

    DONATES `cache`.

    Args:
        params: As of the function.
        cache: As of the function.
        *args: Its further arguments.
        function: A jitted step, such as `folojax.prefill`; traced as a part of this one.
        taps: Which layers.
        model: As of the function.
        edits: As of the function.
    """
    with read_layers(taps) as found:
        # Within a jitted call of its own, what is read could not leave the trace.
        result = inspect.unwrap(function)(params, cache, *args, model=model, edits=edits)
    return result, found


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
    with read_layers(layers) as found:
        model.apply({"params": params}, tokens, jnp.arange(len(tokens)), None, dense_attend)
    missing = sorted(set(layers) - found.keys())
    if missing:
        last = model.config.num_layers - 1
        raise ValueError(f"layers holds {missing}; the model has layers 0 to {last}")
    return jnp.stack([found[layer] for layer in layers])


def _behind_layers(change: Callable[[int, Array], Array]) -> Any:
    """An interceptor that puts every layer's stream through a function."""

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        name = context.module.name or ""
        if context.method_name != "__call__" or not name.startswith(_PREFIX):
            return out
        hidden, *rest = out
        return (change(int(name.removeprefix(_PREFIX)), summed(hidden)), *rest)

    return interceptor
