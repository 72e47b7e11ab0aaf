"""The runner of deterministic mode: plans to rows of one fixed shape.

    plan ──> tokens of all requests, in order ──> T at a time ──> forward ──> row_logits ──┐
             sample_logits, once for each kind of sampling among them  <───────────────────┤
             score_logits, where a prompt is scored                    <───────────────────┘

Nothing that decides a bit is shared by rows that differ in what they ask
(`folojax.steps.row_by_row`).
"""

import functools
import itertools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from folojax.compile.programs import result_shapes
from folojax.runner.activation_taps import Span, Tapped
from folojax.runner.batch import Chunk, Row, ints
from folojax.runner.executables import COPIES, EDITS, Executable, layer_functions, sample_executable
from folojax.runner.results import Pending, is_scored, tokens_after
from folojax.runner.runner import Runner
from folojax.sampling.rows import SampleInputs, SlotState, TokenScores
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.sched.step_plan import StepPlan
from folojax.steps import row_by_row as rowwise
from folojax.steps.residual_stream import with_taps
from folojax.steps.state import DecodeInputs


class _Token(NamedTuple):
    """A token to be computed."""

    row: Row
    position: int
    has_sample: bool

    @property
    def chunk(self) -> Chunk:
        """The same as a chunk of one token."""
        return Chunk(self.row, self.position, self.position + 1, self.has_sample)


