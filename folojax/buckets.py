"""Which shapes exist: every executable an engine may need is listed here, before it is paid for.

A step's arrays are padded up to the next size of each axis. Few sizes mean few executables, many
sizes mean little padding.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator

from folojax.config import ResolvedConfig
from folojax.kv_cache import split_segments
from folojax.sched.pages import pages_for

_SLOT_MULTIPLE = 32

_USUAL_LOGPROBS = 20
"""J where nobody wants more, also in an engine that allows the whole vocabulary."""

# A chunk copies the pages of its request: on CPU, calls that copy more than some 15 MB a layer lose
# more to fresh memory than they gain by more rows. Also fewer shapes to compile.
_MOST_COPIED_TOKENS_ON_CPU = 10_240


_FIRST_HALVED_ROWS, _FIRST_QUARTERED_ROWS = 4, 16
"""B from which a CPU's sizes are a half, and a quarter of a power of two apart: below that a row
more takes no longer."""


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """`rows` rows of `columns` tokens, each with a table of `table_pages` pages.

    All pages lie in the first `segments` cache segments.
    """

    rows: int
    columns: int
    table_pages: int
    segments: int


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """`rows` rows with tables of `table_pages` pages, in the first `segments` cache segments.

    Pages with several owners fill up to `shared_items` work items of `shared_lanes` owners.
    """

    rows: int
    segments: int
    table_pages: int
    shared_items: int = 0
    shared_lanes: int = 0


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes of each axis, ascending.

    Attributes:
        decode_rows: B, up to max_num_seqs.
        prefill_rows: R; rows beyond the largest go into further calls.
        shared_rows: B of decode calls in which pages have several owners; none where such pages
            are nothing special.
        prefill_columns: C.
        prefill_pages: N of a prefill row, up to the pages of max_model_len.
        prefill_segments: How many segments a prefill call may be handed.
        decode_pages: N of a decode row, likewise; coarser, as only partial sums are gathered.
        segments: Pages of each cache segment (`kv_cache.split_segments`).
        shared_lanes: Q, owners of a work item of shared pages. Their number X is 0 where no page
            is shared, else two a row, which holds a long prefix that all rows have in common;
            beyond that it grows by powers of 4, which are not listed.
        most_copied_pages: R * N of a prefill call with more than one row; None is no limit.
    """

    decode_rows: tuple[int, ...]
    prefill_rows: tuple[int, ...]
    prefill_columns: int
    prefill_pages: tuple[int, ...]
    prefill_segments: tuple[int, ...]
    decode_pages: tuple[int, ...]
    segments: tuple[int, ...]
    shared_rows: tuple[int, ...]
    shared_lanes: int = 8
    most_copied_pages: int | None = None

    def most_prefill_rows(self, num_pages: int) -> int:
        """How many rows a prefill call may have if its longest request has `num_pages` pages."""
        if self.most_copied_pages is None:
            return self.prefill_rows[-1]
        fitting = self.most_copied_pages // round_up(num_pages, self.prefill_pages)
        return max(
            (rows for rows in self.prefill_rows if rows <= fitting), default=self.prefill_rows[0]
        )

    def prefill_shape(self, num_rows: int, extent: int, num_pages: int) -> PrefillShape:
        """The smallest shape for so many rows of at most `num_pages` pages, ids below `extent`."""
        return PrefillShape(
            rows=round_up(num_rows, self.prefill_rows),
            columns=self.prefill_columns,
            table_pages=round_up(num_pages, self.prefill_pages),
            segments=round_up(self._segments_for(extent), self.prefill_segments),
        )

    def decode_shape(
        self, num_rows: int, extent: int, num_pages: int, shared_items: int = 0
    ) -> DecodeShape:
        """The smallest shape for so many rows of at most `num_pages` pages, ids below `extent`."""
        rows = round_up(num_rows, self.shared_rows if shared_items else self.decode_rows)
        listed = _listed_items(rows)
        return DecodeShape(
            rows=rows,
            segments=self._segments_for(extent),
            table_pages=round_up(num_pages, self.decode_pages),
            shared_items=_at_least(shared_items, listed, 4) if shared_items else 0,
            shared_lanes=self.shared_lanes if shared_items else 0,
        )

    def shapes(self) -> Iterator[PrefillShape | DecodeShape]:
        """Every shape that a step can have, steps that share exceptionally many pages aside."""
        extents = tuple(itertools.accumulate(self.segments))
        for rows, segments in itertools.product(self.prefill_rows, self.prefill_segments):
            for fewer_pages, pages in _with_previous(self.prefill_pages):
                if rows <= self.most_prefill_rows(pages) and extents[segments - 1] > fewer_pages:
                    yield PrefillShape(rows, self.prefill_columns, pages, segments)
        for is_shared, sizes in ((False, self.decode_rows), (True, self.shared_rows)):
            for (fewer_rows, rows), (fewer_pages, pages) in itertools.product(
                _with_previous(sizes), _with_previous(self.decode_pages)
            ):
                for segments, extent in enumerate(extents, start=1):
                    # More than `fewer_rows` rows, each with a page of its own, and one with more
                    # than `fewer_pages`: a smaller cache cannot hold them.
                    if extent <= fewer_rows + fewer_pages:
                        continue
                    if not is_shared:
                        yield DecodeShape(rows, segments, pages)
                    elif rows > 1:
                        items = _listed_items(rows)
                        yield DecodeShape(rows, segments, pages, items, self.shared_lanes)

    def _segments_for(self, extent: int) -> int:
        return 1 + bisect.bisect_left(tuple(itertools.accumulate(self.segments)), extent)


