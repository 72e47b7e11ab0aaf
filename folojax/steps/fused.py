"""Calls that are one program each: the way of a GPU, and of the sampler everywhere.

One program is one CUDA graph and one call of the host, which has less than a millisecond for it:
its small inputs come as one array, its report leaves as one (`folojax.steps.packing`), and what a
call needs is looked up by its `Executable` and not made.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from folojax.compile.programs import IN_GRAPH, Program, Programs, Run, run
from folojax.kv import KVCache
from folojax.models.core.decoder import Llama
from folojax.models.machine.row_sums import REORDERED
from folojax.sampling.rows import SampleInputs, SlotState
from folojax.sampling.sampler import SamplingClass, report_shapes
from folojax.steps import step
from folojax.steps.executables import WITH_CACHE, Executable, StepKind
from folojax.steps.layers import head_params
from folojax.steps.mail import receive, send
from folojax.steps.packing import PackedReport, Packing, pack_report, report_packing
from folojax.steps.placements import last_and_all
from folojax.steps.state import CallInputs, CallResults, DecodeInputs, EngineState

_sample_hidden = inspect.unwrap(step.sample_tokens)


class _Ready(NamedTuple):
    """What is known of the calls of one executable."""

    program: Program
    packing: Packing  # of their inputs
    report: Packing | None  # of what they report; None where they sample nothing
    key: object  # of the compiled program, this engine's alone: others have other shapes


class WholeSteps:
    """A call is a program, a decode step with its sampling in it; see `folojax.steps.calls`."""

    kind: StepKind = "whole"

    def __init__(self, model: Llama, programs: Mapping[str, Programs] | None = None) -> None:
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
        cache = state.cache if one.kind in WITH_CACHE else None
        given = head_params(params) if cache is None else params
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
        model: Llama,
    ) -> Any:
        return function(params, cache, slots, packing.unpack(packed, rest), one, model)

    compute.__name__ = name  # of the compiled program, too
    return Programs(compute, donate=(1, 2), lies_as=(1, None, None), compiler_options=options)


def run_model(
    params: Any,
    cache: KVCache,
    slots: SlotState | None,
    inputs: CallInputs,
    one: Executable,
    model: Llama,
    sample_hidden: Callable[..., Any] = _sample_hidden,
) -> Any:
    """The model on chunks, or on a token of every row and with a `spec` the next one's draw."""
    tokens = None if slots is None else slots.tokens
    options = one.extras, inputs.is_edited, one.most_tokens, inputs.adapters, inputs.routing
    cache, hidden, placement, residuals = step.forward(
        params, cache, tokens, inputs.rows, model, *options, may_repeat=one.kind == "rows"
    )
    if slots is None:
        last, every = last_and_all(hidden, inputs.rows, placement)
        return cache, slots, CallResults(last, every, residuals=residuals)
    if one.spec is None:
        return cache, slots, CallResults(hidden, residuals=residuals)
    sampling = receive(inputs.sampling, inputs.mail, hidden, model.config.vocab_size)
    slots, out = sample_hidden(params, slots, hidden, sampling, model=model, spec=one.spec)
    out = send(out, inputs.mail)
    return cache, slots, CallResults(report=pack_report(out), residuals=residuals)


def _decode_steps(
    params: Any,
    cache: KVCache,
    slots: SlotState,
    inputs: CallInputs,
    one: Executable,
    model: Llama,
) -> Any:
    """Each of K steps computes what the one before has sampled.

    The inputs are those of the first, but for its bans: they are of each, [K, Z, _]. A row that
    takes no more steps is padding in the rest. The report has an axis of steps in front; residuals
    are of K tokens a row, one row after the other, [B * K, E].
    """
    num_slots, rows, sampling = slots.tokens.shape[0], inputs.rows, inputs.sampling

    def one_step(carry: Any, xs: tuple[Array, Array | None]) -> Any:
        (cache, slots), (number, bans) = carry, xs
        is_active = number < inputs.num_steps

        def mine(slot: Array) -> Array:
            return jnp.where(is_active, slot, num_slots)

        now = DecodeInputs(
            slot=mine(rows.slot),
            token=jnp.where(number == 0, rows.token, -1),
            position=rows.position + number,
            page_table=jnp.where(is_active[:, None], rows.page_table, cache.num_pages),
        )
        edits, processors = sampling.edits, sampling.processors
        if edits is not None:
            edits = edits._replace(slot=mine(edits.slot), bans=bans)
        if processors is not None:
            processors = processors._replace(slot=mine(processors.slot))
        drawn = SampleInputs(
            mine(sampling.slot), sampling.position + number, sampling.rows, edits, processors
        )
        taken = inputs._replace(rows=now, sampling=drawn)
        cache, slots, results = run_model(params, cache, slots, taken, one, model)
        return (cache, slots), (results.report, results.residuals)

    bans = None if sampling.edits is None else sampling.edits.bans
    (cache, slots), (report, residuals) = lax.scan(
        one_step, (cache, slots), (jnp.arange(one.tokens), bans)
    )
    by_row = {
        layer: jnp.swapaxes(stream, 0, 1).reshape(-1, stream.shape[-1])
        for layer, stream in residuals.items()
    }
    return cache, slots, CallResults(report=report, residuals=by_row)


def run_sampler(
    params: Any,
    cache: None,
    slots: SlotState,
    inputs: CallInputs,
    one: Executable,
    model: Any,
    sample_hidden: Callable[..., Any] = _sample_hidden,
) -> Any:
    """A token of each row from its hidden state, by `step.sample_tokens` or in its place."""
    sampling = receive(inputs.sampling, inputs.mail, inputs.hidden, model.config.vocab_size)
    slots, out = sample_hidden(
        params, slots, inputs.hidden, sampling, model=model, spec=one.sampler
    )
    return cache, slots, CallResults(report=pack_report(send(out, inputs.mail)))


def _score(
    params: Any, cache: None, slots: None, inputs: CallInputs, one: Executable, model: Any
) -> Any:
    count, num_tokens = one.sampler.num_logprobs or 0, one.sampler.num_tokens
    score = inspect.unwrap(step.score_tokens)
    options = {"model": model, "num_logprobs": count, "num_tokens": num_tokens}
    return cache, slots, CallResults(scores=score(params, inputs.hidden, inputs.targets, **options))


# On CPU the model's with the options of a group of layers: as fast, and rounding alike.
MODEL_OPTIONS = REORDERED | IN_GRAPH
SAMPLER_OPTIONS = IN_GRAPH
_PROGRAMS = {
    "prefill": packed(run_model, "prefill", MODEL_OPTIONS),
    "decode": packed(run_model, "decode", MODEL_OPTIONS),
    "decode_steps": packed(_decode_steps, "decode_steps", REORDERED),
    "sample": packed(run_sampler, "sample", SAMPLER_OPTIONS),
    "score": packed(_score, "score"),
}
