"""The compile plan: every shape a step can ask for is listed, and none is too small."""

import dataclasses
import itertools
from typing import Any

import pytest
from folojax.buckets import Buckets, DecodeShape, PrefillShape, make_buckets, round_up
from hypothesis import given, settings
from hypothesis import strategies as st

from folojax.config import EngineConfig, ResolvedConfig
from folojax.sched.pages import pages_for


def resolve(**fields: Any) -> ResolvedConfig:
    return EngineConfig(**fields).resolve(max_position=100_000)


CONFIGS = st.builds(
    lambda seqs, more, row_len, model_len, page_size, pages: resolve(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + more,
        prefill_row_len=row_len,
        max_model_len=model_len,
        page_size=page_size,
        num_pages=pages,
    ),
    st.integers(1, 40),
    st.integers(0, 200),
    st.integers(1, 40),
    st.integers(2, 600),
    st.integers(1, 64),
    st.integers(1, 400),
)


@settings(deadline=None)  # a busy machine is no failure
@given(config=CONFIGS, min_rows=st.sampled_from([1, 2]), backend=st.sampled_from(["cpu", "gpu"]))
def test_every_step_has_a_listed_shape_that_holds_it(
    config: ResolvedConfig, min_rows: int, backend: str
) -> None:
    buckets = make_buckets(config, backend, min_rows)
    shapes = set(buckets.shapes())

    most_pages = pages_for(config.max_model_len, config.page_size)
    for rows in range(1, config.max_num_seqs + 1):
        for extent in range(rows, config.num_pages + 1):  # a row has a page of its own at least
            # The longest row: the other rows have a page each.
            longest = min(extent - rows + 1, most_pages)
            decode = buckets.decode_shape(rows, extent, longest)
            assert decode in shapes
            assert decode.table_pages >= longest
            assert decode.rows >= (max(rows, min_rows) if backend == "cpu" else rows)
            assert sum(buckets.segments[: decode.segments]) >= extent
            assert sum(buckets.segments[: decode.segments - 1]) < extent
            if rows > 1 and backend == "gpu":
                shared = buckets.decode_shape(rows, extent, longest, shared_items=1)
                assert shared in shapes
                assert shared.rows >= decode.rows
                assert (shared.table_pages, shared.segments) == (
                    decode.table_pages,
                    decode.segments,
                )

    for rows, pages, extent in itertools.product(
        range(1, buckets.prefill_rows[-1] + 1),
        range(1, most_pages + 1),
        itertools.accumulate(buckets.segments),
    ):
        if pages > extent or rows > buckets.most_prefill_rows(pages):
            continue
        prefill = buckets.prefill_shape(rows, extent, pages)
        assert prefill in shapes
        assert sum(buckets.segments[: prefill.segments]) >= extent
        assert prefill.columns == config.prefill_row_len
        assert prefill.rows >= rows
        assert prefill.table_pages >= pages


@given(config=CONFIGS)
def test_sizes_ascend_to_their_limits_and_no_further(config: ResolvedConfig) -> None:
    buckets = make_buckets(config)
    for sizes in (
        buckets.decode_rows,
        buckets.prefill_rows,
        buckets.decode_pages,
        buckets.prefill_pages,
    ):
        assert list(sizes) == sorted(set(sizes))
    assert buckets.decode_rows[-1] == config.max_num_seqs
    most_pages = pages_for(config.max_model_len, config.page_size)
    assert buckets.decode_pages[-1] == buckets.prefill_pages[-1] == most_pages
    assert sum(buckets.segments) == config.num_pages
    # The whole budget, spent on one prompt, fits into one call.
    room = buckets.prefill_rows[-1] * buckets.prefill_columns
    assert room >= config.max_num_batched_tokens


@given(config=CONFIGS)
def test_a_large_batch_is_never_padded_by_more_than_half(config: ResolvedConfig) -> None:
    sizes = make_buckets(config).decode_rows
    for rows in range(5, config.max_num_seqs + 1):
        assert round_up(rows, sizes) <= 1.5 * rows


@given(config=CONFIGS)
def test_no_shape_is_listed_twice_and_there_are_few(config: ResolvedConfig) -> None:
    shapes = list(make_buckets(config).shapes())
    assert len(shapes) == len(set(shapes)) < 500


def test_the_plan_of_a_small_engine() -> None:
    buckets = make_buckets(
        resolve(
            max_num_seqs=5,
            max_num_batched_tokens=33,
            prefill_row_len=16,
            max_model_len=160,
            page_size=16,
            num_pages=20,
        )
    )
    assert buckets == Buckets(
        decode_rows=(1, 2, 4, 5),
        prefill_rows=(1, 2, 3),
        prefill_columns=16,
        prefill_pages=(2, 10),
        prefill_segments=(1,),
        decode_pages=(10,),
        segments=(20,),
        shared_rows=(),
        most_copied_pages=640,
    )
    assert buckets.decode_shape(3, 8, 2) == DecodeShape(rows=4, segments=1, table_pages=10)
    assert buckets.prefill_shape(2, 7, 3) == PrefillShape(2, 16, table_pages=10, segments=1)
    assert buckets.prefill_shape(3, 17, 1) == PrefillShape(3, 16, table_pages=2, segments=1)


def test_where_pages_are_read_in_place_a_prefill_shape_is_a_number_of_rows() -> None:
    config = resolve(max_num_seqs=32, max_model_len=4096, num_pages=2000)
    buckets = make_buckets(config, is_in_place=True)
    found = [shape for shape in buckets.shapes() if isinstance(shape, PrefillShape)]
    assert [shape.rows for shape in found] == list(buckets.prefill_rows)
    assert buckets.most_prefill_rows(buckets.prefill_pages[-1]) == buckets.prefill_rows[-1]


def test_a_decode_shape_of_a_cpu_is_a_number_of_rows() -> None:
    """Its steps read as many pages as rows have, shared or not, and need no shapes for that."""
    buckets = make_buckets(resolve(max_num_seqs=32, max_model_len=4096, num_pages=2000))
    found = [shape for shape in buckets.shapes() if isinstance(shape, DecodeShape)]
    assert [shape.rows for shape in found] == list(buckets.decode_rows)


def test_more_rows_than_pages_of_a_segment_need_more_segments() -> None:
    """A hundred rows have a hundred pages, so no step of theirs can do with thirty."""
    buckets = make_buckets(resolve(max_num_seqs=200, num_pages=1500), "gpu")
    buckets = dataclasses.replace(buckets, segments=(30, 1470), prefill_segments=(2,))
    shapes = set(buckets.shapes())
    pages = buckets.decode_pages[0]
    assert DecodeShape(8, 1, pages) in shapes
    assert DecodeShape(64, 1, pages) in shapes  # 9 rows may be
    assert DecodeShape(200, 1, pages) not in shapes
    assert DecodeShape(200, 2, pages) in shapes


@pytest.mark.parametrize(("value", "expected"), [(0, 1), (1, 1), (2, 4), (4, 4), (5, 8), (8, 8)])
def test_round_up(value: int, expected: int) -> None:
    assert round_up(value, (1, 4, 8)) == expected


def test_rounding_up_beyond_the_largest_is_our_own_error() -> None:
    with pytest.raises(AssertionError, match="9 is beyond the largest bucket 8"):
        round_up(9, (1, 4, 8))


def test_a_gpu_has_fewer_and_larger_sizes() -> None:
    buckets = make_buckets(resolve(max_num_seqs=200, num_pages=1500), "gpu")
    assert buckets.decode_rows == (8, 64, 200)
    assert buckets.segments == (128, 384, 512, 476)
