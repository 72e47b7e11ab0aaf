"""The runner's calls that sample: what they are given of each slot, and what they leave there."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from folojax.compile.programs import IN_GRAPH, Call, Program, Programs
from folojax.compile.shapes import Shapes
from folojax.kv import KVCache
from folojax.models.machine.row_sums import REORDERED
from folojax.runner.batch import Batch, Row, ints
from folojax.runner.executables import Gate, sample_executable
from folojax.runner.processor_states import ProcessorStates
from folojax.runner.row_params import empty_slot_edits, exceptional_bans, slot_edits
from folojax.sampling.logit_edits import EditState, SlotEdits, init_edits, write_slot
from folojax.sampling.rows import SampleInputs, SlotState
from folojax.sampling.sampler import SamplingClass, SamplingSpec, report_shapes
from folojax.steps import step
from folojax.steps.packing import PackedReport, Packing, pack_report, report_packing
from folojax.steps.state import DecodeInputs, EngineState


def _sample_packed(
    head_params: Any,
    slots: SlotState,
    hidden: Any,
    packed: Any,
    rest: list[Any],
    *,
    model: nn.Module,
    spec: SamplingSpec,
    packing: Packing,
) -> tuple[SlotState, Any]:
    """`step.sample_tokens` with inputs and report as one array each. DONATES `slots`."""
    inputs = packing.unpack(packed, rest)
    slots, out = step.sample_hidden(head_params, slots, hidden, inputs, model, spec)
    return slots, pack_report(out)


_SAMPLE = Programs(_sample_packed, donate=(1,), compiler_options=IN_GRAPH)
_SCORE = Programs(step.score_tokens)
_STEPS = Programs(step.decode_steps, donate=(1, 2), compiler_options=REORDERED)


class SamplerCalls:
    """The part of a runner that samples; `Runner` makes its attributes."""

    model: nn.Module
    batch: Batch
    state: EngineState
    gate: Gate
    shapes: Shapes
    max_logprobs: int
    _params: Any
    _head_params: Any
    _num_tokens: int | None
    _is_processed: bool
    _max_decode_steps: int
    _processors: ProcessorStates
    _sample_programs: dict[Any, Program]

    def _spec(self, slot: Any, positions: Any) -> SamplingSpec:
        """What slots need that draw tokens at some positions, [K, B]."""
        params = self.batch.params
        needed = max(params.sampling_class(slot, position) for position in positions)
        return SamplingSpec(
            self.shapes.sampling_class(SamplingClass(needed)),
            self.shapes.num_alternatives(params.most_logprobs(slot), self.max_logprobs),
            has_record=params.has_record(slot),
            processors=params.processors(slot),
        )

    def _list_logprobs(self, has_logprobs: bool) -> list[int]:
        """The numbers of alternatives that steps report, where log-probabilities are wanted."""
        if not has_logprobs:
            return []
        most = self.max_logprobs
        found = (self.shapes.num_alternatives(wanted, most) for wanted in (0, min(1, most), most))
        return sorted({size for size in found if size is not None})

    def _call_sample(self, hidden: Any, slot: Any, position: Any, spec: SamplingSpec) -> Any:
        slots, kept, inputs, full = self.sampling(slot, position, spec)
        bans = 0 if inputs.edits is None else exceptional_bans(inputs.edits.bans)
        self.gate.check(sample_executable(len(slot), spec, bans))
        slots, out = self._sample_hidden(hidden, slots, inputs, full)
        self._keep(slots, kept)
        return out

    def _sample_hidden(
        self, hidden: Any, slots: SlotState, inputs: SampleInputs, spec: SamplingSpec
    ) -> tuple[SlotState, Any]:
        slots, packed = self._sample_call(hidden, slots, inputs, spec).run()
        packed.copy_to_host_async()
        return slots, PackedReport(packed, report_packing(report_shapes(spec, len(packed))))

    def _sample_call(
        self, hidden: Any, slots: SlotState, inputs: SampleInputs, spec: SamplingSpec
    ) -> Call:
        packing = Packing.of(inputs, len(inputs.slot))
        program = self._sample_programs.get((spec, packing))
        if program is None:  # to hash a module takes as long as to call a program
            program = _SAMPLE.of(model=self.model, spec=spec, packing=packing)
            self._sample_programs[spec, packing] = program
        return Call(program, (self._head_params, slots, hidden, *packing.pack(inputs)))

    def sample_call(self, hidden: Any, rows: int, spec: SamplingSpec) -> Call:
        """The call that samples so many rows, of padding; `hidden` may be a shape."""
        slots, _, inputs, full = self.sampling(ints(rows, self.batch.num_slots), ints(rows), spec)
        return self._sample_call(hidden, slots, inputs, full)

    def score_call(self, hidden: Any, targets: Any, num_logprobs: int) -> Call:
        """The call that scores given tokens; `hidden` may be a shape."""
        options = {"num_logprobs": num_logprobs, "num_tokens": self._num_tokens}
        program = _SCORE.of(model=self.model, **options)
        return Call(program, (self._head_params, hidden, targets))

    def _keep(self, slots: SlotState, edits: EditState | None) -> None:
        """Takes back what a call that samples returned, and the edits that it did not touch."""
        if slots.processors is not None:
            self._processors.slots = slots.processors
        slots = slots._replace(edits=slots.edits or edits, processors=None)
        self.state = self.state._replace(slots=slots)

    def sampling(
        self, slot: Any, position: Any, spec: SamplingSpec
    ) -> tuple[SlotState, EditState | None, SampleInputs, SamplingSpec]:
        """The arguments of a call that samples, and the edits that it is not to touch."""
        spec = dataclasses.replace(
            spec, num_tokens=self._num_tokens, is_processed=self._is_processed
        )
        inputs = SampleInputs(slot, position, self.batch.params.rows(slot))
        slots = self.state.slots
        if spec.processors:
            rows = self.batch.params.processor_rows(slot, spec.processors)
            slots = slots._replace(processors=self._processors.slots)
            inputs = inputs._replace(processors=rows)
        if spec.needed >= SamplingClass.EDITED:
            edits = self.batch.params.edit_rows(slot, position)
            return slots._replace(edits=self._edits()), None, inputs._replace(edits=edits), spec
        # Not an argument of the others, which would be compiled once with and once without it.
        return slots._replace(edits=None), slots.edits, inputs, spec

    def decode_steps_call(
        self, cache: KVCache, inputs: DecodeInputs, num_steps: Any, spec: SamplingSpec
    ) -> tuple[Call, dict[str, Any], EditState | None]:
        """Several decode steps, their static arguments, and the edits that they do not touch."""
        count = self._max_decode_steps
        slots, kept, sampling, spec = self.sampling(inputs.slot, inputs.position + 1, spec)
        bans = None
        if sampling.edits is not None:
            positions = sampling.position + np.minimum(
                np.arange(count)[:, None], np.maximum(num_steps - 1, 0)
            )
            bans = self.batch.params.bans(inputs.slot, positions)
        edits, is_on = self.batch.params.activation_edits(inputs.slot)
        options = {
            "model": self.model,
            "spec": spec,
            "most_steps": count,
            "activation_edits": edits,
            "taps": self.batch.params.taps(inputs.slot),
        }
        args = self._params, cache, slots, inputs, num_steps, sampling, bans, is_on
        return Call(_STEPS.of(**options), args), options, kept

    def _edits(self) -> EditState:
        """What is kept for edits of logits; allocated when a request first needs it."""
        edits = self.state.slots.edits
        if edits is None:
            edits = place(init_edits(self.batch.num_slots, self.model.config.vocab_size))
        return edits

    def write_edits(self, row: Row) -> None:
        """Keeps what edits of logits need of a request that joins, in its slot."""
        new = slot_edits(row.request, row.token_ids, self.model.config.vocab_size)
        self._write_slot(row.slot, new)

    def compile_edits(self) -> None:
        """Compiles what `write_edits` may need, by writing to no slot."""
        for new in empty_slot_edits(self.model.config.vocab_size):
            self._write_slot(self.batch.num_slots, new)

    def _write_slot(self, slot: int, new: SlotEdits) -> None:
        edits = write_slot(self._edits(), ints((), slot), new)
        self.state = self.state._replace(slots=self.state.slots._replace(edits=edits))


def place(arrays: Any) -> Any:
    """Commits arrays to the device; one that is there already is shared, not copied.

    To jit, committed arrays and others are different inputs: were some of either kind, parameters
    that come from elsewhere would need executables of their own.
    """
    return jax.device_put(arrays, jax.devices()[0])
