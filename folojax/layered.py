"""Ways to run `prefill` and `decode`: as one program, or a few layers at a time.

On a GPU a step is one program: one CUDA graph, and one call of the host. On CPU the layers of a
model are equal, so a group of some six is compiled once and called for each: compiling takes a
fraction of the time. A call costs 0.2 ms on CPU, which is too much for a layer of 0.5 to 1.3.

    whole      prefill | decode
    layered    begin ──> group ──> group ──> ... ──> end      each with its own part of the cache
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from folojax import step
from folojax.attention import attend_chunks, attend_tokens
from folojax.kv_cache import KVCache, layer_of, with_layers
from folojax.models.interface import Layered
from folojax.models.row_sums import REORDERED
from folojax.residual import ActivationEdit, with_taps
from folojax.state import DecodeInputs, PrefillInputs

_LAYER = "layers_"

Streams: TypeAlias = dict[int, Any]
"""The residual streams [T, E] of all tokens of a call, padding included, by layer."""


class Steps(Protocol):
    """`step.prefill` and `step.decode` for one model, both DONATING the cache.

    What they return is followed by the streams behind the layers that `taps` names.
    """

    def prefill(
        self,
        params: Any,
        cache: KVCache,
        inputs: PrefillInputs,
        edits: tuple[ActivationEdit, ...] = (),
        is_edited: Any = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Any, Any, Any, Streams]:
        """As `step.prefill`."""
        ...

    def decode(
        self,
        params: Any,
        cache: KVCache,
        tokens: Any,
        inputs: DecodeInputs,
        edits: tuple[ActivationEdit, ...] = (),
        is_edited: Any = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Any, Any, Streams]:
        """As `step.decode`."""
        ...

    def lower_prefill(self, params: Any, cache: KVCache, inputs: PrefillInputs) -> list[Any]:
        """Traces what a call of `prefill` runs; arrays may be shapes, and nothing is donated."""
        ...

    def lower_decode(
        self, params: Any, cache: KVCache, tokens: Any, inputs: DecodeInputs
    ) -> list[Any]:
        """Traces what a call of `decode` runs, likewise."""
        ...


def make_steps(model: nn.Module, backend: str) -> Steps:
    """The way that suits a platform, by JAX's name of it."""
    if backend == "cpu" and isinstance(model, Layered):
        return LayeredSteps(model)
    return WholeSteps(model)


