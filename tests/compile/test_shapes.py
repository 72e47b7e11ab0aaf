"""The compile plan: every shape a step can ask for is listed, and none is too small."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folojax.backend.backend import CPU, GPU, Backend
from folojax.compile.shapes import Shapes
from folojax.config import EngineConfig, ResolvedConfig
from folojax.runner.batch import round_up
from folojax.sampling.sampler import SamplingClass
from folojax.sched.pages import pages_for

BACKENDS = st.sampled_from([CPU, GPU])
DTYPES = st.sampled_from(["float32", "bfloat16"])


def resolve(backend: Backend = CPU, **fields: Any) -> ResolvedConfig:
    return EngineConfig(**fields).resolve(100_000, backend)


CONFIGS = st.builds(
    lambda seqs, more, row_len, model_len, page_size, pages: resolve(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + more,
        prefill_row_len=row_len,
        max_model_len=model_len,
        page_size=page_size,
        num_pages=pages,
    ),
    st.integers(1, 300),
    st.integers(0, 200),
    st.integers(1, 40),
    st.integers(2, 600),
    st.integers(1, 64),
    st.integers(1, 400),
)


@settings(deadline=None)  # a busy machine is no failure
@given(config=CONFIGS, dtype=DTYPES, backend=BACKENDS)
def test_every_step_has_a_listed_shape_that_holds_it(
    config: ResolvedConfig, dtype: str, backend: Backend
) -> None:
    shapes = backend.shapes(config, dtype)
    for rows in range(1, config.max_num_seqs + 1):
        decode = round_up(rows, shapes.decode_rows)
        assert decode in shapes.decode_rows
        assert decode >= rows
        sampled = round_up(rows, shapes.sampled_rows)
        assert sampled in shapes.sampled_rows
        assert sampled >= rows
        if backend is CPU and dtype == "bfloat16":
            assert decode >= 2
    assert shapes.prefill_columns == config.prefill_row_len
    for rows in range(1, shapes.prefill_rows[-1] + 1):
        prefill = round_up(rows, shapes.prefill_rows)
        assert prefill in shapes.prefill_rows
        assert prefill >= rows


@given(config=CONFIGS, backend=BACKENDS)
def test_sizes_ascend_to_their_limits_and_no_further(
    config: ResolvedConfig, backend: Backend
) -> None:
    shapes = backend.shapes(config, "float32")
    for sizes in (shapes.decode_rows, shapes.sampled_rows, shapes.prefill_rows):
        assert list(sizes) == sorted(set(sizes))
    assert shapes.decode_rows[-1] == shapes.sampled_rows[-1] == config.max_num_seqs
    assert shapes.table_pages == pages_for(config.max_model_len, config.page_size)
    # The whole budget, spent on one prompt, fits into one call.
    assert shapes.prefill_rows[-1] * shapes.prefill_columns >= config.max_num_batched_tokens


@given(config=CONFIGS)
def test_a_large_batch_is_never_padded_by_more_than_half(config: ResolvedConfig) -> None:
    sizes = CPU.shapes(config, "float32").decode_rows
    for rows in range(5, config.max_num_seqs + 1):
        assert round_up(rows, sizes) <= 1.5 * rows


@given(config=CONFIGS)
def test_a_large_batch_of_a_gpu_is_padded_by_less(config: ResolvedConfig) -> None:
    """Up to 64 rows a step takes no longer for rows of padding."""
    sizes = GPU.shapes(config, "bfloat16").decode_rows
    for rows in range(65, config.max_num_seqs + 1):
        assert round_up(rows, sizes) <= 1.5 * rows


@given(config=CONFIGS, backend=BACKENDS)
def test_no_shape_is_listed_twice_and_there_are_few(
    config: ResolvedConfig, backend: Backend
) -> None:
    shapes = backend.shapes(config, "float32")
    for sizes in (shapes.prefill_rows, shapes.decode_rows, shapes.sampled_rows):
        assert list(sizes) == sorted(set(sizes))
    assert len(shapes.prefill_rows) + len(shapes.decode_rows) < 50


@given(config=CONFIGS, backend=BACKENDS, num_pages=st.integers(1, 10_000))
def test_no_shape_depends_on_the_size_of_the_pool(
    config: ResolvedConfig, backend: Backend, num_pages: int
) -> None:
    other = ResolvedConfig(**vars(config) | {"num_pages": num_pages})
    assert backend.shapes(other, "float32") == backend.shapes(config, "float32")


def test_the_plan_of_a_small_engine() -> None:
    config = resolve(
        max_num_seqs=5,
        max_num_batched_tokens=33,
        prefill_row_len=16,
        max_model_len=160,
        page_size=16,
        num_pages=20,
    )
    shapes = CPU.shapes(config, "float32")
    assert shapes == Shapes(
        decode_rows=(1, 2, 4, 5),
        sampled_rows=(1, 2, 4, 5),
        prefill_rows=(1, 2, 3),
        prefill_columns=16,
        table_pages=10,
        is_coarse=False,
    )
    assert round_up(3, shapes.decode_rows) == 4
    assert CPU.shapes(config, "bfloat16").decode_rows == (2, 4, 5)


def test_a_gpu_has_fewer_and_larger_sizes() -> None:
    shapes = GPU.shapes(resolve(GPU, num_pages=1500), "bfloat16")
    assert shapes == Shapes(
        decode_rows=(1, 8, 32, 64, 96, 128, 160, 192, 224, 256),
        sampled_rows=(8, 32, 64, 128, 256),
        prefill_rows=(1, 8, 32, 48),
        prefill_columns=128,
        table_pages=1563,
        is_coarse=True,
        prefill_tokens=4096,
    )


def test_one_size_serves_nearly_all_who_want_log_probabilities() -> None:
    shapes = CPU.shapes(resolve(), "float32")
    coarse = GPU.shapes(resolve(GPU), "bfloat16")
    for one in (shapes, coarse):
        assert one.num_alternatives(None, 20) is None
        assert one.num_alternatives(1, 20) == one.num_alternatives(20, 20) == 20
        assert one.num_alternatives(3, 5) == 5
        assert one.num_alternatives(3, 128) == 20
        assert one.num_alternatives(21, 128) == 128
    assert shapes.num_alternatives(0, 20) == 0
    assert coarse.num_alternatives(0, 20) == 20
    assert coarse.num_alternatives(0, 0) == 0


def test_coarse_shapes_run_a_plain_draw_as_one_that_cuts_nothing() -> None:
    shapes = CPU.shapes(resolve(), "float32")
    coarse = GPU.shapes(resolve(GPU), "bfloat16")
    for needed in SamplingClass:
        assert shapes.sampling_class(needed) is needed
        is_plain = needed is SamplingClass.RANDOM
        assert coarse.sampling_class(needed) is (SamplingClass.TRUNCATED if is_plain else needed)


@pytest.mark.parametrize(("value", "expected"), [(0, 1), (1, 1), (2, 4), (4, 4), (5, 8), (8, 8)])
def test_round_up(value: int, expected: int) -> None:
    assert round_up(value, (1, 4, 8)) == expected


def test_rounding_up_beyond_the_largest_is_our_own_error() -> None:
    with pytest.raises(AssertionError, match="9 is beyond the largest size 8"):
        round_up(9, (1, 4, 8))
