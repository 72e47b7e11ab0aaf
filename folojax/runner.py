"""Plan to padded arrays, jitted call, host tokens.

The runner remembers the rows of the batch; the scheduler's plan tells it only what changed.

    plan ──> rows joining, leaving ──> chunks ──> prefill ──┐
                                  └──> single tokens ─> decode ──> tokens by request id

One decode call serves all rows that need a single token, one prefill call the chunks of all
prompts (more only if they overflow the largest bucket). Both are dispatched before either result
is read.
"""

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from folojax import kv_cache, step
from folojax.buckets import Buckets, DecodeShape, PrefillShape
from folojax.row_params import RowParams, RowTable
from folojax.sampling import SamplingClass
from folojax.sched.plan import SchedulerOutput
from folojax.state import DecodeInputs, EngineState, PrefillInputs, StepOutput, init_state, is_alive

_SLOT_MULTIPLE = 32


class SampledToken(NamedTuple):
    """What a step gave one request."""

    token: int
    logprob: float


@dataclasses.dataclass
class RunnerStats:
    """Counts since the runner was made; padding is in computed minus scheduled tokens."""

    num_prefill_calls: int = 0
    num_decode_calls: int = 0
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0


@dataclasses.dataclass
class _Row:
    """A request of the batch; of its tokens, those that were known when it joined."""

    request_id: str
    slot: int
    token_ids: np.ndarray
    page_ids: np.ndarray
    num_computed_tokens: int


class _Chunk(NamedTuple):
    """At most C tokens of a row; the last chunk of what is known samples."""

    row: _Row
    start: int
    end: int
    has_sample: bool