class WholeSteps:
    """A step is one program."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def prefill(
        self,
        params: Any,
        cache: KVCache,
        inputs: PrefillInputs,
        edits: tuple[ActivationEdit, ...] = (),
        is_edited: Any = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Any, Any, Any, Streams]:
        """As `step.prefill`."""
        result, streams = self._run(_prefill, taps, edits, params, cache, inputs, is_edited)
        return *result, streams

    def decode(
        self,
        params: Any,
        cache: KVCache,
        tokens: Any,
        inputs: DecodeInputs,
        edits: tuple[ActivationEdit, ...] = (),
        is_edited: Any = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Any, Any, Streams]:
        """As `step.decode`."""
        args = params, cache, tokens, inputs, is_edited
        result, streams = self._run(_decode, taps, edits, *args)
        return *result, streams

    def _run(
        self,
        function: Any,
        taps: tuple[int, ...],
        edits: tuple[ActivationEdit, ...],
        *args: Any,
    ) -> tuple[Any, Streams]:
        if not taps:
            return function(*args, model=self._model, edits=edits), {}
        return _with_taps(*args, function=function, taps=taps, model=self._model, edits=edits)

    def lower_prefill(self, params: Any, cache: KVCache, inputs: PrefillInputs) -> list[Any]:
        """One program."""
        # Argument by argument as in a call: one that is left out makes another program of it.
        return [_prefill.lower(params, cache, inputs, None, model=self._model, edits=())]

    def lower_decode(
        self, params: Any, cache: KVCache, tokens: Any, inputs: DecodeInputs
    ) -> list[Any]:
        """One program."""
        args = params, cache, tokens, inputs, None
        return [_decode.lower(*args, model=self._model, edits=())]


def _whole(jitted: Any, *static: str) -> Any:
    """A program of its own, with the options of a group of layers: as fast, and rounding alike."""
    function = jitted.__wrapped__
    options: Any = {"donate_argnames": "cache", "compiler_options": REORDERED}
    return jax.jit(function, static_argnames=static, **options)


_prefill = _whole(step.prefill, "model", "edits")
_decode = _whole(step.decode, "model", "edits")
_with_taps = _whole(with_taps, "function", "taps", "model", "edits")


def split_layers(kinds: Sequence[Hashable]) -> list[range]:
    """Cuts a stack of layers into groups of some six, of which as few as possible differ.

    Args:
        kinds: What each layer is; layers of a kind share a program.

    >>> split_layers(["a"] * 30)
    [range(0, 6), range(6, 12), range(12, 18), range(18, 24), range(24, 30)]
    >>> split_layers(["a", "b"] * 4)
    [range(0, 4), range(4, 8)]
    """

    def split(size: int) -> list[range]:
        firsts = range(0, len(kinds), size)
        return [range(first, min(first + size, len(kinds))) for first in firsts]

    def cost(size: int) -> tuple[int, int]:
        programs = {tuple(kinds[layer] for layer in group) for group in split(size)}
        return len(programs), abs(size - 6)

    return split(min(range(4, 9), key=cost))


class LayeredSteps:
    """A step is a program for each kind of group of layers, and one before and one after them.

    One with edits of activations is a program: layers that are run alone do not know their number.
    """

    def __init__(self, model: Any) -> None:
        """`model` is a `Layered` Flax module."""
        self._model = model
        self._blocks = [model.alone(layer) for layer in range(model.config.num_layers)]
        self._groups = split_layers(self._blocks)
        self._whole = WholeSteps(model)

    def prefill(
        self,
        params: Any,
        cache: KVCache,
        inputs: PrefillInputs,
        edits: tuple[ActivationEdit, ...] = (),
        is_edited: Any = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Any, Any, Any, Streams]:
        """As `step.prefill`."""
        if edits:
            return self._whole.prefill(params, cache, inputs, edits, is_edited, taps)
        outer = _outer(params)
        begun = _begin_prefill(outer, layer_of(cache, 0), inputs, model=self._model)
        cache, hidden, streams = self._run_layers(params, cache, begun, attend_chunks, taps)
        return cache, *_end_prefill(outer, hidden, inputs, model=self._model), streams

    def decode(
        self,
        params: Any,
        cache: KVCache,
        tokens: Any,
        inputs: DecodeInputs,
        edits: tuple[ActivationEdit, ...] = (),
        is_edited: Any = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Any, Any, Streams]:
        """As `step.decode`."""
        if edits:
            return self._whole.decode(params, cache, tokens, inputs, edits, is_edited, taps)
        outer = _outer(params)
        begun = _begin_decode(outer, layer_of(cache, 0), tokens, inputs, model=self._model)
        cache, hidden, streams = self._run_layers(params, cache, begun, attend_tokens, taps)
        return cache, _end_decode(outer, hidden, model=self._model), streams

    def lower_prefill(self, params: Any, cache: KVCache, inputs: PrefillInputs) -> list[Any]:
        """One program before the layers, one of each kind of group, one after them."""
        outer, model = _outer(params), self._model
        bound = functools.partial(_begin_prefill, model=model)
        begin = _begin_prefill.lower(outer, layer_of(cache, 0), inputs, model=model)
        _, hidden, _ = begun = result_shapes(bound, outer, layer_of(cache, 0), inputs)
        layers = list(self._lower_layers(params, cache, begun, attend_chunks))
        return [begin, *layers, _end_prefill.lower(outer, hidden, inputs, model=model)]

    def lower_decode(
        self, params: Any, cache: KVCache, tokens: Any, inputs: DecodeInputs
    ) -> list[Any]:
        """One program before the layers, one of each kind of group, one after them."""
        outer, model = _outer(params), self._model
        bound = functools.partial(_begin_decode, model=model)
        begin = _begin_decode.lower(outer, layer_of(cache, 0), tokens, inputs, model=model)
        _, hidden, _ = begun = result_shapes(bound, outer, layer_of(cache, 0), tokens, inputs)
        layers = list(self._lower_layers(params, cache, begun, attend_tokens))
        return [begin, *layers, _end_decode.lower(outer, hidden, model=model)]

    def _run_layers(
        self,
        params: Any,
        cache: KVCache,
        begun: tuple[Any, Any, Any],
        attend: Callable[..., Any],
        taps: tuple[int, ...],
    ) -> tuple[KVCache, Any, Streams]:
        plan, hidden, shared = begun
        layers: list[KVCache] = []
        streams: Streams = {}
        for group in self._groups:
            own, rotaries, parts, blocks = self._of_group(params, cache, shared, group)
            tapped = tuple(i for i, layer in enumerate(group) if layer in taps)
            hidden, parts, found = _run_group(
                own, parts, hidden, rotaries, plan, blocks=blocks, attend=attend, taps=tapped
            )
            layers += parts
            streams |= {group[i]: stream for i, stream in found.items()}
        return with_layers(layers), hidden, streams

    def _lower_layers(
        self, params: Any, cache: KVCache, begun: tuple[Any, Any, Any], attend: Callable[..., Any]
    ) -> Iterator[Any]:
        plan, hidden, shared = begun
        seen = set()
        for group in self._groups:
            own, rotaries, parts, blocks = self._of_group(params, cache, shared, group)
            if blocks not in seen:
                seen.add(blocks)
                yield _run_group.lower(
                    own, parts, hidden, rotaries, plan, blocks=blocks, attend=attend, taps=()
                )

    def _of_group(self, params: Any, cache: KVCache, shared: Any, group: range) -> Any:
        """Parameters, rotations, caches and modules of some layers."""
        return (
            [params[f"{_LAYER}{layer}"] for layer in group],
            [self._model.layer_rotary(shared, layer) for layer in group],
            [layer_of(cache, layer) for layer in group],
            tuple(self._blocks[layer] for layer in group),
        )


@functools.partial(jax.jit, static_argnames=("model",))
def _begin_prefill(params: Any, layer: KVCache, inputs: PrefillInputs, *, model: Any) -> Any:
    plan, tokens, positions = step.plan_prefill(layer, inputs)
    return plan, *model.apply({"params": params}, tokens, positions, method="begin")


@functools.partial(jax.jit, static_argnames=("model",))
def _begin_decode(
    params: Any, layer: KVCache, tokens: Any, inputs: DecodeInputs, *, model: Any
) -> Any:
    plan, token = step.plan_decode(layer, tokens, inputs)
    return plan, *model.apply({"params": params}, token, inputs.position, method="begin")


@functools.partial(
    jax.jit,
    static_argnames=("blocks", "attend", "taps"),
    donate_argnames=("caches", "hidden"),
    compiler_options=REORDERED,
)
def _run_group(
    params: list[Any],
    caches: list[KVCache],
    hidden: Any,
    rotaries: list[Any],
    plan: Any,
    *,
    blocks: tuple[nn.Module, ...],
    attend: Callable[..., Any],
    taps: tuple[int, ...],
) -> tuple[Any, list[KVCache], Streams]:
    """DONATES `caches`, one of each layer, and `hidden`; `taps` are places in the group."""
    bound = functools.partial(attend, plan)
    after: list[Any] = []
    streams: Streams = {}
    for place, (own, cache, rotary, block) in enumerate(
        zip(params, caches, rotaries, blocks, strict=True)
    ):
        hidden, new = block.apply({"params": own}, hidden, rotary, cache, bound)
        after.append(new)
        if place in taps:
            streams[place] = jnp.copy(hidden)  # the next group takes the array for its own
    return hidden, after, streams


@functools.partial(jax.jit, static_argnames=("model",))
def _end_prefill(params: Any, hidden: Any, inputs: PrefillInputs, *, model: Any) -> Any:
    hidden = model.apply({"params": params}, hidden, method="end")
    return step.last_and_all(hidden, inputs)


@functools.partial(jax.jit, static_argnames=("model",))
def _end_decode(params: Any, hidden: Any, *, model: Any) -> Any:
    return model.apply({"params": params}, hidden, method="end")


def _outer(params: Any) -> Any:
    """The parameters outside the layers."""
    return {name: leaf for name, leaf in params.items() if not name.startswith(_LAYER)}


def result_shapes(function: Callable[..., Any], *args: Any) -> Any:
    """What a jitted function gives, as shapes of arrays that are committed to the device."""
    sharding = SingleDeviceSharding(jax.devices()[0])

    def result(leaf: Any) -> jax.ShapeDtypeStruct:
        # A weak type is another type to the next program.
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type
        )

    return jax.tree.map(result, jax.eval_shape(function, *args))