class DeterministicRunner(Runner):
    """Runs plans so that what a request gets is the same to the bit, whatever the batch."""

    def dispatch(self, plan: StepPlan) -> list[Pending]:
        """Has the device compute a plan, after those before; returns what `collect` takes."""
        self._update(plan)
        sampled = set(plan.sampled_request_ids)
        tokens = []
        assert plan.num_decode_steps == 1, "deterministic mode plans one step at a time"
        slots = []
        for request_id, count in plan.num_scheduled_tokens.items():
            row = self.batch.rows[request_id]
            slots.append(row.slot)
            start = int(self.batch.num_computed[row.slot])
            end = start + count
            tokens += [
                _Token(row, position, position + 1 == end and request_id in sampled)
                for position in range(start, end)
            ]
        size = self.backend.rows_per_call
        pending: list[Pending] = []
        for first in range(0, len(tokens), size):
            pending += self._run(tokens[first : first + size])
        if slots:
            self.batch.advance(slots, list(plan.num_scheduled_tokens.values()))
        self.stats.num_scheduled_tokens += plan.total_num_scheduled_tokens
        return pending

    def list_executables(
        self, sampling: Collection[SamplingClass], has_logprobs: bool
    ) -> Iterator[Executable]:
        """As `Runner`: one for all steps of the model, and the samplers and scorers behind it."""
        size = self.backend.rows_per_call
        yield Executable("rows", size)
        sizes = self._list_logprobs(has_logprobs)
        for needed, count in itertools.product(sorted(sampling), (None, *sizes)):
            yield sample_executable(size, SamplingSpec(needed, count))
        for count in sizes:
            yield Executable("score", size, num_logprobs=count)
        yield COPIES
        if SamplingClass.EDITED in sampling:
            yield EDITS

    def lower(self, one: Executable) -> list[Any]:
        """Traces the programs of one of these, other than copies and edits."""
        size = one.rows
        nowhere, model = ints(size, self.batch.num_slots), self.model
        inputs = DecodeInputs(nowhere, ints(size), ints(size), self.batch.page_tables(nowhere))
        forward = self.params, self.state.cache, self.state.slots.tokens, inputs
        _, hidden = result_shapes(functools.partial(rowwise.forward, model=model), *forward)
        if one.kind == "rows":
            return [
                rowwise.forward.lower(*forward, None, model=model, edits=()),
                rowwise.row_logits.lower(self._head_params, hidden, model=model),
            ]
        bound = functools.partial(rowwise.row_logits, model=model)
        both = result_shapes(bound, self._head_params, hidden)
        if one.kind == "score":
            options = {"num_logprobs": one.num_logprobs, "num_tokens": self._num_tokens}
            return [rowwise.score_logits.lower(*both, ints(size), **options)]
        assert one.sampling is not None, f"{one} samples"
        spec = SamplingSpec(one.sampling, one.num_logprobs)
        slots, _, drawn, spec = self.sampling(nowhere, ints(size), spec)
        return [rowwise.sample_logits.lower(slots, *both, drawn, spec=spec)]

    def _run(self, tokens: list[_Token]) -> list[Pending]:
        """Computes at most T tokens, samples and scores."""
        both, streams = self._forward(tokens)
        size = len(both[1])
        is_decode = len({token.row.request_id for token in tokens}) == len(tokens)
        if is_decode:
            self.stats.num_decode_calls += 1
            self.stats.num_computed_tokens += size
        else:
            self.stats.count_prefill(len(tokens), size)
        position = ints(size)
        position[: len(tokens)] = [token.position + 1 for token in tokens]
        kinds: dict[SamplingSpec, list[Row | None]] = {}
        for i, token in enumerate(tokens):
            if token.has_sample:
                spec = self._spec_of(token)
                kinds.setdefault(spec, [None] * len(tokens))[i] = token.row
        pending = []
        for spec, rows in kinds.items():
            nowhere = self.batch.num_slots
            slots = [nowhere if row is None else row.slot for row in rows]
            out = self._call_sample(both, self.batch.pad(slots, size), position, spec)
            pending.append(Pending(rows, out, [], None))
        if streams:
            spans = [Span(token.row, token.position, 1) for token in tokens]
            pending.append(Pending([], None, [], None, tapped=Tapped(streams, spans)))
        scores = self._score_rows(both, tokens, size)
        if scores is not None:
            pending.append(Pending([], None, [token.chunk for token in tokens], scores))
        return pending

    def _forward(self, tokens: list[_Token]) -> tuple[tuple[Any, Any], dict[int, Any]]:
        """Caches tokens; returns logits with the logarithms of their mass, and tapped streams."""
        size = self.backend.rows_per_call
        slot = self.batch.pad([token.row.slot for token in tokens], size)
        token_ids, position = ints(size, -1), ints(size)
        for i, (row, place, _) in enumerate(tokens):
            position[i] = place
            if place < len(row.token_ids):
                token_ids[i] = row.token_ids[place]
        inputs = DecodeInputs(slot, token_ids, position, self.batch.page_tables(slot))
        edits, is_on = self.batch.params.activation_edits(slot)
        taps = self.batch.params.taps(slot)
        self.gate.check(Executable("rows", size, functions=layer_functions(edits, taps)))
        args = self.params, self.state.cache, self.state.slots.tokens, inputs, is_on
        options: dict[str, Any] = {"model": self.model, "edits": edits}
        streams: dict[int, Any] = {}
        if taps:
            options |= {"function": rowwise.forward, "taps": taps}
            (cache, hidden), streams = with_taps(*args, **options)
        else:
            cache, hidden = rowwise.forward(*args, **options)
        self.state = self.state._replace(cache=cache)
        return rowwise.row_logits(self._head_params, hidden, model=self.model), streams

    def _spec_of(self, token: _Token) -> SamplingSpec:
        """What this token alone needs of the sampler: its neighbours have samplers of their own."""
        return self._spec(ints(1, token.row.slot), ints((1, 1), token.position + 1))

    def _sample_hidden(
        self, hidden: Any, slots: SlotState, inputs: SampleInputs, spec: SamplingSpec
    ) -> tuple[SlotState, Any]:
        logits, log_mass = hidden
        return rowwise.sample_logits(slots, logits, log_mass, inputs, spec=spec)

    def _score_rows(
        self, both: tuple[Any, Any], tokens: list[_Token], size: int
    ) -> TokenScores | None:
        scored = [token for token in tokens if is_scored(token.row, token.position)]
        if not scored:
            return None
        targets = ints(size)
        for i, token in enumerate(tokens):
            if is_scored(token.row, token.position):
                (targets[i],) = tokens_after(token.chunk)
        wanted = [token.row.request.num_prompt_logprobs or 0 for token in scored]
        num_logprobs = self.shapes.num_alternatives(max(wanted), self.max_logprobs) or 0
        self.gate.check(Executable("score", size, num_logprobs=num_logprobs))
        return rowwise.score_logits(
            *both, targets, num_logprobs=num_logprobs, num_tokens=self._num_tokens
        )
