"""The layers of a model one by one, and what requests ask for between them: reading, and edits.

What lies between layers is the residual stream. Models need not know that it is read or edited.
Where a layer is edited and read, what is read is edited: what the next layer sees.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from folojax.kv.cache import KVCache
from folojax.models.core.adapted import with_slots
from folojax.models.core.decoder import Llama
from folojax.models.core.dense_attend import dense_attend
from folojax.models.core.interface import Attend
from folojax.models.core.moe import routed_block
from folojax.models.core.stream import summed, with_stream

LAYER = "layers_"
"""What the names of layers begin with, in modules and in their parameters."""

Residuals: TypeAlias = dict[int, Any]
"""By layer, the residual stream [T, E] behind it, of all tokens of a call, padding included; and by
`experts_key` of a layer, the experts [T, M] that tokens were sent to."""


def experts_key(layer: int) -> int:
    """Where `Residuals` have the experts of a layer: below 0. It is its own inverse."""
    return -1 - layer


@dataclasses.dataclass(frozen=True)
class ActivationEdit:
    """A function of the residual stream behind some layers, by name.

    Attributes:
        name: What `SamplingParams.activation_edits` calls it.
        layers: Behind which layers it is applied, from 0; one or several.
        apply: From the stream of one token [E], in the model's dtype, and the number of the layer
            to the new stream. Pure, traced once a layer.
    """

    name: str
    layers: Any  # an integer or a sequence of such; a tuple afterwards
    apply: Callable[[Any, int], Any]

    def __post_init__(self) -> None:
        # Of a list no hash could be taken, and steps are compiled by it.
        layers = layer_numbers(self.layers, f"layers of activation edit {self.name!r}")
        object.__setattr__(self, "layers", layers)


def layer_numbers(layers: Any, what: str) -> tuple[int, ...]:
    """Layers, of which one or several were given.

    Raises:
        ValueError: one is no integer; `what` says whose it is.
    """
    several = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    for layer in several:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise ValueError(f"{what} holds {layer!r}; it must hold numbers of layers, from 0")
    return tuple(map(operator.index, several))


class StepExtras(NamedTuple):
    """What a step of the model does beside its work, because a row asks for it; static.

    Attributes:
        activation_edits: In the order in which they apply.
        residual_layers: Behind which layers the residual stream is read.
        reads_experts: Whether the choice of experts is, in all layers that have any.
        forces_experts: Whether that choice is given (`CallInputs.routing`).
    """

    activation_edits: tuple[ActivationEdit, ...] = ()
    residual_layers: tuple[int, ...] = ()
    reads_experts: bool = False
    forces_experts: bool = False


NO_EXTRAS = StepExtras()


@functools.partial(jax.jit, static_argnames=("block", "reads_experts"))
def run_layer(
    params: Any,
    stream: Any,
    rotary: Any,
    cache: Any,
    attend: Any,
    *,
    block: nn.Module,
    reads_experts: bool = False,
) -> tuple[Any, Any, Any]:
    """One layer. Jitted, so that equal layers of a program are traced and lowered once.

    Returns:
        The residual stream, the cache, and the experts that tokens were sent to, if they are read.
    """
    options: dict[str, Any] = {"mutable": ["routing"]} if reads_experts else {}
    found: Any = block.apply({"params": params}, stream, rotary, cache, attend, **options)
    if not reads_experts:
        return *found, None
    result, kept = found
    return *result, kept["routing"]["experts"][0]


def run_layers(
    params: Any,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    caches: Sequence[Any],
    attend: Attend,
    *,
    model: Llama,
    extras: StepExtras = NO_EXTRAS,
    is_edited: Bool[Array, "T Z"] | None = None,
    adapters: Int[Array, " T"] | None = None,
    routing: Int[Array, "T L M"] | None = None,
) -> tuple[Float[Array, "T E"], list[Any], Residuals]:
    """The model layer by layer, as its `__call__`, and what extras ask for between them.

    Args:
        params: The module's parameters.
        tokens: As in `Llama.__call__`, like the positions.
        positions: Of the tokens.
        caches: What `attend` takes and gives back, of each layer alone.
        attend: Attention, a pytree of the arrays that it needs; for recurrent layers a `Recur` too.
        model: A module of `folojax.models`.
        extras: With Z edits.
        is_edited: Which tokens each edit is on for; None without edits.
        adapters: The slots of the tokens' adapters, where kernels are `AdaptedKernel`s.
        routing: The M experts of the tokens, in each of the L layers that have any; below 0: those
            that the router chooses. None: all are.

    Returns:
        The hidden states after the final norm, the new caches, and what was read.
    """
    outer = head_params(params)
    stream, shared = model.apply({"params": outer}, tokens, positions, method="begin")
    after, found, num_sparse = [], {}, 0
    for layer, cache in enumerate(caches):
        is_sparse = model.config.is_sparse(layer)
        is_routed = extras.reads_experts and is_sparse
        forced = routing[:, num_sparse] if routing is not None and is_sparse else None
        num_sparse += is_sparse
        stream, new, experts = run_layer(
            routed_block(with_slots(params[f"{LAYER}{layer}"], adapters), forced),
            stream,
            model.layer_rotary(shared, layer),
            cache,
            attend,
            block=model.alone(layer, leaves_sum=True),
            reads_experts=is_routed,
        )
        after.append(new)
        if is_routed:
            found[experts_key(layer)] = experts
        for index, edit in enumerate(extras.activation_edits):
            if layer in edit.layers:
                assert is_edited is not None, "edits come with the tokens that they are on for"
                plain = summed(stream)
                changed = jax.vmap(lambda x, edit=edit, layer=layer: edit.apply(x, layer))(plain)
                is_on = is_edited[:, index][:, None]
                edited = jnp.where(is_on, changed.astype(plain.dtype), plain)
                stream = with_stream(stream, edited)
        if layer in extras.residual_layers:
            found[layer] = plain = summed(stream)
            stream = with_stream(stream, plain)
    hidden: Any = model.apply({"params": outer}, stream, method="end")
    return hidden, after, found


def layer_of(cache: KVCache, index: int) -> KVCache:
    """A cache of one layer alone, as its layer 0; copies nothing."""
    return KVCache((cache.layers[index],), cache.format)


def join_layers(layers: Sequence[KVCache]) -> KVCache:
    """The inverse: caches of single layers as one."""
    return KVCache(tuple(one.layers[0] for one in layers), layers[0].format)


def head_params(params: Any) -> Any:
    """The part of a parameter tree that a model's `logits` reads: all but the layers.

    The sampler is handed no more than that: what a call costs grows with its number of arrays.
    """
    return {name: value for name, value in params.items() if not name.startswith(LAYER)}


def read_residuals(
    params: Any, tokens: Int[Array, " N"], layers: int | Sequence[int], *, model: Llama
) -> Float[Array, "L N E"]:
    """The residual stream behind some layers, for every token of one sequence.

    Pure: jit it (with `layers` static), differentiate or vmap it.

    Args:
        params: The module's parameters.
        tokens: A sequence from its first token on.
        layers: Which, from 0, one or several; they come in this order.
        model: A module of `folojax.models`.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = layer_numbers(layers, "layers")
    missing = sorted(set(layers) - set(range(model.config.num_layers)))
    if missing:
        last = model.config.num_layers - 1
        raise ValueError(f"layers holds {missing}; the model has layers 0 to {last}")
    positions, nothing = jnp.arange(len(tokens)), [None] * model.config.num_layers
    extras = StepExtras(residual_layers=layers)
    *_, found = run_layers(
        params, tokens, positions, nothing, dense_attend, model=model, extras=extras
    )
    return jnp.stack([found[layer] for layer in layers])
