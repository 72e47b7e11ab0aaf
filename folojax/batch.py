"""The running requests as host arrays, one slot each: a step's inputs are picked out of them.

A plan tells only what changed, and only that is written; the inputs of a step are then a few
indexing operations, however many requests run.
"""

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from folojax.buckets import DecodeShape, PrefillShape
from folojax.row_params import RowParams, RowTable
from folojax.sched.plan import NewRequest, SchedulerOutput
from folojax.state import DecodeInputs, PrefillInputs, SharedPages


@dataclasses.dataclass(eq=False)
class Row:
    """A request of the batch.

    Attributes:
        request_id: Its id.
        slot: Its place in the arrays here and on the device.
        params: As they came with the request.
        token_ids: Those that were known when it joined; later ones are sampled on the device.
        num_prompt_tokens: How many of them are its prompt.
        num_computed_tokens: Tokens whose K/V are in the cache before the step.
        num_pages: How many pages it has.
        extent: One more than its highest page.
    """

    request_id: str
    slot: int
    params: RowParams
    token_ids: np.ndarray
    num_prompt_tokens: int
    num_computed_tokens: int
    num_pages: int = 0
    extent: int = 0


class Chunk(NamedTuple):
    """At most C tokens of a row; the last chunk of what is known samples."""

    row: Row
    start: int
    end: int
    has_sample: bool


