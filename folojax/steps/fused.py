"""A step as one program, on request with its sampling: the way of a GPU.

One program is one CUDA graph and one call of the host, which has less than a millisecond for it:
its small inputs come as one array, its report leaves as one (`folojax.steps.packing`), and what a
call needs is looked up and not made.
"""

import inspect
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from folojax.compile.programs import IN_GRAPH, Call, Program, Programs
from folojax.kv.cache import KVCache
from folojax.models.machine.row_sums import REORDERED
from folojax.sampling.rows import SampleInputs, SlotState
from folojax.sampling.sampler import SamplingSpec, report_shapes
from folojax.steps import step
from folojax.steps.packing import PackedReport, Packing, pack_report, report_packing
from folojax.steps.residual_stream import ActivationEdit, Streams, read_layers
from folojax.steps.state import DecodeInputs, PrefillInputs


class _Ready(NamedTuple):
    """What is known of the calls of one kind and shape.

    Attributes:
        packing: Of their inputs.
        program: That they run.
        report: Packing of what they report; None where they report nothing.
    """

    packing: Packing
    program: Program
    report: Packing | None = None


class WholeSteps:
    """A step is one program; on request one that samples, too."""

    def __init__(self, model: nn.Module, most_tokens: int | None = None) -> None:
        """Compiles nothing.

        Args:
            model: Of `folojax.models`.
            most_tokens: Of prompts in a step: a call with rows for more computes no more than
                these. None: all that its rows have room for.
        """
        self._model, self._most_tokens = model, most_tokens
        # By what tells calls apart, cheaply: on a GPU the host has less than a millisecond a step.
        self._kinds: dict[Hashable, _Ready] = {}
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}

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
        return self._run(*self._prefill_call(params, cache, inputs, edits, is_edited, taps))

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
        return self._run(*self._decode_call(params, cache, tokens, inputs, edits, is_edited, taps))

    def decode_and_sample(
        self,
        params: Any,
        cache: KVCache,
        slots: SlotState,
        inputs: tuple[DecodeInputs, SampleInputs],
        spec: SamplingSpec,
        edits: tuple[ActivationEdit, ...] = (),
        is_edited: Any = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[KVCache, SlotState, PackedReport, Streams]:
        """As `step.decode_and_sample`; the report is on its way to the host."""
        found = self._sampled_call(params, cache, slots, inputs, spec, edits, is_edited, taps)
        cache, slots, packed, streams = self._run(*found)
        report = self._kinds[found[0]].report
        assert report is not None, "this kind of call reports"
        packed.copy_to_host_async()
        return cache, slots, PackedReport(packed, report), streams

    def prefill_calls(self, params: Any, cache: KVCache, inputs: PrefillInputs) -> list[Call]:
        """One program."""
        return [self._prefill_call(params, cache, inputs, (), None, ())[1]]

    def decode_calls(
        self, params: Any, cache: KVCache, tokens: Any, inputs: DecodeInputs
    ) -> list[Call]:
        """One program."""
        return [self._decode_call(params, cache, tokens, inputs, (), None, ())[1]]

    def sampled_calls(
        self,
        params: Any,
        cache: KVCache,
        slots: SlotState,
        inputs: tuple[DecodeInputs, SampleInputs],
        spec: SamplingSpec,
    ) -> list[Call]:
        """One program: that of `decode_and_sample`."""
        return [self._sampled_call(params, cache, slots, inputs, spec, (), None, ())[1]]

    def _prefill_call(
        self, params: Any, cache: KVCache, inputs: Any, edits: Any, is_edited: Any, taps: Any
    ) -> tuple[Hashable, Call]:
        key = "prefill", inputs.tokens.shape, edits, taps
        # What is read of the stream is picked by its row.
        static = {"edits": edits, "taps": taps, "num_tokens": None if taps else self._most_tokens}
        ready = self._kind(key, _PREFILL, inputs, len(inputs.start), static)
        args = params, cache, *ready.packing.pack(inputs), is_edited
        return key, Call(ready.program, args)

    def _decode_call(
        self,
        params: Any,
        cache: KVCache,
        tokens: Any,
        inputs: Any,
        edits: Any,
        is_edited: Any,
        taps: Any,
    ) -> tuple[Hashable, Call]:
        rows = len(inputs.slot)
        key = "decode", rows, edits, taps
        ready = self._kind(key, _DECODE, inputs, rows, {"edits": edits, "taps": taps})
        args = params, cache, tokens, *ready.packing.pack(inputs), is_edited
        return key, Call(ready.program, args)

    def _sampled_call(
        self,
        params: Any,
        cache: KVCache,
        slots: SlotState,
        inputs: tuple[DecodeInputs, SampleInputs],
        spec: SamplingSpec,
        edits: Any,
        is_edited: Any,
        taps: Any,
    ) -> tuple[Hashable, Call]:
        rows, sampling = len(inputs[0].slot), inputs[1]
        num_bans = 0 if sampling.edits is None else len(sampling.edits.bans)
        key = "sampled", rows, spec, num_bans, edits, taps
        static = {"spec": spec, "edits": edits, "taps": taps}
        ready = self._kind(key, _DECODE_AND_SAMPLE, inputs, rows, static)
        args = params, cache, slots, *ready.packing.pack(inputs), is_edited
        return key, Call(ready.program, args)

    def _kind(
        self,
        key: Hashable,
        programs: Programs,
        inputs: Any,
        rows: int,
        static: dict[str, Any],
    ) -> _Ready:
        ready = self._kinds.get(key)
        if ready is None:
            packing, report = Packing.of(inputs, rows), None
            program = programs.of(model=self._model, packing=packing, **static)
            if "spec" in static:
                report = report_packing(report_shapes(static["spec"], rows))
            ready = self._kinds[key] = _Ready(packing, program, report)
        return ready

    def _run(self, key: Hashable, call: Call) -> Any:
        """Calls what the key stands for, compiled at the first time."""
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = call.compile()
        return compiled(*call.args)


def _prefill_packed(
    params: Any,
    cache: KVCache,
    packed: Any,
    rest: list[Any],
    is_edited: Any,
    *,
    model: nn.Module,
    packing: Packing,
    edits: tuple[ActivationEdit, ...],
    taps: tuple[int, ...],
    num_tokens: int | None,
) -> tuple[KVCache, Any, Any, Streams]:
    """`step.prefill` with its inputs as one array, and taps. DONATES `cache`."""
    inputs = packing.unpack(packed, rest)
    options = {"model": model, "edits": edits, "num_tokens": num_tokens}
    with read_layers(taps) as found:
        prefill = inspect.unwrap(step.prefill)
        cache, last, hidden = prefill(params, cache, inputs, is_edited, **options)
    return cache, last, hidden, found


def _decode_packed(
    params: Any,
    cache: KVCache,
    tokens: Any,
    packed: Any,
    rest: list[Any],
    is_edited: Any,
    *,
    model: nn.Module,
    packing: Packing,
    edits: tuple[ActivationEdit, ...],
    taps: tuple[int, ...],
) -> tuple[KVCache, Any, Streams]:
    """`step.decode` with its inputs as one array, and taps. DONATES `cache`."""
    inputs = packing.unpack(packed, rest)
    with read_layers(taps) as found:
        decode = inspect.unwrap(step.decode)
        cache, hidden = decode(params, cache, tokens, inputs, is_edited, model=model, edits=edits)
    return cache, hidden, found


def _decode_and_sample_packed(
    params: Any,
    cache: KVCache,
    slots: SlotState,
    packed: Any,
    rest: list[Any],
    is_edited: Any,
    *,
    model: nn.Module,
    packing: Packing,
    spec: SamplingSpec,
    edits: tuple[ActivationEdit, ...],
    taps: tuple[int, ...],
) -> tuple[KVCache, SlotState, Any, Streams]:
    """`step.decode_and_sample` with inputs and report as one array. DONATES `cache`, `slots`."""
    inputs, sampling = packing.unpack(packed, rest)
    run = inspect.unwrap(step.decode_and_sample)
    options = {"model": model, "spec": spec, "activation_edits": edits, "taps": taps}
    cache, slots, out, found = run(params, cache, slots, inputs, sampling, is_edited, **options)
    return cache, slots, pack_report(out), found


# On CPU with the options of a group of layers: as fast, and rounding alike.
_PREFILL = Programs(_prefill_packed, donate=(1,), compiler_options=REORDERED | IN_GRAPH)
_DECODE = Programs(_decode_packed, donate=(1,), compiler_options=REORDERED | IN_GRAPH)
_DECODE_AND_SAMPLE = Programs(
    _decode_and_sample_packed, donate=(1, 2), compiler_options=REORDERED | IN_GRAPH
)
