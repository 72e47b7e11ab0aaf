"""Plan to jitted calls to host tokens.

    plan ──> batch ──> chunks ──> prefill ──> hidden ──> sample_tokens ──┐
                 └──> single tokens ─> decode ──> hidden ──> sample_tokens ─> results by request id
                                          (and score_tokens, for prompts whose scores are wanted)

One decode call serves all rows that need a single token, one prefill call the chunks of all
prompts (more only if they overflow the largest bucket). `dispatch` hands a plan to the device and
does not wait; `collect` waits for what it gave. Further plans may be dispatched in between: the
device has the tokens that they continue.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from folojax import kv_cache, step
from folojax.batch import Batch, Chunk, Row, ints
from folojax.buckets import Buckets, PrefillShape, slots_for
from folojax.logit_edits import EditState, init_edits, write_slot
from folojax.results import Pending, StepResult, is_scored, read, tokens_after
from folojax.row_params import RowParams
from folojax.sampling import SamplingClass, SamplingSpec
from folojax.sampling_params import SamplingParams
from folojax.sched.plan import SchedulerOutput
from folojax.state import (
    DecodeInputs,
    EngineState,
    PrefillInputs,
    SampleInputs,
    StepOutput,
    TokenScores,
    init_state,
    is_alive,
)

_USUAL_LOGPROBS = 20
"""J where nobody wants more, also in an engine that allows the whole vocabulary."""


@dataclasses.dataclass
class RunnerStats:
    """Counts since the runner was made; padding is in computed minus scheduled tokens."""

    num_prefill_calls: int = 0
    num_decode_calls: int = 0
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0


class Runner:
    """Runs plans on the device; owns the state and the parameters."""

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        layout: kv_cache.KVLayout,
        buckets: Buckets,
        max_num_seqs: int,
        *,
        max_logprobs: int = 20,
        num_tokens: int | None = None,
        is_processed: bool = False,
    ) -> None:
        """Allocates the state.

        Args:
            model: A module of `folojax.models`.
            params: Its parameters.
            layout: Of the cache.
            buckets: Which shapes exist.
            max_num_seqs: Most requests in a plan.
            max_logprobs: J wherever a request wants alternatives.
            num_tokens: Ids from here on are padding of the vocabulary; None: there are none.
            is_processed: Sampled tokens are reported as in `SamplingSpec`; prompts always raw.
        """
        self.model = model
        self.buckets = buckets
        self.stats = RunnerStats()
        self.max_logprobs = min(max_logprobs, model.config.vocab_size)
        self._num_tokens = num_tokens
        self._is_processed = is_processed
        self._layout = layout
        num_slots = slots_for(max_num_seqs)
        self.batch = Batch(
            num_slots, buckets.decode_pages[-1], layout.num_pages, model.config.vocab_size
        )
        self.params = params
        self.state: EngineState = _place(init_state(layout, num_slots))

    @property
    def params(self) -> Any:
        """The model's parameters; may be replaced between steps by others of the same shapes."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = _place(params)
        self._head_params = step.head_params(self._params)

    def dispatch(self, plan: SchedulerOutput) -> list[Pending]:
        """Has the device compute a plan, after those before; returns what `collect` takes."""
        for row in self.batch.update(plan):
            if row.params.has_slot_edits:
                self._write_edits(row.slot, row.params, row.token_ids, row.num_prompt_tokens)
        self._copy_pages(plan.page_copies)
        sampled = set(plan.sampled_request_ids)
        chunks: list[Chunk] = []
        singles: list[Row] = []
        for request_id, num_tokens in plan.num_scheduled_tokens.items():
            row = self.batch.rows[request_id]
            start, end = row.num_computed_tokens, row.num_computed_tokens + num_tokens
            if num_tokens == 1 and not is_scored(row, start):
                singles.append(row)
                continue
            assert end <= len(row.token_ids), f"{request_id} has {num_tokens} tokens, sampled ones"
            columns = self.buckets.prefill_columns
            for first in range(start, end, columns):
                last = min(first + columns, end)
                chunks.append(Chunk(row, first, last, last == end and request_id in sampled))
        most = self.buckets.prefill_rows[-1]
        pending = [self._prefill(chunks[i : i + most]) for i in range(0, len(chunks), most)]
        if singles:
            pending.append(self._decode(singles, sampled))
        self.stats.num_scheduled_tokens += plan.total_num_scheduled_tokens
        return pending

    def collect(self, pending: list[Pending]) -> StepResult:
        """Waits until a plan is computed, and returns what it gave; may be asked again."""
        return read(pending)

    def reset(self) -> None:
        """Forgets every row; replaces the state if an interrupted step has consumed it."""
        self.batch.clear()
        if not is_alive(self.state):
            self.state = _place(init_state(self._layout, self.batch.num_slots))

    def release(self) -> None:
        """Gives the state's memory back; `reset` allocates it again. Nothing may be running."""
        assert not self.batch.rows, "rows are left"
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()

    def check_is_empty(self) -> None:
        """Asserts that no request is remembered and every slot is free."""
        self.batch.check_is_empty()

    def warm_up(self, sampling: Sequence[SamplingClass]) -> int:
        """Compiles every planned shape by running it on padding; returns how many there are."""
        shapes = list(self.buckets.shapes())
        hidden: dict[int, Any] = {}
        for shape in shapes:
            if isinstance(shape, PrefillShape):
                inputs = self.batch.prefill_inputs(shape, [])
                hidden[shape.rows], _ = self._call_prefill(inputs, shape.segments)
            else:
                row_inputs = self.batch.decode_inputs(shape, [], [])
                hidden[shape.rows] = self._call_decode(row_inputs, shape.segments)
        for needed in sampling:
            for rows, states in hidden.items():
                slot = ints(rows, self.batch.num_slots)
                self._call_sample(states, slot, ints(rows), SamplingSpec(needed, None))
        if SamplingClass.EDITED in sampling:
            self._write_edits(0, RowParams(SamplingParams(), 0), ints(0), 0)
        cache, num_copies = kv_cache.compile_copies(self.state.cache)
        self.state = self.state._replace(cache=cache)
        return len(shapes) + len(hidden) * len(sampling) + num_copies

    def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        if not copies:
            return
        cache = kv_cache.copy_pages(self.state.cache, copies)
        self.state = self.state._replace(cache=cache)

    def _prefill(self, chunks: list[Chunk]) -> Pending:
        page_size = self._layout.page_size
        most_pages = max(-(-chunk.end // page_size) for chunk in chunks)
        extent = max(chunk.row.extent for chunk in chunks)
        shape = self.buckets.prefill_shape(len(chunks), extent, most_pages)
        inputs = self.batch.prefill_inputs(shape, chunks)
        last, hidden = self._call_prefill(inputs, shape.segments)
        self.stats.num_prefill_calls += 1
        self.stats.num_computed_tokens += inputs.tokens.size
        rows = [chunk.row if chunk.has_sample else None for chunk in chunks]
        out = self._sample(last, rows, inputs.start + inputs.length) if any(rows) else None
        scores = self._score(hidden, chunks)
        return Pending(rows, out, chunks, scores)

    def _decode(self, rows: list[Row], sampled: set[str]) -> Pending:
        extent, most_pages = max(r.extent for r in rows), max(r.num_pages for r in rows)
        shared_items = self.batch.num_shared_items(rows, self.buckets.shared_lanes)
        shape = self.buckets.decode_shape(len(rows), extent, most_pages, shared_items)
        inputs = self.batch.decode_inputs(shape, rows, [row.num_computed_tokens for row in rows])
        hidden = self._call_decode(inputs, shape.segments)
        self.stats.num_decode_calls += 1
        self.stats.num_computed_tokens += shape.rows
        sampling = [row if row.request_id in sampled else None for row in rows]
        return Pending(sampling, self._sample(hidden, sampling, inputs.position + 1), [], None)

    def _sample(self, hidden: Any, rows: list[Row | None], position: Any) -> StepOutput:
        slot = self.batch.slots(rows, len(position))
        wanted = [row.params.num_logprobs for row in rows if row is not None]
        num_logprobs = self._bucket_logprobs([count for count in wanted if count is not None])
        spec = SamplingSpec(self.batch.params.sampling_class(slot, position), num_logprobs)
        return self._call_sample(hidden, slot, position, spec)

    def _score(self, hidden: Any, chunks: list[Chunk]) -> TokenScores | None:
        scored = [chunk for chunk in chunks if is_scored(chunk.row, chunk.start)]
        if not scored:
            return None
        targets = ints(hidden.shape[:2])
        for i, chunk in enumerate(chunks):
            following = tokens_after(chunk)
            targets[i, : len(following)] = following
        wanted = [chunk.row.params.num_prompt_logprobs or 0 for chunk in scored]
        return step.score_tokens(
            self._head_params,
            hidden,
            targets,
            model=self.model,
            num_logprobs=self._bucket_logprobs(wanted) or 0,
        )

    def _bucket_logprobs(self, wanted: Sequence[int]) -> int | None:
        """J: one size for nearly all who want alternatives, so that one executable serves them."""
        if not wanted:
            return None
        most = max(wanted)
        if most > _USUAL_LOGPROBS:
            return self.max_logprobs
        return min(_USUAL_LOGPROBS, self.max_logprobs) if most > 0 else 0

    def _call_prefill(self, inputs: PrefillInputs, num_segments: int) -> tuple[Any, Any]:
        head, tail = kv_cache.take_segments(self.state.cache, num_segments)
        head, last, hidden = step.prefill(self.params, head, inputs, model=self.model)
        self.state = self.state._replace(cache=kv_cache.join_segments(head, tail))
        return last, hidden

    def _call_decode(self, inputs: DecodeInputs, num_segments: int) -> Any:
        head, tail = kv_cache.take_segments(self.state.cache, num_segments)
        head, hidden = step.decode(
            self.params, head, self.state.slots.tokens, inputs, model=self.model
        )
        self.state = self.state._replace(cache=kv_cache.join_segments(head, tail))
        return hidden

    def _call_sample(self, hidden: Any, slot: Any, position: Any, spec: SamplingSpec) -> StepOutput:
        spec = dataclasses.replace(
            spec, num_tokens=self._num_tokens, is_processed=self._is_processed
        )
        inputs = SampleInputs(slot, position, self.batch.params.rows(slot))
        slots, edits = self.state.slots, None
        if spec.needed >= SamplingClass.EDITED:
            slots = slots._replace(edits=self._edits())
            inputs = inputs._replace(edits=self.batch.params.edit_rows(slot, position))
        else:
            # Not an argument of the others, which would be compiled once with and once without it.
            slots, edits = slots._replace(edits=None), slots.edits
        slots, out = step.sample_tokens(
            self._head_params, slots, hidden, inputs, model=self.model, spec=spec
        )
        self.state = self.state._replace(slots=slots._replace(edits=slots.edits or edits))
        return out

    def _edits(self) -> EditState:
        """What is kept for edits of logits; allocated when a request first needs it."""
        edits = self.state.slots.edits
        if edits is None:
            edits = _place(init_edits(self.batch.num_slots, self.model.config.vocab_size))
        return edits

    def _write_edits(
        self, slot: int, params: RowParams, token_ids: Any, num_prompt_tokens: int
    ) -> None:
        new = params.slot_edits(token_ids, num_prompt_tokens, self.model.config.vocab_size)
        edits = write_slot(self._edits(), ints((), slot), new)
        self.state = self.state._replace(slots=self.state.slots._replace(edits=edits))


def _place(arrays: Any) -> Any:
    """Commits arrays to the device; one that is there already is shared, not copied.

    To jit, committed arrays and others are different inputs: were some of either kind, parameters
    that come from elsewhere would need executables of their own.
    """
    return jax.device_put(arrays, jax.devices()[0])