class Batch:
    """Rows by request id, and their page tables and parameters by slot."""

    def __init__(self, num_slots: int, max_pages: int, num_pages: int, vocab_size: int) -> None:
        """Makes an empty batch.

        Args:
            num_slots: M.
            max_pages: Most pages of one request.
            num_pages: P, of the pool.
            vocab_size: V.
        """
        self.num_slots = num_slots
        self.num_pages = num_pages
        self.params = RowTable(num_slots, vocab_size)
        self.rows: dict[str, Row] = {}
        self._free_slots = list(range(num_slots))
        # One entry more than slots: what padding rows read.
        self._page_table = np.full((num_slots + 1, max_pages), num_pages, np.int32)
        self._num_owners = np.zeros(num_pages + 1, np.int32)

    def update(self, plan: SchedulerOutput) -> list[Row]:
        """Takes in what changed; returns the rows that have joined."""
        for request_id in (*plan.finished_request_ids, *plan.preempted_request_ids):
            if request_id in self.rows:
                self._leave(request_id)
        joined = [self._join(new) for new in plan.new_requests]
        cached = plan.cached_requests
        for request_id, num_computed, new_pages in zip(
            cached.request_ids, cached.num_computed_tokens, cached.new_page_ids, strict=True
        ):
            row = self.rows[request_id]
            row.num_computed_tokens = num_computed
            if new_pages:
                self._add_pages(row, new_pages)
        return joined

    def clear(self) -> None:
        """Forgets every row."""
        for request_id in list(self.rows):
            self._leave(request_id)

    def check_is_empty(self) -> None:
        """Asserts that no request is remembered and every slot is free."""
        assert not self.rows, f"rows are left: {sorted(self.rows)}"
        assert sorted(self._free_slots) == list(range(self.num_slots)), "slots are missing"
        assert not self._num_owners.any(), "pages have owners"
        assert (self._page_table == self.num_pages).all(), "page tables are not empty"

    def prefill_inputs(self, shape: PrefillShape, chunks: Sequence[Chunk]) -> PrefillInputs:
        """Packs chunks into the rows of a shape."""
        tokens = ints((shape.rows, shape.columns))
        start, length = ints(shape.rows), ints(shape.rows)
        slot = self.slots([chunk.row for chunk in chunks], shape.rows)
        for i, chunk in enumerate(chunks):
            start[i], length[i] = chunk.start, chunk.end - chunk.start
            tokens[i, : length[i]] = chunk.row.token_ids[chunk.start : chunk.end]
        return PrefillInputs(tokens, start, length, self._table(slot, shape.table_pages))

    def decode_inputs(
        self, shape: DecodeShape, rows: Sequence[Row], positions: Sequence[int]
    ) -> DecodeInputs:
        """Packs rows into a shape; each computes its token at a position."""
        slot = self.slots(rows, shape.rows)
        token, position = ints(shape.rows, -1), ints(shape.rows)
        position[: len(rows)] = positions
        for i, row in enumerate(rows):
            if positions[i] < len(row.token_ids):
                token[i] = row.token_ids[positions[i]]
        table = self._table(slot, shape.table_pages)
        shared = self._shared_pages(table, shape) if shape.shared_items else None
        return DecodeInputs(slot, token, position, table, shared)

    def slots(self, rows: Sequence[Row | None], count: int) -> Any:
        """Slots of rows, padded to `count` entries; None is padding too."""
        slot = ints(count, self.num_slots)
        for i, row in enumerate(rows):
            if row is not None:
                slot[i] = row.slot
        return slot

    def num_shared_items(self, rows: Sequence[Row], lanes: int) -> int:
        """How many work items of `lanes` owners the pages with several owners need."""
        if (self._num_owners[:-1] < 2).all():
            return 0
        longest = max(row.num_pages for row in rows)
        table = self._table(self.slots(rows, len(rows)), longest)
        counts = np.bincount(table.ravel(), minlength=self.num_pages + 1)[: self.num_pages]
        return int((-(-np.maximum(counts - 1, 0) // lanes)).sum())

    def _shared_pages(self, table: np.ndarray, shape: DecodeShape) -> SharedPages:
        """Groups the entries of a page behind its first one into items of Q lanes."""
        rows, lanes = len(table), shape.shared_lanes
        flat = table.ravel()
        order = np.argsort(flat, kind="stable")  # by page, then by row
        pages = flat[order]
        is_start = np.append(True, pages[1:] != pages[:-1])
        start = np.maximum.accumulate(np.where(is_start, np.arange(len(pages)), 0))
        place = np.arange(len(pages)) - start - 1  # among the page's further owners, from 0
        is_further = (place >= 0) & (pages < self.num_pages)
        begins_item = is_further & (place % lanes == 0)
        item = np.cumsum(begins_item) - 1
        lane = ints(flat.shape[0], -1)
        lane[order[is_further]] = (item * lanes + place % lanes)[is_further]
        page: Any = ints(shape.shared_items, self.num_pages)
        page[: begins_item.sum()] = pages[begins_item]
        owner = ints(shape.shared_items * lanes, rows)
        owner[lane[order[is_further]]] = order[is_further] // table.shape[1]
        return SharedPages(page, owner.reshape(-1, lanes), lane.reshape(table.shape))

    def _table(self, slot: np.ndarray, num_pages: int) -> Any:
        return self._page_table[slot, :num_pages]

    def _join(self, new: NewRequest) -> Row:
        assert isinstance(new.params, RowParams), f"{new.request_id} has no row parameters"
        row = Row(
            request_id=new.request_id,
            slot=heapq.heappop(self._free_slots),
            params=new.params,
            token_ids=np.array(new.prompt_token_ids + new.output_token_ids, np.int32),
            num_prompt_tokens=len(new.prompt_token_ids),
            num_computed_tokens=new.num_computed_tokens,
        )
        self.params.put(row.slot, new.params)
        self.rows[new.request_id] = row
        self._add_pages(row, new.page_ids)
        return row

    def _add_pages(self, row: Row, page_ids: Sequence[int]) -> None:
        first, row.num_pages = row.num_pages, row.num_pages + len(page_ids)
        self._page_table[row.slot, first : row.num_pages] = page_ids
        self._num_owners[list(page_ids)] += 1
        row.extent = max(row.extent, 1 + max(page_ids, default=-1))

    def _leave(self, request_id: str) -> None:
        row = self.rows.pop(request_id)
        self._num_owners[self._page_table[row.slot, : row.num_pages]] -= 1
        self._page_table[row.slot] = self.num_pages
        heapq.heappush(self._free_slots, row.slot)


def ints(shape: int | tuple[int, ...], value: int = 0) -> Any:
    """An array for the device. Any: a jitted function takes NumPy arrays for JAX ones."""
    return np.full(shape, value, np.int32)
