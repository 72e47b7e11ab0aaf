"""Steps that are run some layers at a time: the way of a CPU.

The layers of a model are equal, so a group of a few is compiled once and called for each: compiling
takes a fraction of the time, and the program a fraction of the memory, 1.5 MB a layer. A call costs
0.2 ms on CPU, half of it while the call before still computes: too much for each single layer. And
no more than 32 calls may be under way: with many a step the host would wait to hand over the next
one instead of reading what the last one gave.

    begin ──> group ──> group ──> ... ──> end      each with its own part of the cache
"""

from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from folojax.attention import PagedAttend
from folojax.compile.programs import Program, Programs, Run, run
from folojax.kv.cache import KVCache
from folojax.models.core.adapted import with_slots
from folojax.models.core.decoder import Llama
from folojax.models.core.moe import routed_block
from folojax.models.core.stream import summed
from folojax.models.machine.row_sums import REORDERED
from folojax.steps.executables import Executable, StepKind
from folojax.steps.fused import WholeSteps
from folojax.steps.layers import (
    LAYER,
    Residuals,
    experts_key,
    head_params,
    join_layers,
    layer_of,
    run_layer,
)
from folojax.steps.placements import last_and_all, of_tokens, place
from folojax.steps.state import CallInputs, CallResults, DecodeInputs, EngineState, PrefillInputs

# Layers of a group. A decode program is larger, and there are more shapes of it.
_LAYERS = {"prefill": 5, "decode": 3}


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
    So are samplers, scorers, and several steps at once. See `folojax.steps.calls.Steps`.
    """

    kind: StepKind = "layers"

    def __init__(self, model: Llama) -> None:
        """Compiles nothing."""
        self._model = model
        self._blocks = [model.alone(layer) for layer in range(model.config.num_layers)]
        is_paged = [model.config.has_pages(layer) for layer in range(len(self._blocks))]
        self._paged = is_paged.index(True)  # a layer whose pages say how many there are
        self._groups = {kind: split_layers(self._blocks, size) for kind, size in _LAYERS.items()}
        self._whole = WholeSteps(model)
        self._group_programs: dict[Any, Program] = {}
        self._begin, self._end = _BEGIN.of(model=model), _END.of(model=model)

    def call(
        self,
        one: Executable,
        params: Any,
        state: EngineState,
        inputs: CallInputs,
        run: Run = run,
    ) -> tuple[EngineState, CallResults]:
        """As `Steps.call`."""
        if one.kind not in self._groups or one.extras.activation_edits:
            return self._whole.call(one, params, state, inputs, run)
        outer, cache, is_prefill = head_params(params), state.cache, one.kind == "prefill"
        tokens = None if is_prefill else state.slots.tokens
        known = outer, layer_of(cache, self._paged), tokens, inputs.rows, inputs.adapters
        placement, adapters, hidden, shared = run(self._begin, known)
        layers: list[KVCache] = []
        residuals: Residuals = {}
        for group in self._groups[one.kind]:
            program = self._program(group, one)
            hidden, parts, found = run(
                program,
                (
                    [params[f"{LAYER}{layer}"] for layer in group],
                    [layer_of(cache, layer) for layer in group],
                    hidden,
                    [self._model.layer_rotary(shared, layer) for layer in group],
                    placement,
                    adapters,
                    self._routing_of(inputs.routing, group),
                ),
            )
            layers += parts
            residuals |= {
                group[place] if place >= 0 else experts_key(group[experts_key(place)]): stream
                for place, stream in found.items()
            }
        last, every = run(self._end, (outer, hidden, inputs.rows if is_prefill else None))
        state = state._replace(cache=join_layers(layers))
        return state, CallResults(last, every, residuals=residuals)

    def _routing_of(self, routing: Any, group: range) -> Any:
        """The part of `CallInputs.routing` that is of a group's layers."""
        if routing is None:
            return None
        is_sparse = self._model.config.is_sparse
        first = sum(map(is_sparse, range(group.start)))
        return routing[:, :, first : first + sum(map(is_sparse, group))]

    def _program(self, group: range, one: Executable) -> Program:
        key = group.start, one.kind, one.extras
        found = self._group_programs.get(key)  # to hash modules takes as long as to call a program
        if found is None:
            blocks = tuple(self._blocks[layer] for layer in group)
            wanted = one.extras.residual_layers
            read = tuple(place for place, layer in enumerate(group) if layer in wanted)
            config, reads = self._model.config, one.extras.reads_experts
            sparse = [place for place, i in enumerate(group) if config.is_sparse(i)]
            routed = tuple(sparse) if reads else ()
            forced = tuple(sparse) if one.extras.forces_experts else ()
            found = _GROUP.of(blocks=blocks, read=read, routed=routed, forced=forced)
            self._group_programs[key] = found
        return found


def _begin(
    params: Any,
    layer: KVCache,
    tokens: Any,
    inputs: PrefillInputs | DecodeInputs,
    adapters: Any,
    *,
    model: Llama,
) -> Any:
    has_states = model.config.recurrent is not None
    placement, token, position = place(layer, tokens, inputs, has_states=has_states)
    if adapters is not None:
        adapters = of_tokens(adapters, inputs, placement)
    return placement, adapters, *model.apply({"params": params}, token, position, method="begin")


def _run_group(
    params: list[Any],
    caches: list[KVCache],
    hidden: Any,
    rotaries: list[Any],
    placement: Any,
    adapters: Any,
    routing: Any,
    *,
    blocks: tuple[nn.Module, ...],
    read: tuple[int, ...],
    routed: tuple[int, ...],
    forced: tuple[int, ...],
) -> tuple[Any, list[KVCache], Residuals]:
    """DONATES `caches`, one of each layer, and `hidden`; the others are places in the group."""
    bound = PagedAttend(placement)
    experts_of = dict[int, Any]()
    if routing is not None:
        by_token = placement.by_token(routing)
        experts_of = {number: by_token[:, place] for place, number in enumerate(forced)}
    after: list[Any] = []
    residuals: Residuals = {}
    layers = zip(params, caches, rotaries, blocks, strict=True)
    for number, (own, cache, rotary, block) in enumerate(layers):
        own = routed_block(with_slots(own, adapters), experts_of.get(number))
        options: Any = {"block": block, "reads_experts": number in routed}
        hidden, new, experts = run_layer(own, hidden, rotary, cache, bound, **options)
        after.append(new)
        if number in routed:
            residuals[experts_key(number)] = experts
        if number in read:
            residuals[number] = jnp.copy(
                summed(hidden)
            )  # the next group takes the array for its own
    return hidden, after, residuals


def _end(params: Any, hidden: Any, inputs: PrefillInputs | None, *, model: Llama) -> Any:
    hidden = model.apply({"params": params}, hidden, method="end")
    return (hidden, None) if inputs is None else last_and_all(hidden, inputs)


_BEGIN, _END = Programs(_begin), Programs(_end)
_GROUP = Programs(_run_group, donate=(1, 2), lies_as=(None, 1, None), compiler_options=REORDERED)
