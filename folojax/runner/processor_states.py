"""What logits processors know of the running requests, and of those that were preempted."""

from typing import Any

import jax
import numpy as np

from folojax.runner.batch import Batch, Row, ints
from folojax.sampling.logits_processors import (
    NO_TOKEN,
    LogitsProcessor,
    ProcessorSlots,
    init_processors,
    read_processors,
    write_processors,
)
from folojax.sched.step_plan import StepPlan


class ProcessorStates:
    """States of all slots on the device; a preempted request's is put aside until it is back.

    Attributes:
        slots: None until a request first needs it. The sampler consumes it and puts a new one.
    """

    def __init__(self, processors: tuple[LogitsProcessor, ...], num_slots: int) -> None:
        self._processors = processors
        self._num_slots = num_slots
        self._aside: dict[str, ProcessorSlots] = {}
        self.slots: ProcessorSlots | None = None

    def before(self, plan: StepPlan, batch: Batch) -> None:
        """Puts aside what leaves the batch and will come back."""
        for request_id in plan.preempted_request_ids:
            row = batch.rows.get(request_id)
            if row is not None:
                self._put_aside(row)
        for request_id in plan.finished_request_ids:
            self._aside.pop(request_id, None)

    def join(self, row: Row) -> None:
        """Writes the state of a request that joins: what was put aside, or a new one."""
        if not row.request.sampling_params.logits_processors:
            return
        if self.slots is None:
            slots = init_processors(self._processors, self._num_slots)
            # Committed, as what the sampler returns: others are another input to jit.
            self.slots = jax.device_put(slots, jax.devices()[0])
        num_outputs = len(row.token_ids) - row.request.num_prompt_tokens
        aside = self._aside.pop(row.request_id, None)
        if aside is None or not num_outputs:  # one that begins again has nothing behind it
            aside = self._new()
        last: Any = np.int32(row.token_ids[-1] if num_outputs else NO_TOKEN)
        count: Any = np.int32(num_outputs)
        state = aside._replace(last_token=last, num_outputs=count)
        self.slots = write_processors(self.slots, ints((), row.slot), state)

    def release(self, batch: Batch) -> None:
        """Gives the slots' memory back; all rows leave the batch, and may come back."""
        for row in batch.rows.values():
            self._put_aside(row)
        self.slots = None

    def clear(self) -> None:
        """Forgets everything."""
        self._aside.clear()
        self.slots = None

    def _put_aside(self, row: Row) -> None:
        if row.request.sampling_params.logits_processors and self.slots is not None:
            self._aside[row.request_id] = read_processors(self.slots, ints((), row.slot))

    def _new(self) -> ProcessorSlots:
        values = {one.name: one.init() for one in self._processors}
        nothing: Any = np.int32(0)
        return ProcessorSlots(values, nothing, nothing)