def make_buckets(
    config: ResolvedConfig,
    backend: str = "cpu",
    min_decode_rows: int = 1,
    *,
    is_in_place: bool = False,
) -> Buckets:
    """Buckets of an engine.

    Args:
        config: Its limits.
        backend: JAX's name of the platform. A CPU pays for every padded row; a GPU's step is bound
            by the bytes of weights and pages, and an executable takes it 10 s or more to compile:
            so it has fewer sizes of everything but segments.
        min_decode_rows: Smallest B; 2 where products with a single row are slow.
        is_in_place: Chunks read pages where they lie (`native_attention`), as single tokens do:
            one size of tables will do, as only pages with tokens are read.
    """
    most_rows = pages_for(config.max_num_batched_tokens, config.prefill_row_len)
    max_pages = pages_for(config.max_model_len, config.page_size)
    if backend == "cpu":
        decode_rows = _powers(config.max_num_seqs, 2, min_decode_rows)
        return Buckets(
            # A batch that runs dry spends half of its steps between two powers of two.
            decode_rows=_with_parts(decode_rows, _FIRST_HALVED_ROWS, _FIRST_QUARTERED_ROWS),
            prefill_rows=_powers(most_rows, 2),
            prefill_columns=config.prefill_row_len,
            prefill_pages=(max_pages,) if is_in_place else _table_sizes(max_pages, 2),
            # A step reads as many pages as its rows have, whatever it was compiled for, and shared
            # ones again for every row (`row_attention`).
            prefill_segments=(1,),
            decode_pages=(max_pages,),
            segments=(config.num_pages,),
            shared_rows=(),
            most_copied_pages=(
                None if is_in_place else _MOST_COPIED_TOKENS_ON_CPU // config.page_size
            ),
        )
    segments = split_segments(config.num_pages, head=(128, 384))
    decode_rows = _powers(config.max_num_seqs, 8, min(8, config.max_num_seqs))
    return Buckets(
        decode_rows=decode_rows,
        prefill_rows=_powers(most_rows, 4, min(8, most_rows)),
        prefill_columns=config.prefill_row_len,
        prefill_pages=_table_sizes(max_pages, 8),
        # A chunk copies its pages out of every segment it is handed: not always all of them.
        prefill_segments=(*range(4, len(segments), 4), len(segments)),
        decode_pages=_table_sizes(max_pages, 16),
        segments=segments,
        shared_rows=decode_rows,
    )


def num_alternatives(wanted: int | None, most: int) -> int | None:
    """J, where so many are wanted of at most `most`; None is no log-probabilities at all.

    One size for nearly all who want any, so that one executable serves them.
    """
    if wanted is None:
        return None
    if wanted > _USUAL_LOGPROBS:
        return most
    return min(_USUAL_LOGPROBS, most) if wanted > 0 else 0


def slots_for(max_num_seqs: int) -> int:
    """M: rounded up, so that engines with other limits share their executables.

    >>> slots_for(33)
    64
    """
    return -(-max_num_seqs // _SLOT_MULTIPLE) * _SLOT_MULTIPLE


def round_up(value: int, sizes: tuple[int, ...]) -> int:
    """The first of the ascending `sizes` that is not below `value`.

    >>> round_up(5, (1, 4, 8))
    8
    """
    assert value <= sizes[-1], f"{value} is beyond the largest bucket {sizes[-1]}"
    return sizes[bisect.bisect_left(sizes, value)]


def _listed_items(rows: int) -> int:
    return max(16, 2 * rows)


def _at_least(value: int, first: int, factor: int) -> int:
    """`first`, times `factor` as often as it takes not to be below `value`."""
    while first < value:
        first *= factor
    return first


def _with_previous(sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Each size with the one before it, 0 before the first."""
    return zip((0, *sizes), sizes, strict=False)


def _table_sizes(last: int, first: int) -> tuple[int, ...]:
    """`first`, times 4, ... up to `last`; a size that `last` exceeds by no more is left out.

    >>> _table_sizes(34, 8)
    (8, 34)
    >>> _table_sizes(10, 8)
    (10,)
    """
    sizes = _powers(last, 4, min(first, last))
    return tuple(size for size in sizes if size == last or last > 4 / 3 * size)


def _with_parts(sizes: tuple[int, ...], first_halved: int, first_quartered: int) -> tuple[int, ...]:
    """Ascending sizes, from one on also those half-way between two, from another on quarters.

    >>> _with_parts((1, 2, 4, 8, 16, 32), first_halved=4, first_quartered=16)
    (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
    """
    found = set(sizes)
    for low, high in itertools.pairwise(sizes):
        count = 4 if low >= first_quartered else 2 if low >= first_halved else 1
        found |= {low + (high - low) * part // count for part in range(1, count)}
    return tuple(sorted(found))


def _powers(last: int, factor: int, first: int = 1) -> tuple[int, ...]:
    """`first`, times `factor`, ... up to `last`, which is always there (or `first`, if larger)."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] * factor, last))
    return tuple(sizes)