class Runner:
    """Runs plans on the device; owns the state and the parameters."""

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        layout: kv_cache.KVLayout,
        buckets: Buckets,
        max_num_seqs: int,
    ) -> None:
        self.model = model
        self.params = params
        self.buckets = buckets
        self.stats = RunnerStats()
        self._layout = layout
        # Rounded up, so that engines with other limits share their executables.
        num_slots = -(-max_num_seqs // _SLOT_MULTIPLE) * _SLOT_MULTIPLE
        self._table = RowTable(num_slots, model.config.vocab_size)
        self._rows: dict[str, _Row] = {}
        self._free_slots = list(range(num_slots))
        self.state: EngineState = init_state(layout, num_slots)

    def run(self, plan: SchedulerOutput) -> dict[str, SampledToken | None]:
        """Computes a plan; returns the sampled token of each request that has one in this step.

        None in place of a token: the model gave no usable distribution (NaN, or all -inf).
        """
        self._update_rows(plan)
        sampled = set(plan.sampled_request_ids)
        chunks: list[_Chunk] = []
        singles: list[_Row] = []
        for request_id, num_tokens in plan.num_scheduled_tokens.items():
            row = self._rows[request_id]
            start, end = row.num_computed_tokens, row.num_computed_tokens + num_tokens
            if start >= len(row.token_ids):
                assert num_tokens == 1, f"{request_id} has {num_tokens} tokens, sampled ones"
                singles.append(row)
                continue
            columns = self.buckets.prefill_columns
            for first in range(start, end, columns):
                last = min(first + columns, end)
                chunks.append(_Chunk(row, first, last, last == end and request_id in sampled))
        pending: list[tuple[list[str | None], StepOutput]] = []
        most = self.buckets.prefill_rows[-1]
        for first in range(0, len(chunks), most):
            pending.append(self._prefill(chunks[first : first + most]))
        if singles:
            pending.append(self._decode(singles))
        self.stats.num_scheduled_tokens += plan.total_num_scheduled_tokens
        return _read(pending)

    def reset(self) -> None:
        """Forgets every row; replaces the state if an interrupted step has consumed it."""
        for request_id in list(self._rows):
            self._leave(request_id)
        if not is_alive(self.state):
            self.state = init_state(self._layout, self._table.num_slots)

    def check_is_empty(self) -> None:
        """Asserts that no request is remembered and every slot is free."""
        assert not self._rows, f"rows are left: {sorted(self._rows)}"
        assert sorted(self._free_slots) == list(range(self._table.num_slots)), "slots are missing"

    def warm_up(self, sampling: Sequence[SamplingClass]) -> int:
        """Compiles every planned shape by running it on padding; returns how many there are."""
        shapes = list(self.buckets.shapes())
        for shape in shapes:
            for needed in sampling:
                if isinstance(shape, PrefillShape):
                    self._call_prefill(self._prefill_inputs(shape, []), needed)
                else:
                    self._call_decode(self._decode_inputs(shape, []), shape.segments, needed)
        return len(shapes) * len(sampling)

    def _update_rows(self, plan: SchedulerOutput) -> None:
        for request_id in (*plan.finished_request_ids, *plan.preempted_request_ids):
            if request_id in self._rows:
                self._leave(request_id)
        for new in plan.new_requests:
            assert isinstance(new.params, RowParams), f"{new.request_id} has no row parameters"
            slot = heapq.heappop(self._free_slots)
            self._table.put(slot, new.params)
            self._rows[new.request_id] = _Row(
                request_id=new.request_id,
                slot=slot,
                token_ids=np.array(new.prompt_token_ids + new.output_token_ids, np.int32),
                page_ids=np.array(new.page_ids, np.int32),
                num_computed_tokens=new.num_computed_tokens,
            )
        cached = plan.cached_requests
        for request_id, num_computed, new_pages in zip(
            cached.request_ids, cached.num_computed_tokens, cached.new_page_ids, strict=True
        ):
            row = self._rows[request_id]
            row.num_computed_tokens = num_computed
            if new_pages:
                row.page_ids = np.append(row.page_ids, np.array(new_pages, np.int32))

    def _leave(self, request_id: str) -> None:
        heapq.heappush(self._free_slots, self._rows.pop(request_id).slot)

    def _prefill(self, chunks: list[_Chunk]) -> tuple[list[str | None], StepOutput]:
        page_size = self._layout.page_size
        most_pages = max(-(-chunk.end // page_size) for chunk in chunks)
        shape = self.buckets.prefill_shape(len(chunks), most_pages)
        inputs = self._prefill_inputs(shape, chunks)
        out = self._call_prefill(inputs, self._table.sampling_class(inputs.slot, inputs.sampling))
        self.stats.num_prefill_calls += 1
        self.stats.num_computed_tokens += inputs.tokens.size
        return [chunk.row.request_id if chunk.has_sample else None for chunk in chunks], out

    def _prefill_inputs(self, shape: PrefillShape, chunks: list[_Chunk]) -> PrefillInputs:
        tokens = _ints((shape.rows, shape.columns))
        start = _ints(shape.rows)
        length = _ints(shape.rows)
        page_table = _ints((shape.rows, shape.table_pages), self._layout.num_pages)
        slot = _ints(shape.rows, self._table.num_slots)
        for i, chunk in enumerate(chunks):
            length[i] = chunk.end - chunk.start
            tokens[i, : length[i]] = chunk.row.token_ids[chunk.start : chunk.end]
            start[i] = chunk.start
            pages = chunk.row.page_ids[: shape.table_pages]
            page_table[i, : len(pages)] = pages
            if chunk.has_sample:
                slot[i] = chunk.row.slot
        rows = self._table.rows(slot, start + length)
        return PrefillInputs(tokens, start, length, page_table, slot, rows)

    def _call_prefill(self, inputs: PrefillInputs, sampling: SamplingClass) -> StepOutput:
        self.state, out = step.prefill(
            self.params, self.state, inputs, model=self.model, sampling=sampling
        )
        return out

    def _decode(self, rows: list[_Row]) -> tuple[list[str | None], StepOutput]:
        extent = 1 + max(int(row.page_ids.max()) for row in rows)
        most_pages = max(len(row.page_ids) for row in rows)
        shape = self.buckets.decode_shape(len(rows), extent, most_pages)
        inputs = self._decode_inputs(shape, rows)
        sampling = self._table.sampling_class(inputs.slot, inputs.sampling)
        out = self._call_decode(inputs, shape.segments, sampling)
        self.stats.num_decode_calls += 1
        self.stats.num_computed_tokens += shape.rows
        return [row.request_id for row in rows], out

    def _decode_inputs(self, shape: DecodeShape, rows: list[_Row]) -> DecodeInputs:
        slot = _ints(shape.rows, self._table.num_slots)
        position = _ints(shape.rows)
        page_table = _ints((shape.rows, shape.table_pages), self._layout.num_pages)
        for i, row in enumerate(rows):
            slot[i], position[i] = row.slot, row.num_computed_tokens
            page_table[i, : len(row.page_ids)] = row.page_ids
        return DecodeInputs(slot, position, page_table, self._table.rows(slot, position + 1))

    def _call_decode(
        self, inputs: DecodeInputs, num_segments: int, sampling: SamplingClass
    ) -> StepOutput:
        head, tail = kv_cache.take_segments(self.state.cache, num_segments)
        state, out = step.decode(
            self.params,
            self.state._replace(cache=head),
            inputs,
            model=self.model,
            sampling=sampling,
        )
        self.state = state._replace(cache=kv_cache.join_segments(state.cache, tail))
        return out


def _read(
    pending: list[tuple[list[str | None], StepOutput]],
) -> dict[str, SampledToken | None]:
    """Waits for the device and sorts its rows by request."""
    results: dict[str, SampledToken | None] = {}
    for request_ids, out in pending:
        tokens, logprobs, is_valid = (np.asarray(field).tolist() for field in out)
        for i, request_id in enumerate(request_ids):
            if request_id is not None:
                sample = SampledToken(tokens[i], logprobs[i])
                results[request_id] = sample if is_valid[i] else None
    return results


def _ints(shape: int | tuple[int, ...], value: int = 0) -> Any:
    """An array for the device. Any: a jitted function takes NumPy arrays for JAX ones."""
    return np.full(shape, value, np.int32)
