"""The running requests as host arrays, one slot each: a step's inputs are picked out of them.

A plan tells only what changed, and only that is written; the inputs of a step are then a few
indexing operations, however many requests run.
"""

import bisect
import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from folojax.requests.sampling_params import SamplingRequest
from folojax.requests.user_functions import NO_FUNCTIONS, UserFunctions
from folojax.runner.row_params import RowTable
from folojax.sched.request import Request
from folojax.sched.step_plan import StepPlan
from folojax.steps.state import DecodeInputs, PrefillInputs


@dataclasses.dataclass(eq=False)
class Row:
    """A request of the batch; what changes with every step is in the arrays of `Batch`."""

    request_id: str
    slot: int  # its place in the arrays here and on the device
    request: SamplingRequest  # what it asks for
    token_ids: np.ndarray  # those known when it joined; later ones are sampled on the device
    matcher: Any = None  # behind the last token that the host knows, if it follows a grammar


class Chunk(NamedTuple):
    """At most C tokens of a row; the last chunk of what is known samples."""

    row: Row
    start: int
    end: int
    has_sample: bool


class Batch:
    """Rows by request id, and by slot their page tables, lengths and parameters.

    Attributes:
        num_slots: M.
        num_pages: P, of the pool.
        row_table: What the sampler needs to know of each slot.
        rows: By request id.
        num_computed: By slot, tokens whose K/V are in the cache before the next step.
        num_row_pages: By slot, how many pages it has.
        num_scored_rows: Rows that report log-probabilities of their prompts.
        adapters: By slot, where its adapter lies; L for none.
        num_adapted: Rows that have an adapter.
    """

    def __init__(
        self,
        num_slots: int,
        max_pages: int,
        num_pages: int,
        vocab_size: int,
        functions: UserFunctions = NO_FUNCTIONS,
        num_adapters: int = 0,
    ) -> None:
        """Makes an empty batch.

        Args:
            num_slots: M.
            max_pages: Most pages of one request.
            num_pages: P, of the pool.
            vocab_size: V.
            functions: The user's.
            num_adapters: L, slots of adapters.
        """
        self.num_slots = num_slots
        self.num_pages = num_pages
        self.row_table = RowTable(num_slots, vocab_size, functions)
        self.rows: dict[str, Row] = {}
        self._free_slots = list(range(num_slots))
        # One entry more than slots: what padding rows read.
        size = num_slots + 1
        self.num_computed, self._num_known = ints(size), ints(size)
        self.num_row_pages = ints(size)
        self._no_adapter = num_adapters
        self.adapters = ints(size, num_adapters)
        self._row_at: list[Row | None] = [None] * size
        self._page_table = np.full((size, max_pages), num_pages, np.int32)
        self.num_scored_rows = self.num_adapted = 0

    def update(self, plan: StepPlan) -> list[Row]:
        """Takes in what changed; returns the rows that have joined."""
        for request_id in (*plan.finished_request_ids, *plan.preempted_request_ids):
            if request_id in self.rows:
                self._leave(request_id)
        joined = [self._join(new) for new in plan.new_requests]
        for request_id, page_ids in plan.new_page_ids.items():
            self._add_pages(self.rows[request_id], page_ids)
        return joined

    def clear(self) -> None:
        """Forgets every row."""
        for request_id in list(self.rows):
            self._leave(request_id)

    def check(self, page_ids: Mapping[str, Sequence[int]]) -> None:
        """Raises AssertionError unless the page tables are those of these requests."""
        for request_id, row in self.rows.items():
            count = self.num_row_pages[row.slot]
            table = self._page_table[row.slot]
            assert self._row_at[row.slot] is row, f"slot {row.slot} belongs to two requests"
            assert (table[count:] == self.num_pages).all(), f"{request_id}: pages behind the last"
            wanted = page_ids.get(request_id)
            is_same = wanted is None or table[:count].tolist() == list(wanted)
            assert is_same, f"{request_id} has pages {table[:count].tolist()}, not {wanted}"

    def check_is_empty(self) -> None:
        """Asserts that no request is remembered and every slot is free."""
        assert not self.rows, f"rows are left: {sorted(self.rows)}"
        assert sorted(self._free_slots) == list(range(self.num_slots)), "slots are missing"
        assert (self._page_table == self.num_pages).all(), "page tables are not empty"

    def longest_first(self, request_ids: Iterable[str]) -> list[Row]:
        """Rows by their number of pages: threads that share the work end together then."""
        rows = [self.rows[request_id] for request_id in request_ids]
        num_pages = self.num_row_pages[[row.slot for row in rows]]
        return [rows[i] for i in np.argsort(-num_pages, kind="stable").tolist()]

    def prefill_inputs(self, num_rows: int, columns: int, chunks: Sequence[Chunk]) -> PrefillInputs:
        """Packs chunks into rows of so many columns; rows beyond them are padding."""
        tokens = ints((num_rows, columns))
        start, length = ints(num_rows), ints(num_rows)
        slot = self.pad([chunk.row.slot for chunk in chunks], num_rows)
        for i, chunk in enumerate(chunks):
            start[i], length[i] = chunk.start, chunk.end - chunk.start
            tokens[i, : length[i]] = chunk.row.token_ids[chunk.start : chunk.end]
        return PrefillInputs(tokens, start, length, self._page_table[slot], slot)

    def decode_inputs(
        self, num_rows: int, slots: Sequence[int], positions: Sequence[int] | None = None
    ) -> DecodeInputs:
        """A token of each slot; rows beyond them are padding.

        Args:
            num_rows: B.
            slots: Of the rows, perhaps several of one slot.
            positions: Of their tokens; None: the next one of each.
        """
        slot = self.pad(slots, num_rows)
        token, position = ints(num_rows, -1), self.num_computed[slot]
        if positions is not None:
            position[: len(positions)] = positions
        for i in np.flatnonzero(position < self._num_known[slot]).tolist():
            row = self._row_at[slot[i]]
            assert row is not None, f"slot {slot[i]} is empty"
            token[i] = row.token_ids[position[i]]
        return DecodeInputs(slot, token, position, self._page_table[slot])

    def advance(self, slots: Any, num_tokens: Sequence[int] | int) -> None:
        """Notes that a step computes the next tokens of slots."""
        self.num_computed[slots] += num_tokens

    def set_adapter(self, row: Row, slot: int) -> None:
        """Notes where the adapter of a row lies."""
        self.adapters[row.slot] = slot
        self.num_adapted += 1

    def adapters_of(self, slots: Sequence[int], num_rows: int) -> Any:
        """Where the adapters of slots lie, padded; None where none of them has one."""
        if not self.num_adapted:
            return None
        found = self.adapters[self.pad(slots, num_rows)]
        return found if (found < self._no_adapter).any() else None

    def routing_of(self, chunks: Sequence[Chunk], num_rows: int, columns: int) -> Any:
        """The experts that the tokens of chunks are to be sent to, padded; None where none are."""
        given = [chunk.row.request.routing for chunk in chunks]
        sizes = next((one.shape[1:] for one in given if one is not None), None)
        if sizes is None:
            return None
        found = ints((num_rows, columns, *sizes), -1)
        for i, (chunk, one) in enumerate(zip(chunks, given, strict=True)):
            if one is not None:
                found[i, : chunk.end - chunk.start] = one[chunk.start : chunk.end]
        return found

    def matchers(self, slots: Iterable[int]) -> list[Any]:
        """Of slots, M included; None where there is no grammar."""
        rows = (self._row_at[slot] for slot in slots)
        return [None if row is None else row.matcher for row in rows]

    def pad(self, slots: Sequence[int], count: int) -> Any:
        """Slots as an array of `count` entries; M is padding."""
        slot = ints(count, self.num_slots)
        slot[: len(slots)] = slots
        return slot

    def _join(self, new: Request) -> Row:
        assert isinstance(new, SamplingRequest), f"{new.request_id} says nothing of sampling"
        row = Row(
            request_id=new.request_id,
            slot=heapq.heappop(self._free_slots),
            request=new,
            token_ids=np.array(new.token_ids, np.int32),
            matcher=new.grammar and new.grammar.start(new.output_token_ids),
        )
        self.row_table.put(row.slot, new)
        self.num_scored_rows += new.num_prompt_logprobs is not None
        self.rows[new.request_id] = self._row_at[row.slot] = row
        self.num_computed[row.slot] = new.num_computed_tokens
        self._num_known[row.slot] = len(row.token_ids)
        self._add_pages(row, new.page_ids)
        return row

    def _add_pages(self, row: Row, page_ids: Sequence[int]) -> None:
        first = self.num_row_pages[row.slot]
        self.num_row_pages[row.slot] = last = first + len(page_ids)
        self._page_table[row.slot, first:last] = page_ids

    def _leave(self, request_id: str) -> None:
        row = self.rows.pop(request_id)
        self.num_scored_rows -= row.request.num_prompt_logprobs is not None
        self._page_table[row.slot] = self.num_pages
        if self.adapters[row.slot] < self._no_adapter:
            self.adapters[row.slot] = self._no_adapter
            self.num_adapted -= 1
        for array in (self.num_computed, self._num_known, self.num_row_pages):
            array[row.slot] = 0
        self._row_at[row.slot] = None
        heapq.heappush(self._free_slots, row.slot)


def ints(shape: int | tuple[int, ...], value: int = 0) -> Any:
    """An int32 array full of a value. Any: a jitted function takes NumPy arrays for JAX ones."""
    return np.full(shape, value, np.int32)


def round_up(value: int, sizes: tuple[int, ...]) -> int:
    """The first of the ascending `sizes` that is not below `value`.

    >>> round_up(5, (1, 4, 8))
    8
    """
    assert value <= sizes[-1], f"{value} is beyond the largest size {sizes[-1]}"
    return sizes[bisect.bisect_left(sizes, value)]
