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
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from folojax import kv_cache, step
from folojax.batch import Batch, Chunk, Row, ints
from folojax.buckets import Buckets, PrefillShape, slots_for
from folojax.logit_edits import EditState, init_edits, write_slot
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


class TokenLogprob(NamedTuple):
    """A token, sampled or given, and how likely it was.

    `top_tokens` and `top_logprobs` are the likeliest alternatives, descending: as many as the
    request asked for. `rank` is 0 where it asked for no log-probabilities.
    """

    token: int
    logprob: float
    rank: int
    top_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class PromptLogprobs(NamedTuple):
    """Log-probabilities of a chunk of a prompt: entry i is of the token at position `first + i`."""

    first: int
    entries: list[TokenLogprob]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step gave, by request id.

    Attributes:
        sampled: The new token; None: the model gave no usable distribution (NaN, or all -inf).
        prompt_logprobs: Of requests that asked. A request that was preempted and is computed again
            reports again.
    """

    sampled: dict[str, TokenLogprob | None] = dataclasses.field(default_factory=dict)
    prompt_logprobs: dict[str, PromptLogprobs] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class RunnerStats:
    """Counts since the runner was made; padding is in computed minus scheduled tokens."""

    num_prefill_calls: int = 0
    num_decode_calls: int = 0
    num_scheduled_tokens: int = 0
    num_prefill_tokens: int = 0
    num_computed_tokens: int = 0
    num_copied_pages: int = 0


class Pending(NamedTuple):
    """Results of a call that are still on the device; row i of the arrays belongs to `rows[i]`."""

    rows: list[Row | None]
    out: StepOutput | None
    chunks: list[Chunk]
    scores: TokenScores | None


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
            if num_tokens == 1 and not _is_scored(row, start):
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
        return _read(pending)

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
        self.stats.num_copied_pages += len(copies)

    def _prefill(self, chunks: list[Chunk]) -> Pending:
        page_size = self._layout.page_size
        most_pages = max(-(-chunk.end // page_size) for chunk in chunks)
        extent = max(chunk.row.extent for chunk in chunks)
        shape = self.buckets.prefill_shape(len(chunks), extent, most_pages)
        inputs = self.batch.prefill_inputs(shape, chunks)
        last, hidden = self._call_prefill(inputs, shape.segments)
        self.stats.num_prefill_calls += 1
        self.stats.num_prefill_tokens += sum(chunk.end - chunk.start for chunk in chunks)
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
        scored = [chunk for chunk in chunks if _is_scored(chunk.row, chunk.start)]
        if not scored:
            return None
        targets = ints(hidden.shape[:2])
        for i, chunk in enumerate(chunks):
            following = _tokens_after(chunk)
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


def _is_scored(row: Row, position: int) -> bool:
    """Whether the token after a position has a log-probability that the request asked for."""
    if row.params.num_prompt_logprobs is None:
        return False
    return position + 1 < row.num_prompt_tokens or (
        row.params.next_token is not None and position + 1 == row.num_prompt_tokens
    )


def _tokens_after(chunk: Chunk) -> list[int]:
    """The scored tokens that follow the positions of a chunk."""
    row = chunk.row
    tokens = row.token_ids[: row.num_prompt_tokens].tolist()[chunk.start + 1 : chunk.end + 1]
    if chunk.end == row.num_prompt_tokens and row.params.next_token is not None:
        tokens.append(row.params.next_token)
    return tokens


def _read(pending: list[Pending]) -> StepResult:
    """Waits for the device and sorts its rows by request."""
    result = StepResult()
    arrays = jax.device_get([(item.out, item.scores) for item in pending])
    for item, (out, scores) in zip(pending, arrays, strict=True):
        if out is not None:
            _read_samples(item.rows, out, result)
        if scores is not None:
            _read_scores(item.chunks, scores, result)
    return result


def _read_samples(rows: list[Row | None], out: StepOutput, result: StepResult) -> None:
    tokens, logprobs, ranks = out.tokens.tolist(), out.logprobs.tolist(), out.ranks.tolist()
    is_valid = out.is_valid.tolist()
    for i, row in enumerate(rows):
        if row is None:
            continue
        entry = TokenLogprob(tokens[i], logprobs[i], ranks[i])
        if row.params.num_logprobs:
            entry = entry._replace(
                top_tokens=tuple(out.top_tokens[i, : row.params.num_logprobs].tolist()),
                top_logprobs=tuple(out.top_logprobs[i, : row.params.num_logprobs].tolist()),
            )
        result.sampled[row.request_id] = entry if is_valid[i] else None


def _read_scores(chunks: list[Chunk], scores: TokenScores, result: StepResult) -> None:
    for i, chunk in enumerate(chunks):
        count = chunk.row.params.num_prompt_logprobs
        if count is None or not _is_scored(chunk.row, chunk.start):
            continue
        entries = [
            TokenLogprob(
                token,
                float(scores.logprobs[i, j]),
                int(scores.ranks[i, j]),
                tuple(scores.top_tokens[i, j, :count].tolist()),
                tuple(scores.top_logprobs[i, j, :count].tolist()),
            )
            for j, token in enumerate(_tokens_after(chunk))
        ]
        first = PromptLogprobs(chunk.start + 1, [])
        result.prompt_logprobs.setdefault(chunk.row.request_id, first).entries.extend(entries)
