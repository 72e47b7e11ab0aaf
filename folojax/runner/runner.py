"""Plan to jitted calls to host tokens.

    plan ──> batch ──> chunks ──> prefill ──> hidden ──> sample_tokens ──┐
                 └──> single tokens ─> decode ──> hidden ──> sample_tokens ─> results by request id
                                          (and score_tokens, for prompts whose scores are wanted)

One decode call serves all rows that need a single token, one prefill call the chunks of all
prompts (more only if they overflow the largest bucket). Several decode steps at once, where a plan
has them, are one call too, with the sampling of each. `dispatch` hands a plan to the device and
does not wait; `collect` waits for what it gave. Further plans may be dispatched in between: the
device has the tokens that they continue.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from folojax.backend import Backend
from folojax.compile.shapes import DecodeShape, Shapes, slots_for, split_calls
from folojax.kv import KVLayout
from folojax.kv.page_copies import PageCopies
from folojax.requests.user_functions import NO_FUNCTIONS, UserFunctions
from folojax.runner.activation_taps import Span, Tapped, tapped_rows
from folojax.runner.batch import Batch, Chunk, Row, ints
from folojax.runner.executables import (
    COPIES,
    EDITS,
    Executable,
    Gate,
    list_executables,
    model_executable,
    sampled_executable,
    steps_executable,
)
from folojax.runner.host_store import HostStore, TokenKV, read_tokens
from folojax.runner.processor_states import ProcessorStates
from folojax.runner.results import Pending, StepResult, is_scored, read, tokens_after
from folojax.runner.row_params import exceptional_bans
from folojax.runner.sampler_calls import SamplerCalls, place
from folojax.sampling.rows import StepOutput, TokenScores
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.sched.step_plan import PageMoves, StepPlan
from folojax.steps import step
from folojax.steps.by_layer import make_steps
from folojax.steps.fused import WholeSteps
from folojax.steps.packing import PackedReport
from folojax.steps.state import DecodeInputs, EngineState, init_state, is_alive


@dataclasses.dataclass
class RunnerStats:
    """Counts since the runner was made; padding is in computed minus scheduled tokens.

    Those of prefill calls are in the scheduled and computed tokens too.
    """

    num_prefill_calls: int = 0
    num_decode_calls: int = 0
    num_loaded_pages: int = 0
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0
    num_prefill_tokens: int = 0
    num_prefill_padding_tokens: int = 0

    def count_prefill(self, num_tokens: int, num_computed_tokens: int) -> None:
        """Counts a call for prompt chunks with so many tokens of requests, and padding beside."""
        self.num_prefill_calls += 1
        self.num_prefill_tokens += num_tokens
        self.num_prefill_padding_tokens += num_computed_tokens - num_tokens
        self.num_computed_tokens += num_computed_tokens


_GREEDY = SamplingSpec(SamplingClass.GREEDY)


class Runner(SamplerCalls):
    """Runs plans on the device; owns the state and the parameters."""

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        layout: KVLayout,
        shapes: Shapes,
        max_num_seqs: int,
        *,
        backend: Backend,
        max_logprobs: int = 20,
        num_tokens: int | None = None,
        is_processed: bool = False,
        max_decode_steps: int = 1,
        is_strict: bool = False,
        functions: UserFunctions = NO_FUNCTIONS,
    ) -> None:
        """Allocates the state.

        Args:
            model: A module of `folojax.models`.
            params: Its parameters.
            layout: Of the cache.
            shapes: Which shapes exist.
            max_num_seqs: Most requests in a plan.
            backend: That the layout and the shapes are of.
            max_logprobs: J wherever a request wants alternatives.
            num_tokens: Ids from here on are padding of the vocabulary; None: there are none.
            is_processed: Sampled tokens are reported as in `SamplingSpec`; prompts always raw.
            max_decode_steps: Most decode steps of a plan, and their number wherever it is not 1.
            is_strict: Whether an executable outside the compile plan is an error.
            functions: The user's.
        """
        self.model = model
        self.shapes = shapes
        self.backend = backend
        self.stats = RunnerStats()
        self.max_logprobs = min(max_logprobs, model.config.vocab_size)
        self._num_tokens = num_tokens
        self._is_processed = is_processed
        self._layout = layout
        self._max_decode_steps = max_decode_steps
        self.copies = PageCopies(backend.arrays_per_copy)
        self.host = HostStore(layout, self.copies, backend.host_memory)
        self.steps = make_steps(model, backend.is_layered, shapes.prefill_tokens)
        self._sample_programs = {}
        self.gate = Gate(list(self.list_executables(tuple(SamplingClass), True)), is_strict)
        num_slots = slots_for(max_num_seqs)
        self.batch = Batch(
            num_slots,
            shapes.table_pages,
            layout.num_pages,
            model.config.vocab_size,
            functions,
        )
        self._processors = ProcessorStates(functions.processors, num_slots)
        self.params = params
        self.state: EngineState = self._allocate()

    @property
    def params(self) -> Any:
        """The model's parameters; may be replaced between steps by others of the same shapes."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = place(params)
        self._head_params = step.head_params(self._params)

    def dispatch(self, plan: StepPlan) -> list[Pending]:
        """Has the device compute a plan, after those before; returns what `collect` takes."""
        self._update(plan)
        self.stats.num_scheduled_tokens += plan.total_num_scheduled_tokens
        rows = self.batch.longest_first(plan.num_scheduled_tokens)
        num_tokens = [plan.num_scheduled_tokens[row.request_id] for row in rows]
        slots = [row.slot for row in rows]
        sampled = plan.sampled_request_ids
        is_plain = plan.total_num_scheduled_tokens == len(rows) and not self.batch.num_scored_rows
        if not rows:
            return []
        if plan.num_decode_steps > 1:
            pending = [self._decode_steps(rows, slots, num_tokens)]
        elif is_plain and len(sampled) == len(rows):  # most steps
            pending = [self._decode(rows, slots, None)]
        else:
            pending = self._mixed(rows, num_tokens, set(sampled))
        self.batch.advance(slots, num_tokens)
        return pending

    def collect(self, pending: list[Pending]) -> StepResult:
        """Waits until a plan is computed, and returns what it gave; may be asked again."""
        return read(pending)

    def read_kv(self, page_ids: Sequence[int], num_tokens: int) -> TokenKV:
        """Waits for the K/V of the first tokens in some pages."""
        num_pages = -(-num_tokens // self._layout.page_size)
        taken = self.copies.take(self.state.cache, page_ids[:num_pages])
        return read_tokens(taken, num_tokens, self._layout)

    def reset(self) -> None:
        """Forgets every row; replaces the state if an interrupted step has consumed it."""
        self.batch.clear()
        self._processors.clear()
        self.host.clear()
        self.restore()

    def release(self) -> None:
        """Gives the state's memory back, until `restore`; what processors know is put aside.

        Every row is to be computed again, and what the host holds was dropped.
        """
        self._processors.release(self.batch)
        self.batch.clear()
        self.host.clear()
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()

    def restore(self) -> None:
        """Allocates the state, unless it is there."""
        if not is_alive(self.state):
            self.state = self._allocate()

    def _allocate(self) -> EngineState:
        return place(init_state(self._layout, self.batch.num_slots))

    def check_is_empty(self) -> None:
        """Asserts that no request is remembered and every slot is free."""
        self.batch.check_is_empty()
        assert not len(self.host), "host memory holds pages"

    def _update(self, plan: StepPlan) -> None:
        """Takes in who comes and goes, and moves pages."""
        self._processors.before(plan, self.batch)
        for row in self.batch.update(plan):
            if row.request.has_slot_edits:
                self.gate.check(EDITS)
                self.write_edits(row)
            self._processors.join(row)
        self._move_pages(plan.page_moves)

    def _move_pages(self, moves: PageMoves) -> None:
        """In the order that the scheduler counts on."""
        cache = self.state.cache
        if moves.saves or moves.copies or moves.loads:
            self.gate.check(COPIES)
        if moves.saves:
            self.host.save(cache, moves.saves)
        if moves.copies:
            cache = self.copies.copy(cache, moves.copies)
        if moves.loads:
            cache = self.host.load(cache, moves.loads)
            self.stats.num_loaded_pages += sum(len(load.page_ids) for load in moves.loads)
        if moves.dropped:
            self.host.drop(moves.dropped)
        self.state = self.state._replace(cache=cache)

    def _mixed(self, rows: list[Row], num_tokens: list[int], sampled: set[str]) -> list[Pending]:
        """Chunks of prompts, and beside them the rows that have a single token to compute."""
        chunks: list[Chunk] = []
        singles: list[Row] = []
        columns = self.shapes.prefill_columns
        for row, count in zip(rows, num_tokens, strict=True):
            start = int(self.batch.num_computed[row.slot])
            if count == 1 and not is_scored(row, start):
                singles.append(row)
                continue
            end = start + count
            assert end <= len(row.token_ids), f"{row.request_id} has {count} tokens, sampled ones"
            for first in range(start, end, columns):
                last = min(first + columns, end)
                has_sample = last == end and row.request_id in sampled
                chunks.append(Chunk(row, first, last, has_sample))
        calls = split_calls(chunks, self.shapes.prefill_rows[-1])
        pending = [self._prefill(some) for some in calls]
        if singles:
            pending.append(self._decode(singles, [row.slot for row in singles], sampled))
        return pending

    def _prefill(self, chunks: Sequence[Chunk]) -> Pending:
        shape = self.shapes.prefill_shape(len(chunks))
        inputs = self.batch.prefill_inputs(shape, chunks)
        every = self.batch.pad([chunk.row.slot for chunk in chunks], shape.rows)
        edits, is_on = self.batch.params.activation_edits(every)
        taps = self.batch.params.taps(every)
        self.gate.check(model_executable(shape, edits, taps))
        cache, last, hidden, streams = self.steps.prefill(
            self.params, self.state.cache, inputs, edits, is_on, taps
        )
        self.state = self.state._replace(cache=cache)
        num_computed = min(inputs.tokens.size, self.shapes.prefill_tokens or inputs.tokens.size)
        self.stats.count_prefill(int(inputs.length.sum()), num_computed)
        rows = [chunk.row if chunk.has_sample else None for chunk in chunks]
        out = None
        if any(rows):
            nowhere = self.batch.num_slots
            slots = [nowhere if row is None else row.slot for row in rows]
            slot = self.batch.pad(slots, shape.rows)
            out = self._sample(last, slot, inputs.start + inputs.length)
        spans = [Span(chunk.row, chunk.start, chunk.end - chunk.start) for chunk in chunks]
        tapped = Tapped(streams, spans, shape.columns) if taps else None
        return Pending(rows, out, list(chunks), self._score(hidden, chunks), tapped=tapped)

    def _decode(self, rows: list[Row], slots: list[int], sampled: set[str] | None) -> Pending:
        """One token of each row; `sampled` are the ids of those that sample, None is all."""
        sampling: list[Row | None] = list(rows)
        drawing = slots
        if sampled is not None:
            sampling = [row if row.request_id in sampled else None for row in rows]
            nowhere = self.batch.num_slots
            drawing = [nowhere if row is None else row.slot for row in sampling]
        if isinstance(self.steps, WholeSteps):
            inputs, out, streams = self._call_sampled(self.steps, slots, drawing)
        else:
            inputs = self._decode_inputs(slots)
            hidden, streams = self._call_decode(inputs)
            slot = self.batch.pad(drawing, len(inputs.slot))
            out = self._sample(hidden, slot, inputs.position + 1)
        self.stats.num_computed_tokens += len(inputs.slot)
        tapped = tapped_rows(streams, rows, inputs, [1] * len(rows))
        return Pending(sampling, out, [], None, tapped=tapped)

    def _decode_steps(self, rows: list[Row], slots: list[int], num_tokens: list[int]) -> Pending:
        """Several tokens of each row, one after the other."""
        inputs = self._decode_inputs(slots)
        num_steps = ints(len(inputs.slot))
        num_steps[: len(num_tokens)] = num_tokens
        last = inputs.position + num_steps  # of the tokens to be drawn
        spec = self._spec(inputs.slot, np.stack([inputs.position + 1, last]))
        self.stats.num_computed_tokens += len(inputs.slot) * self._max_decode_steps
        out, streams = self._call_decode_steps(inputs, num_steps, spec)
        tapped = tapped_rows(streams, rows, inputs, num_tokens, self._max_decode_steps)
        return Pending(list(rows), out, [], None, num_tokens, tapped)

    def _decode_inputs(self, slots: list[int], is_greedy: bool = True) -> DecodeInputs:
        self.stats.num_decode_calls += 1
        shape = self.shapes.decode_shape(len(slots), is_greedy)
        return self.batch.decode_inputs(shape, slots)

    def _sample(self, hidden: Any, slot: Any, position: Any) -> Any:
        return self._call_sample(hidden, slot, position, self._spec(slot, position[None]))

    def _score(self, hidden: Any, chunks: Sequence[Chunk]) -> TokenScores | None:
        scored = [chunk for chunk in chunks if is_scored(chunk.row, chunk.start)]
        if not scored:
            return None
        targets = ints(hidden.shape[:2])
        for i, chunk in enumerate(chunks):
            following = tokens_after(chunk)
            targets[i, : len(following)] = following
        wanted = [chunk.row.request.num_prompt_logprobs or 0 for chunk in scored]
        num_logprobs = self.shapes.num_alternatives(max(wanted), self.max_logprobs) or 0
        self.gate.check(
            Executable("score", len(targets), targets.shape[1], num_logprobs=num_logprobs)
        )
        return self.score_call(hidden, targets, num_logprobs).run()

    def _call_decode(self, inputs: DecodeInputs) -> tuple[Any, dict[int, Any]]:
        edits, is_on = self.batch.params.activation_edits(inputs.slot)
        taps = self.batch.params.taps(inputs.slot)
        self.gate.check(model_executable(DecodeShape(len(inputs.slot)), edits, taps))
        cache, hidden, streams = self.steps.decode(
            self.params, self.state.cache, self.state.slots.tokens, inputs, edits, is_on, taps
        )
        self.state = self.state._replace(cache=cache)
        return hidden, streams

    def _call_sampled(
        self, steps: WholeSteps, slots: list[int], drawing: list[int]
    ) -> tuple[DecodeInputs, PackedReport, dict[int, Any]]:
        """A decode step and its sampling in one call."""
        position = self.batch.num_computed[slots] + 1
        spec = self._spec(np.asarray(drawing), position[None])
        inputs = self._decode_inputs(slots, spec == _GREEDY)
        slot = self.batch.pad(drawing, len(inputs.slot))
        state, kept, sampling, spec = self.sampling(slot, inputs.position + 1, spec)
        edits, is_on = self.batch.params.activation_edits(inputs.slot)
        taps = self.batch.params.taps(inputs.slot)
        bans = 0 if sampling.edits is None else exceptional_bans(sampling.edits.bans)
        shape = DecodeShape(len(slot))
        self.gate.check(sampled_executable(shape, spec, edits, taps, bans))
        cache, state, out, streams = steps.decode_and_sample(
            self.params, self.state.cache, state, (inputs, sampling), spec, edits, is_on, taps
        )
        self.state = self.state._replace(cache=cache)
        self._keep(state, kept)
        return inputs, out, streams

    def _call_decode_steps(
        self, inputs: DecodeInputs, num_steps: Any, spec: SamplingSpec
    ) -> tuple[StepOutput, dict[int, Any]]:
        call, options, kept = self.decode_steps_call(self.state.cache, inputs, num_steps, spec)
        edits, taps, listed = options["activation_edits"], options["taps"], call.args[6]
        bans = 0 if listed is None else exceptional_bans(listed)
        shape = DecodeShape(len(inputs.slot))
        self.gate.check(steps_executable(shape, self._max_decode_steps, spec, edits, taps, bans))
        cache, slots, out, streams = call.run()
        self.state = self.state._replace(cache=cache)
        self._keep(slots, kept)
        return out, streams

    def list_executables(
        self, sampling: Collection[SamplingClass], has_logprobs: bool
    ) -> Iterator[Executable]:
        """Every executable that plans may need, for these classes of sampling.

        Those of records, taps and of the user's functions are not among them.
        """
        sizes = self._list_logprobs(has_logprobs)
        is_whole = isinstance(self.steps, WholeSteps)
        sampling = {self.shapes.sampling_class(needed) for needed in sampling}
        return list_executables(self.shapes, sampling, sizes, self._max_decode_steps, is_whole)
