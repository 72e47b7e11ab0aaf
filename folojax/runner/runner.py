"""Plan to device calls to host tokens.

    plan ──> batch ──> chunks ──> "prefill" ──> hidden ──> "sample" ──┐
                 └──> single tokens ──> "decode" ──> hidden ──> "sample" ─> results by request id
                                          (and "score", for prompts whose scores are wanted)

One decode call serves all rows that need a single token, one prefill call the chunks of all
prompts (more only if they overflow the largest bucket). Several decode steps at once, where a plan
has them, are one call too, with the sampling of each. `dispatch` hands a plan to the device and
does not wait; `collect` waits for what it gave. Further plans may be dispatched in between: the
device has the tokens that they continue.

In deterministic mode (steps of the kinds "rows" and "ordered") rows that ask for different sampling
are sampled in different calls: nothing that decides a bit is shared by rows that differ in what
they ask. In steps of the kind "rows" all tokens are chunks of one token.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from folojax.kv.page_copies import PageCopies
from folojax.requests.user_functions import NO_FUNCTIONS, UserFunctions
from folojax.runner.apart import rows_by_spec
from folojax.runner.batch import Chunk, Row, ints, round_up
from folojax.runner.compile_plan import Gate
from folojax.runner.grammar_masks import Masks
from folojax.runner.host_store import HostStore
from folojax.runner.kept_states import KeptStates
from folojax.runner.results import Pending, StepResult, is_scored, read, tokens_after
from folojax.runner.row_params import exceptional_bans
from folojax.runner.setup import Setup
from folojax.runner.slot_states import SlotStates
from folojax.runner.stats import RunnerStats
from folojax.sampling.rows import SlotState, TokenScores
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.sched.step_plan import PageMoves, StepPlan
from folojax.steps.executables import COPIES, EDITS, Executable, is_plain_greedy
from folojax.steps.state import CallInputs, CallResults, EngineState, init_state, is_alive


class Runner:
    """Runs plans on the device; owns the state and the parameters."""

    def __init__(
        self,
        setup: Setup,
        params: Any,
        *,
        is_strict: bool = False,
        functions: UserFunctions = NO_FUNCTIONS,
    ) -> None:
        """Allocates the state.

        Args:
            setup: What its calls are made for.
            params: The model's parameters.
            is_strict: Whether an executable outside the compile plan is an error.
            functions: The user's.
        """
        self.setup = setup
        self.model, self.backend, self.shapes = setup.model, setup.backend, setup.shapes
        self.stats = RunnerStats()
        self.steps = self.backend.make_steps(setup.model)
        self.copies = PageCopies(self.backend.arrays_per_copy)
        self.host = HostStore(setup.layout, self.copies, self.backend)
        self.gate = Gate(setup.list_executables(tuple(SamplingClass), True, True), is_strict)
        self.batch = setup.batch(functions)
        self.kept = KeptStates(setup.layout.num_slots, self.gate)
        self._slots = SlotStates(setup, functions)
        self.adapters = setup.adapter_slots(params)
        self.grammars = setup.grammar_masks()
        self.params = params
        self.state = self._allocate()

    @property
    def params(self) -> Any:
        """The model's parameters; may be replaced between steps by others of the same shapes."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = self.backend.devices.place_params(params, self.model.config)

    def dispatch(self, plan: StepPlan) -> list[Pending]:
        """Has the device compute a plan, after those before; returns what `collect` takes."""
        self._update(plan)
        if plan.state_loads:
            self.state = self.kept.load(self.state, plan.state_loads, self.batch.rows)
        self.stats.num_scheduled_tokens += plan.total_num_scheduled_tokens
        rows = self.batch.longest_first(plan.num_scheduled_tokens)
        if not rows:
            return []
        slots, sampled = np.array([row.slot for row in rows]), plan.sampled_request_ids
        is_single, num_tokens = plan.total_num_scheduled_tokens == len(rows), [1] * len(rows)
        if not is_single:
            num_tokens = [plan.num_scheduled_tokens[row.request_id] for row in rows]
        is_plain = is_single and not self.batch.num_scored_rows
        if plan.num_decode_steps > 1:
            pending = self._decode(rows, slots, num_tokens=num_tokens)
        elif is_plain and len(sampled) == len(rows) and self.steps.kind != "rows":  # most steps
            pending = self._decode(rows, slots)
        else:
            pending = self._mixed(rows, num_tokens, set(sampled))
        if plan.state_saves:
            self.state = self.kept.save(self.state, plan.state_saves, self.batch.rows)
        self.batch.advance(slots, 1 if is_single else num_tokens)
        return pending

    def collect(self, pending: list[Pending]) -> StepResult:
        """Waits until a plan is computed, and returns what it gave; may be asked again."""
        result = read(pending)
        self.grammars.check()
        return result

    def call(self, one: Executable, inputs: CallInputs) -> CallResults:
        """Has the device run an executable on the state; its report is on the way to the host.

        Raises:
            RuntimeError: it is outside the compile plan, and the engine is strict.
        """
        if one not in self.gate.passed:
            self.gate.check(one)
        if one.spec is not None and one.spec.needed >= SamplingClass.EDITED:
            self._set_slots(self._slots.with_edits(self.state.slots))
        self.state, results = self.steps.call(one, self.params_of(one), self.state, inputs)
        if results.report is not None:
            results.report.array.copy_to_host_async()
        return results

    def params_of(self, one: Executable) -> Any:
        """The parameters that an executable is called with."""
        if not one.is_adapted:
            return self._params
        assert self.adapters is not None, "an engine without adapters"
        return self.adapters.adapted(self._params)

    def reset(self) -> None:
        """Forgets every row; replaces the state if an interrupted step has consumed it."""
        self.grammars.clear()
        self.batch.clear()
        self._slots.clear()
        self.host.clear()
        self.restore()

    def release(self) -> None:
        """Gives the state's memory back, until `restore`; what processors know is put aside.

        Every row is to be computed again, and what the host holds was dropped.
        """
        self._slots.put_aside(self.batch.rows.values(), self.state.slots)
        self.batch.clear()
        self.host.clear()
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()

    def restore(self) -> None:
        """Allocates the state, unless it is there."""
        if not is_alive(self.state):
            self.state = self._allocate()

    def check_is_empty(self) -> None:
        """Asserts that no request is remembered and every slot is free."""
        self.batch.check_is_empty()
        assert not len(self.host), "host memory holds pages"

    def compile_edits(self) -> None:
        """Compiles what keeps edits of logits in a slot."""
        self._set_slots(self._slots.compile_edits(self.state.slots))

    def _allocate(self) -> EngineState:
        return self.backend.devices.make(
            lambda: init_state(self.setup.layout, self.setup.num_slots)
        )

    def _set_slots(self, slots: SlotState) -> None:
        self.state = self.state._replace(slots=slots)

    def _update(self, plan: StepPlan) -> None:
        """Takes in who comes and goes, and moves pages."""
        if plan.preempted_request_ids or plan.finished_request_ids:
            self._slots.leave(plan, self.batch, self.state.slots)
        for row in self.batch.update(plan):
            if row.request.has_slot_edits:
                self.gate.check(EDITS)
            if row.request.has_slot_edits or row.request.sampling_params.logits_processors:
                self._set_slots(self._slots.join(row, self.state.slots))
            if row.request.adapter is not None:
                assert self.adapters is not None, f"{row.request_id} has an adapter"
                in_use = {one.request.adapter for one in self.batch.rows.values()}
                slot = self.adapters.slot_of(row.request.adapter, in_use)
                self.batch.set_adapter(row, slot)
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
        columns, is_by_row = self.shapes.prefill_columns, self.steps.kind == "rows"
        for row, count in zip(rows, num_tokens, strict=True):
            start = int(self.batch.num_computed[row.slot])
            is_single = count == 1 and not is_by_row
            if is_single and row.request.routing is None and not is_scored(row, start):
                singles.append(row)
                continue
            end = start + count
            is_known = is_by_row or end <= len(row.token_ids)
            assert is_known, f"{row.request_id} has {count} tokens, sampled ones"
            for first in range(start, end, columns):
                last = min(first + columns, end)
                has_sample = last == end and row.request_id in sampled
                chunks.append(Chunk(row, first, last, has_sample))
        most = self.shapes.prefill_rows[-1]
        pending: list[Pending] = []
        for first in range(0, len(chunks), most):
            pending += self._chunks(chunks[first : first + most])
        if singles:
            pending += self._decode(singles, np.array([row.slot for row in singles]), sampled)
        return pending

    def _chunks(self, chunks: Sequence[Chunk]) -> list[Pending]:
        """A call for chunks, of prompts or of a token each; and the samples and scores of them."""
        num_rows = round_up(len(chunks), self.shapes.prefill_rows)
        columns, is_by_row = self.shapes.prefill_columns, self.steps.kind == "rows"
        slots = [chunk.row.slot for chunk in chunks]
        extras, is_edited = self.batch.row_table.extras(self.batch.pad(slots, num_rows))
        if is_by_row:
            positions = [chunk.start for chunk in chunks]
            rows: Any = self.batch.decode_inputs(num_rows, slots, positions)
        else:
            rows = self.batch.prefill_inputs(num_rows, columns, chunks)
        routing = self.batch.routing_of(chunks, num_rows, columns)
        if routing is not None:
            extras = extras._replace(forces_experts=True)
        # What is read of the residual stream is picked by its row.
        is_read = extras.residual_layers or extras.reads_experts
        most_tokens = None if is_read else self.shapes.prefill_tokens
        kind = "rows" if is_by_row else "prefill"
        adapters = self.batch.adapters_of(slots, num_rows)
        options: dict[str, Any] = {"most_tokens": most_tokens, "is_adapted": adapters is not None}
        one = Executable(kind, num_rows, columns, None, extras, **options)
        results = self.call(one, CallInputs(rows, is_edited, adapters, routing))
        num_computed = min(num_rows * columns, self.shapes.prefill_tokens or num_rows * columns)
        self.stats.count_chunks(chunks, num_computed, is_by_row)
        position = ints(num_rows)
        position[: len(chunks)] = [chunk.end for chunk in chunks]
        drawing = [chunk.row if chunk.has_sample else None for chunk in chunks]
        pending = self._sampled(results.hidden, drawing, position)
        scores = self._score(results.every, chunks, num_rows)
        residuals = results.residuals or None
        if scores is not None or residuals is not None:
            about = Pending(chunks=chunks, scores=scores, residuals=residuals, row_len=columns)
            pending.append(about)
        return pending

    def _decode(
        self,
        rows: list[Row],
        slots: Any,
        sampled: set[str] | None = None,
        num_tokens: list[int] | None = None,
    ) -> list[Pending]:
        """A token of each row, or so many, one after the other.

        Args:
            rows: That continue.
            slots: Of them, an array.
            sampled: Ids of those that sample; None: all do.
            num_tokens: Of each row, all of which sample; None: one, in a call for one.
        """
        drawing: list[Row | None] = list(rows)
        if sampled is not None:
            drawing = [row if row.request_id in sampled else None for row in rows]
        table, spec, sizes = self.batch.row_table, None, self.shapes.decode_rows
        most_steps = 1 if num_tokens is None else self.setup.max_decode_steps
        if self.steps.kind in ("whole", "ordered") or num_tokens is not None:
            drawn = slots if sampled is None else self._slots_of(drawing, len(rows))
            positions = self.batch.num_computed[slots][None] + 1
            if num_tokens is not None:
                positions = np.concatenate((positions, positions + np.asarray(num_tokens) - 1))
            spec = self._spec(drawn, positions)
        if num_tokens is None and self.steps.kind in ("whole", "ordered"):
            is_fine = spec is not None and is_plain_greedy(spec)
            sizes = sizes if is_fine else self.shapes.sampled_rows
            spec = spec if is_fine or self.steps.kind == "whole" else None
        inputs = self.batch.decode_inputs(round_up(len(slots), sizes), slots)
        num_rows, position, num_steps = len(inputs.slot), inputs.position + 1, None
        slot = inputs.slot if sampled is None else self._slots_of(drawing, num_rows)
        extras, is_edited = table.extras(inputs.slot)
        adapters = self.batch.adapters_of(slots, num_rows)
        is_adapted = adapters is not None
        if spec is None:
            one = Executable("decode", num_rows, extras=extras, is_adapted=is_adapted)
            results = self.call(one, CallInputs(inputs, is_edited, adapters))
            pending = self._sampled(results.hidden, drawing, position)
        else:
            if num_tokens is not None:
                num_steps = ints(num_rows)
                num_steps[: len(num_tokens)] = num_tokens
                steps = np.arange(most_steps, dtype=np.int32)[:, None]
                # A row that is done stands still.
                position = position + np.minimum(steps, np.maximum(num_steps - 1, 0))
            masks = self._ask_masks(slot, spec)
            sampling = table.sample_inputs(slot, position, spec)._replace(mask=masks.mask)
            kind = "decode" if num_tokens is None else "decode_steps"
            bans = exceptional_bans(sampling)
            one = Executable(kind, num_rows, most_steps, spec, extras, bans, is_adapted=is_adapted)
            given = CallInputs(inputs, is_edited, adapters, None, sampling, num_steps)
            results = self.call(one, given._replace(mail=masks.mail))
            pending = [Pending(drawing, results.report, num_tokens, row_len=most_steps)]
            if spec.has_mask:
                self.grammars.note(pending[0])
        self.stats.num_decode_calls += 1
        self.stats.num_computed_tokens += num_rows * most_steps
        if results.residuals:
            each = zip(rows, inputs.position.tolist(), num_tokens or [1] * len(rows), strict=False)
            chunks = [Chunk(row, first, first + count, True) for row, first, count in each]
            pending.append(Pending(chunks=chunks, residuals=results.residuals, row_len=most_steps))
        return pending

    def _sampled(self, hidden: Any, drawing: list[Row | None], position: Any) -> list[Pending]:
        """Calls that sample the next token of rows: one for all, or one for each kind."""
        pending = []
        for spec, rows in self._by_spec(drawing, position).items():
            slots = self._slots_of(rows, len(position))
            pending.append(Pending(rows, self._sample(hidden, slots, position, spec)))
            if spec.has_mask:
                self.grammars.note(pending[-1])
        return pending

    def _by_spec(self, drawing: list[Row | None], position: Any) -> dict[SamplingSpec, list[Any]]:
        """The rows that sample, by the sampler that they need: one for all, or one a kind."""
        slots = self._slots_of(drawing, len(position))
        if self.steps.kind in ("rows", "ordered"):
            return rows_by_spec(drawing, slots, position, self.batch.row_table, self._spec)
        return {self._spec(slots, position[None]): drawing} if any(drawing) else {}

    def _slots_of(self, rows: Sequence[Row | None], count: int) -> Any:
        """Slots of rows, padded; M for what is no row."""
        nowhere = self.batch.num_slots
        return self.batch.pad([nowhere if row is None else row.slot for row in rows], count)

    def _spec(self, slot: Any, positions: Any) -> SamplingSpec:
        """What slots need that draw tokens at some positions, [K, B]."""
        table = self.batch.row_table
        return self.setup.spec(
            table.sampling_class(slot, positions),
            table.most_logprobs(slot),
            table.has_record(slot),
            table.processors(slot),
            table.has_grammar(slot),
        )

    def _sample(self, hidden: Any, slot: Any, position: Any, spec: SamplingSpec) -> Any:
        masks = self._ask_masks(slot, spec)
        sampling = self.batch.row_table.sample_inputs(slot, position, spec)
        sampling = sampling._replace(mask=masks.mask)
        one = Executable("sample", len(slot), spec=spec, bans=exceptional_bans(sampling))
        return self.call(one, CallInputs(sampling=sampling, hidden=hidden, mail=masks.mail)).report

    def _ask_masks(self, slot: Any, spec: SamplingSpec) -> Masks:
        """What the grammars of slots allow, if there are any."""
        if not spec.has_mask:
            return Masks()
        return self.grammars.ask(self.batch.matchers(slot.tolist()))

    def _score(self, every: Any, chunks: Sequence[Chunk], num_rows: int) -> TokenScores | None:
        scored = [chunk for chunk in chunks if is_scored(chunk.row, chunk.start)]
        if not scored:
            return None
        columns = self.shapes.prefill_columns
        targets = ints((num_rows, columns))
        for i, chunk in enumerate(chunks):
            if is_scored(chunk.row, chunk.start):
                following = tokens_after(chunk)
                targets[i, : len(following)] = following
        spec = self.setup.score_spec(
            max(one.row.request.num_prompt_logprobs or 0 for one in scored)
        )
        one = Executable("score", num_rows, columns, spec)
        return self.call(one, CallInputs(hidden=every, targets=targets)).scores
