"""Calls that are one program each: the way of a GPU, and of the sampler everywhere.

One program is one CUDA graph and one call of the host, which has less than a millisecond for it:
its small inputs come as one array, its report leaves as one (`folojax.steps.packing`), and what a
call needs is looked up by its `Executable` and not made.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from folojax.compile.programs import IN_GRAPH, Program, Programs, Run, run
from folojax.kv import KVCache
from folojax.models.machine.row_sums import REORDERED
from folojax.sampling.rows import SlotState
from folojax.sampling.sampler import SamplingClass, report_shapes
from folojax.steps import step
from folojax.steps.executables import Executable, StepKind
from folojax.steps.packing import PackedReport, Packing, pack_report, report_packing
from folojax.steps.placements import last_and_all
from folojax.steps.state import CallInputs, CallResults, EngineState

_WITH_CACHE = ("prefill", "decode", "decode_steps", "rows")


class _Ready(NamedTuple):
    """What is known of the calls of one executable.

    Attributes:
        program: That they run.
        packing: Of their inputs.
        report: Of what they report; None where they sample nothing.
        key: The compiled program's, which is this engine's alone: others have other shapes.
    """

    program: Program
    packing: Packing
    report: Packing | None
    key: object


class WholeSteps:
    """A call is a program, a decode step with its sampling in it; see `folojax.steps.calls`."""

    kind: StepKind = "whole"

    def __init__(self, model: nn.Module, programs: Mapping[str, Programs] | None = None) -> None:
        """Compiles nothing.

        Args:
            model: Of `folojax.models`.
            programs: By kind of executable; None: those of this module.
        """
        self._model = model
        self._programs = _PROGRAMS if programs is None else programs
        self._ready: dict[Executable, _Ready] = {}

    def call(
        self,
        one: Executable,
        params: Any,
        state: EngineState,
        inputs: CallInputs,
        run: Run = run,
    ) -> tuple[EngineState, CallResults]:
        """As `folojax.steps.calls.Steps.call`."""
        ready = self._ready.get(one)
        if ready is None:
            ready = self._ready[one] = self._prepare(one, inputs)
        cache = state.cache if one.kind in _WITH_CACHE else None
        given = step.head_params(params) if cache is None else params
        packed, rest = ready.packing.pack(inputs)
        args = given, cache, _slots_of(one, state.slots), packed, rest
        cache, slots, results = run(ready.program, args, ready.key)
        if ready.report is not None:
            results = results._replace(report=PackedReport(results.report, ready.report))
        return _joined(state, cache, slots), results

    def _prepare(self, one: Executable, inputs: CallInputs) -> _Ready:
        packing = Packing.of(inputs, one.rows)
        program = self._programs[one.kind].of(one=one, packing=packing, model=self._model)
        is_sampled = one.spec is not None and one.kind != "score"
        report = report_packing(report_shapes(one.sampler, one.rows)) if is_sampled else None
        return _Ready(program, packing, report, object())


def _slots_of(one: Executable, slots: SlotState) -> SlotState | None:
    """The part that an executable takes: of another one it would be compiled once more."""
    if one.kind in ("prefill", "score"):
        return None
    spec = one.spec
    is_edited = spec is not None and spec.needed >= SamplingClass.EDITED
    is_processed = spec is not None and spec.processors
    return SlotState(
        slots.tokens,
        slots.edits if is_edited else None,
        slots.processors if is_processed else None,
    )


def _joined(state: EngineState, cache: Any, slots: SlotState | None) -> EngineState:
    """What a call gave back, and the rest of what there was."""
    kept = state.slots
    if slots is not None:
        kept = SlotState(
            slots.tokens,
            kept.edits if slots.edits is None else slots.edits,
            kept.processors if slots.processors is None else slots.processors,
        )
    return EngineState(state.cache if cache is None else cache, kept)


def packed(
    function: Callable[..., Any], name: str, options: dict[str, Any] | None = None
) -> Programs:
    """Programs of a function, with all small inputs as one array; static is the executable.

    The function goes from parameters, cache, slots, `CallInputs`, executable and model to new cache
    and slots, which are DONATED, and `CallResults`.
    """

    def compute(
        params: Any,
        cache: Any,
        slots: Any,
        packed: Any,
        rest: list[Any],
        *,
        one: Executable,
        packing: Packing,
        model: nn.Module,
    ) -> Any:
        return function(params, cache, slots, packing.unpack(packed, rest), one, model)

    compute.__name__ = name  # of the compiled program, too
    return Programs(compute, donate=(1, 2), compiler_options=options)


def _prefill(
    params: Any, cache: KVCache, slots: None, inputs: CallInputs, one: Executable, model: Any
) -> Any:
    cache, hidden, placement, residuals = step.forward(
        params, cache, None, inputs.rows, model, one.extras, inputs.is_edited, one.most_tokens
    )
    last, every = last_and_all(hidden, inputs.rows, placement)
    return cache, slots, CallResults(last, every, residuals=residuals)


def decode_rows(
    params: Any, cache: KVCache, slots: SlotState, inputs: CallInputs, one: Executable, model: Any
) -> Any:
    """A token of every row, and with a `spec` the next one's draw; for `packed`."""
    cache, hidden, _, residuals = step.forward(
        params, cache, slots.tokens, inputs.rows, model, one.extras, inputs.is_edited
    )
    if one.spec is None:
        return cache, slots, CallResults(hidden, residuals=residuals)
    slots, out = step.sample_hidden(params, slots, hidden, inputs.sampling, model, one.spec)
    return cache, slots, CallResults(report=pack_report(out), residuals=residuals)


def _decode_steps(
    params: Any, cache: KVCache, slots: SlotState, inputs: CallInputs, one: Executable, model: Any
) -> Any:
    cache, slots, out, residuals = step.decode_steps(
        params, cache, slots, inputs, model, one.sampler, one.tokens, one.extras
    )
    return cache, slots, CallResults(report=jax.vmap(pack_report)(out), residuals=residuals)


def _sample(
    params: Any, cache: None, slots: SlotState, inputs: CallInputs, one: Executable, model: Any
) -> Any:
    slots, out = step.sample_hidden(
        params, slots, inputs.hidden, inputs.sampling, model, one.sampler
    )
    return cache, slots, CallResults(report=pack_report(out))


def _score(
    params: Any, cache: None, slots: None, inputs: CallInputs, one: Executable, model: Any
) -> Any:
    count, num_tokens = one.sampler.num_logprobs or 0, one.sampler.num_tokens
    scores = step.score_hidden(params, inputs.hidden, inputs.targets, model, count, num_tokens)
    return cache, slots, CallResults(scores=scores)


# On CPU the model's with the options of a group of layers: as fast, and rounding alike.
_MODEL = REORDERED | IN_GRAPH
_PROGRAMS = {
    "prefill": packed(_prefill, "prefill", _MODEL),
    "decode": packed(decode_rows, "decode", _MODEL),
    "decode_steps": packed(_decode_steps, "decode_steps", REORDERED),
    "sample": packed(_sample, "sample", IN_GRAPH),
    "score": packed(_score, "score"),
}
