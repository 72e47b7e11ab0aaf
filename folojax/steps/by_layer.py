"""Ways to run `prefill` and `decode`: as one program, or a few layers at a time.

On a GPU a step is one program: one CUDA graph, and one call of the host. On CPU the layers of a
model are equal, so a group of a few is compiled once and called for each: compiling takes a
fraction of the time, and the program a fraction of the memory, 1.5 MB a layer. A call costs 0.2 ms
on CPU, half of it while the call before still computes: too much for each single layer. And no
more than 32 calls may be under way: with many a step the host would wait to hand over the next one
instead of reading what the last one gave.

    whole      prefill | decode
    layered    begin ──> group ──> group ──> ... ──> end      each with its own part of the cache
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import jax.numpy as jnp
from flax import linen as nn

from folojax.attention import attend
from folojax.compile.programs import Call, Program, Programs
from folojax.kv.cache import KVCache, join_layers
from folojax.models.core.decoder import Llama
from folojax.models.machine.row_sums import REORDERED
from folojax.steps.fused import WholeSteps
from folojax.steps.placements import last_and_all, place_decode, place_prefill
from folojax.steps.residual_stream import ActivationEdit, Streams
from folojax.steps.state import DecodeInputs, PrefillInputs

_LAYER = "layers_"

# Layers of a group. A decode program is larger, and there are more shapes of it.
_PREFILL_LAYERS, _DECODE_LAYERS = 5, 3

_Kind: TypeAlias = Literal["prefill", "decode"]


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

    def prefill_calls(self, params: Any, cache: KVCache, inputs: PrefillInputs) -> list[Call]:
        """The programs that `prefill` runs, each once; arrays may be shapes."""
        ...

    def decode_calls(
        self, params: Any, cache: KVCache, tokens: Any, inputs: DecodeInputs
    ) -> list[Call]:
        """The programs that `decode` runs, likewise."""
        ...


def make_steps(
    model: nn.Module, is_layered: bool, most_tokens: int | None = None
) -> "WholeSteps | LayeredSteps":
    """Some layers at a time where that is wanted and the model can be run so.

    Args:
        model: Of `folojax.models`.
        is_layered: Whether that is wanted.
        most_tokens: Of prompts in a step; see `WholeSteps`.
    """
    if is_layered and isinstance(model, Llama):
        return LayeredSteps(model)
    return WholeSteps(model, most_tokens)


def split_layers(kinds: Sequence[Hashable], wanted: int) -> list[range]:
    """Cuts a stack of layers into groups of some size, of which as few as possible differ.

    Args:
        kinds: What each layer is; layers of a kind share a program.
        wanted: Layers of a group, if that makes no more programs than another size.

    >>> split_layers(["a"] * 9, 3)
    [range(0, 3), range(3, 6), range(6, 9)]
    >>> split_layers(["a", "b"] * 4, 3)
    [range(0, 4), range(4, 8)]
    """

    def split(size: int) -> list[range]:
        firsts = range(0, len(kinds), size)
        return [range(first, min(first + size, len(kinds))) for first in firsts]

    def cost(size: int) -> tuple[int, int]:
        programs = {tuple(kinds[layer] for layer in group) for group in split(size)}
        return len(programs), abs(size - wanted)

    return split(min(range(3, 9), key=cost))


class LayeredSteps:
    """A step is a program for each kind of group of layers, and one before and one after them.

    One with edits of activations is a program: layers that are run alone do not know their number.
    """

    def __init__(self, model: Llama) -> None:
        self._model = model
        self._blocks = [model.alone(layer) for layer in range(model.config.num_layers)]
        self._groups: dict[_Kind, list[range]] = {
            "prefill": split_layers(self._blocks, _PREFILL_LAYERS),
            "decode": split_layers(self._blocks, _DECODE_LAYERS),
        }
        self._whole = WholeSteps(model)
        self._group_programs: dict[Any, Program] = {}
        self._begin_prefill = _BEGIN_PREFILL.of(model=model)
        self._end_prefill = _END_PREFILL.of(model=model)
        self._begin_decode = _BEGIN_DECODE.of(model=model)
        self._end_decode = _END_DECODE.of(model=model)

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
        begun = self._begin_prefill(outer, cache.layer(0), inputs)
        cache, hidden, streams = self._run_layers(params, cache, begun, "prefill", taps)
        return cache, *self._end_prefill(outer, hidden, inputs), streams

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
        begun = self._begin_decode(outer, cache.layer(0), tokens, inputs)
        cache, hidden, streams = self._run_layers(params, cache, begun, "decode", taps)
        return cache, self._end_decode(outer, hidden), streams

    def prefill_calls(self, params: Any, cache: KVCache, inputs: PrefillInputs) -> list[Call]:
        """One program before the layers, one of each kind of group, one after them."""
        outer = _outer(params)
        begin = Call(self._begin_prefill, (outer, cache.layer(0), inputs))
        _, hidden, _ = begun = begin.result_shapes()
        layers = self._layer_calls(params, cache, begun, "prefill")
        return [begin, *layers, Call(self._end_prefill, (outer, hidden, inputs))]

    def decode_calls(
        self, params: Any, cache: KVCache, tokens: Any, inputs: DecodeInputs
    ) -> list[Call]:
        """One program before the layers, one of each kind of group, one after them."""
        outer = _outer(params)
        begin = Call(self._begin_decode, (outer, cache.layer(0), tokens, inputs))
        _, hidden, _ = begun = begin.result_shapes()
        layers = self._layer_calls(params, cache, begun, "decode")
        return [begin, *layers, Call(self._end_decode, (outer, hidden))]

    def _run_layers(
        self,
        params: Any,
        cache: KVCache,
        begun: tuple[Any, Any, Any],
        kind: _Kind,
        taps: tuple[int, ...],
    ) -> tuple[KVCache, Any, Streams]:
        placement, hidden, shared = begun
        layers: list[KVCache] = []
        streams: Streams = {}
        for group in self._groups[kind]:
            own, rotaries, parts = self._of_group(params, cache, shared, group)
            tapped = tuple(i for i, layer in enumerate(group) if layer in taps)
            run_group = self._group_program(group, kind, tapped)
            hidden, parts, found = run_group(own, parts, hidden, rotaries, placement)
            layers += parts
            streams |= {group[i]: stream for i, stream in found.items()}
        return join_layers(layers), hidden, streams

    def _layer_calls(
        self, params: Any, cache: KVCache, begun: tuple[Any, Any, Any], kind: _Kind
    ) -> list[Call]:
        placement, hidden, shared = begun
        calls: dict[Program, Call] = {}
        for group in self._groups[kind]:
            own, rotaries, parts = self._of_group(params, cache, shared, group)
            program = self._group_program(group, kind, ())
            calls.setdefault(program, Call(program, (own, parts, hidden, rotaries, placement)))
        return list(calls.values())

    def _group_program(self, group: range, kind: _Kind, taps: tuple[int, ...]) -> Program:
        key = group.start, kind, taps
        found = self._group_programs.get(key)  # to hash modules takes as long as to call a program
        if found is None:
            blocks = tuple(self._blocks[layer] for layer in group)
            found = _RUN_GROUP.of(blocks=blocks, taps=taps)
            self._group_programs[key] = found
        return found

    def _of_group(self, params: Any, cache: KVCache, shared: Any, group: range) -> Any:
        """Parameters, rotations and caches of some layers."""
        return (
            [params[f"{_LAYER}{layer}"] for layer in group],
            [self._model.layer_rotary(shared, layer) for layer in group],
            [cache.layer(layer) for layer in group],
        )


def _begin_prefill(params: Any, layer: KVCache, inputs: PrefillInputs, *, model: Any) -> Any:
    placement, tokens, positions = place_prefill(layer, inputs)
    return placement, *model.apply({"params": params}, tokens, positions, method="begin")


def _begin_decode(
    params: Any, layer: KVCache, tokens: Any, inputs: DecodeInputs, *, model: Any
) -> Any:
    placement, token = place_decode(layer, tokens, inputs)
    return placement, *model.apply({"params": params}, token, inputs.position, method="begin")


def _run_group(
    params: list[Any],
    caches: list[KVCache],
    hidden: Any,
    rotaries: list[Any],
    placement: Any,
    *,
    blocks: tuple[nn.Module, ...],
    taps: tuple[int, ...],
) -> tuple[Any, list[KVCache], Streams]:
    """DONATES `caches`, one of each layer, and `hidden`; `taps` are places in the group."""
    bound = functools.partial(attend, placement)
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


def _end_prefill(params: Any, hidden: Any, inputs: PrefillInputs, *, model: Any) -> Any:
    hidden = model.apply({"params": params}, hidden, method="end")
    return last_and_all(hidden, inputs)


def _end_decode(params: Any, hidden: Any, *, model: Any) -> Any:
    return model.apply({"params": params}, hidden, method="end")


_BEGIN_PREFILL, _BEGIN_DECODE = Programs(_begin_prefill), Programs(_begin_decode)
_RUN_GROUP = Programs(_run_group, donate=(1, 2), compiler_options=REORDERED)
_END_PREFILL, _END_DECODE = Programs(_end_prefill), Programs(_end_decode)


def _outer(params: Any) -> Any:
    """The parameters outside the layers."""
    return {name: leaf for name, leaf in params.items() if not name.startswith(_LAYER)}
