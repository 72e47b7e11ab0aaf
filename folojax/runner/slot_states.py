"""What the sampler keeps of each slot: edits of logits, and what logits processors know.

Both are allocated when a request first needs them, and a request's part is written when it joins.
What processors know of a request that is preempted is put aside until it is back.
"""

from collections.abc import Iterable

from folojax.requests.user_functions import UserFunctions
from folojax.runner.batch import Batch, Row, ints
from folojax.runner.row_params import empty_slot_edits, slot_edits
from folojax.runner.setup import Setup
from folojax.sampling.logit_edits import SlotEdits, init_edits, write_slot
from folojax.sampling.logits_processors import (
    NO_TOKEN,
    ProcessorSlots,
    init_processors,
    read_processors,
    write_processors,
)
from folojax.sampling.rows import SlotState
from folojax.sched.step_plan import StepPlan


class SlotStates:
    """Writes to slots; each function that takes them and returns new ones DONATES them."""

    def __init__(self, setup: Setup, functions: UserFunctions) -> None:
        self._num_slots, self._vocab_size = setup.num_slots, setup.model.config.vocab_size
        # Committed, as what the sampler returns: others are another input to jit.
        self._make = setup.backend.devices.make
        self._processors = functions.processors
        self._aside: dict[str, ProcessorSlots] = {}

    def with_edits(self, slots: SlotState) -> SlotState:
        """The slots with room for edits of logits."""
        if slots.edits is None:
            edits = self._make(lambda: init_edits(self._num_slots, self._vocab_size))
            slots = slots._replace(edits=edits)
        return slots

    def join(self, row: Row, slots: SlotState) -> SlotState:
        """Writes what a request needs that joins the batch."""
        if row.request.has_slot_edits:
            new = slot_edits(row.request, row.token_ids, self._vocab_size)
            slots = self._write(slots, row.slot, new)
        if row.request.sampling_params.logits_processors:
            slots = slots._replace(processors=self._join_processors(row, slots.processors))
        return slots

    def compile_edits(self, slots: SlotState) -> SlotState:
        """Compiles what writes edits of logits, by writing to no slot."""
        for new in empty_slot_edits(self._vocab_size):
            slots = self._write(slots, self._num_slots, new)
        return slots

    def leave(self, plan: StepPlan, batch: Batch, slots: SlotState) -> None:
        """Puts aside what leaves the batch and will come back."""
        preempted = (batch.rows.get(request_id) for request_id in plan.preempted_request_ids)
        self.put_aside((row for row in preempted if row is not None), slots)
        for request_id in plan.finished_request_ids:
            self._aside.pop(request_id, None)

    def put_aside(self, rows: Iterable[Row], slots: SlotState) -> None:
        """Copies what processors know of requests."""
        for row in rows:
            if row.request.sampling_params.logits_processors and slots.processors is not None:
                state = read_processors(slots.processors, ints((), row.slot))
                self._aside[row.request_id] = state

    def clear(self) -> None:
        """Forgets what was put aside."""
        self._aside.clear()

    def _write(self, slots: SlotState, slot: int, new: SlotEdits) -> SlotState:
        slots = self.with_edits(slots)
        assert slots.edits is not None
        return slots._replace(edits=write_slot(slots.edits, ints((), slot), new))

    def _join_processors(self, row: Row, slots: ProcessorSlots | None) -> ProcessorSlots:
        if slots is None:
            slots = self._make(lambda: init_processors(self._processors, self._num_slots))
        num_outputs = len(row.token_ids) - row.request.num_prompt_tokens
        aside = self._aside.pop(row.request_id, None)
        # One that begins again has nothing behind it.
        values = aside.values if aside is not None and num_outputs else None
        if values is None:
            params = row.request.sampling_params
            args = dict.fromkeys(params.logits_processors or (), params.extra_args or {})
            values = {one.name: one.start(args.get(one.name, {})) for one in self._processors}
        last = row.token_ids[-1] if num_outputs else NO_TOKEN
        state = ProcessorSlots(values, ints((), last), ints((), num_outputs))
        return write_processors(slots, ints((), row.slot), state)
