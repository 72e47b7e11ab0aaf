"""The plan of a device's memory: the arithmetic, and the arithmetic against what is there."""

import dataclasses
import logging
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from folojax import LLM, EngineConfig
from folojax.backend.backend import CPU, GPU, Backend
from folojax.backend.device_memory import device_memory
from folojax.backend.devices import Devices
from folojax.compile.memory_plan import DeviceMemory, MemoryPlan, plan_fraction, plan_pages
from folojax.engine import build
from folojax.runner import temporaries as step_memory
from folojax.runner.padding import compile_on_padding, padding
from folojax.runner.setup import Setup
from folojax.sampling.logit_edits import init_edits
from folojax.sampling.sampler import SamplingClass
from folojax.sched.pages import pages_for
from folojax.steps.executables import Executable

LEAST = MemoryPlan(
    weights_bytes=1_000_000,
    slots_bytes=1_000,
    bytes_per_page=10_000,
    num_pages=4,
    page_size=16,
    max_model_len=64,
    temporaries_bytes=900_000,  # generous: nobody has compiled anything
    is_measured=False,
    device=DeviceMemory(limit_bytes=4_000_000),
)
OPTIONS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "page_size": 16,
}
NUM_PAGES = 48


def with_device(plan: MemoryPlan, limit: int, used: int = 0) -> MemoryPlan:
    device = DeviceMemory(limit_bytes=limit, used_bytes=used)
    return dataclasses.replace(plan, device=device)


def never(num_pages: int) -> int:
    raise AssertionError("nothing is to be compiled for that")


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("fraction", [0.4, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("used", [0, 1_500_000])
@pytest.mark.parametrize(("fixed", "per_page"), [(0, 0), (300_000, 0), (1_000, 900)])
def test_a_fraction_is_filled_and_never_exceeded(
    fraction: float, used: int, fixed: int, per_page: int
) -> None:
    def measure(num_pages: int) -> int:
        return fixed + per_page * num_pages

    least = with_device(LEAST, 10_000_000, used)
    available = int(fraction * 10_000_000) - used  # what others hold is in the fraction
    plan = plan_fraction(least, measure, fraction)
    assert plan.is_measured
    assert plan.num_pages >= LEAST.num_pages
    assert plan.needed_bytes <= available
    assert measure(plan.num_pages) <= plan.temporaries_bytes
    # No page more would fit beside the temporaries, unless these are only just bounded.
    assert plan.needed_bytes + plan.bytes_per_page > available
    assert dataclasses.replace(plan, num_pages=4, temporaries_bytes=0) == dataclasses.replace(
        least, temporaries_bytes=0, is_measured=True
    )


def test_where_nothing_is_measured_the_bound_is_kept_free() -> None:
    plan = plan_fraction(with_device(LEAST, 10_000_000, 1_500_000), None, 0.5)
    assert not plan.is_measured
    # 3,500,000 are there; weights, slots and temporaries take 1,901,000.
    assert (plan.num_pages, plan.temporaries_bytes) == (159, LEAST.temporaries_bytes)
    with pytest.raises(ValueError, match=r"not enough memory: .* up to 878\.9 KiB for"):
        plan_fraction(with_device(LEAST, 1_900_000), None, 1.0)


def test_the_smallest_pool_is_tried_before_anything_is_refused() -> None:
    # Measured for 19 pages, the temporaries leave room for 2; with 4 pages there is room for all.
    least = with_device(LEAST, 1_200_000)
    plan = plan_fraction(least, lambda num_pages: 9_000 * num_pages, 1.0)
    assert (plan.num_pages, plan.temporaries_bytes) == (4, 36_000)


@pytest.mark.parametrize("measured", [None, 70_000], ids=["no-room-at-all", "temporaries"])
def test_a_fraction_that_does_not_hold_the_longest_request_is_refused(
    measured: int | None,
) -> None:
    measure: Callable[[int], int] = never if measured is None else lambda num_pages: 800_000
    least = with_device(LEAST, 1_200_000 if measured is None else 1_800_000, 50_000)
    with pytest.raises(ValueError, match="not enough memory") as info:
        plan_fraction(least, measure, 0.85)
    text = str(info.value)
    assert "raise memory_fraction, which is 0.85; lower max_model_len" in text
    assert "976.6 KiB for weights" in text
    assert "39.1 KiB for 4 pages of 16 tokens" in text
    assert ("up to 878.9 KiB" if measured is None else "781.2 KiB") + " for temporaries" in text
    assert "48.8 KiB of it in use by others" in text
    assert "max_num_batched_tokens" in text


def test_a_fraction_of_unknown_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="give num_pages instead"):
        plan_fraction(dataclasses.replace(LEAST, device=None), never, 0.5)


def test_a_given_pool_is_compiled_for_only_in_doubt() -> None:
    assert plan_pages(LEAST, never) is LEAST
    unknown = dataclasses.replace(LEAST, device=None)
    assert plan_pages(unknown, never) is unknown
    tight = with_device(LEAST, 1_200_000)
    plan = plan_pages(tight, lambda num_pages: 1_000 * num_pages)
    assert plan == dataclasses.replace(tight, temporaries_bytes=4_000, is_measured=True)


@pytest.mark.parametrize(
    ("limit", "used", "measure"),
    [(1_000_000, 0, never), (1_200_000, 0, lambda _: 200_000), (4_000_000, 3_000_000, never)],
    ids=["pages", "temporaries", "others"],
)
def test_a_given_pool_that_does_not_fit_is_refused(
    limit: int, used: int, measure: Callable[[int], int]
) -> None:
    with pytest.raises(ValueError, match=r"not enough memory: .* lower num_pages;"):
        plan_pages(with_device(LEAST, limit, used), measure)


def test_what_fits_is_told() -> None:
    plan = dataclasses.replace(LEAST, num_pages=11, max_model_len=65)
    assert (plan.num_tokens, plan.num_longest_requests, plan.pages_bytes) == (176, 2, 110_000)
    assert plan.needed_bytes == 1_000_000 + 1_000 + 110_000 + 900_000
    assert str(plan) == (
        "memory: weights 976.6 KiB; 11 pages of 9.8 KiB 107.4 KiB, room for 176 tokens or 2 "
        "requests of 65; slots 1.0 KiB; temporaries at most 878.9 KiB; device 3.8 MiB"
    )


def test_this_machine_tells_its_memory() -> None:
    device = device_memory()
    assert device is not None
    assert 2**28 < device.limit_bytes < 2**45
    assert 0 <= device.used_bytes <= device.limit_bytes


def make_setup(module: Any, backend: Backend = CPU, **options: Any) -> Setup:
    config = EngineConfig(**(OPTIONS | options)).resolve(module.config.max_position, backend)
    return build.make_setup(module, config, backend)


@pytest.fixture(scope="module")
def setup(tiny_model: tuple) -> Setup:
    """Of an engine with NUM_PAGES pages."""
    return make_setup(tiny_model[0], num_pages=NUM_PAGES)


@pytest.fixture(scope="module")
def measured(setup: Setup) -> int:
    return step_memory.measure(setup)


@pytest.fixture
def small_device(
    monkeypatch: pytest.MonkeyPatch, tiny_model: tuple, setup: Setup, measured: int
) -> DeviceMemory:
    """A device of which one half holds the model, NUM_PAGES pages and their temporaries."""
    module, params = tiny_model
    fixed = nbytes(params) + step_memory.slot_bytes(module, 32)
    pages = (NUM_PAGES + 0.5) * setup.layout.bytes_per_page
    device = DeviceMemory(limit_bytes=int(2 * (fixed + pages + measured)))
    monkeypatch.setattr(build, "device_memory", lambda own_bytes=0, where=None: device)
    monkeypatch.setattr(step_memory, "measure", lambda *args, **options: measured)
    return device


def test_the_plan_is_what_the_engine_allocates(
    tiny_model: tuple, small_device: DeviceMemory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "folojax"):
        llm = LLM(tiny_model, **OPTIONS, memory_fraction=0.5)
    plan, state = llm.memory_plan, llm.engine.runner.state
    assert caplog.records[0].getMessage() == str(plan)
    assert plan.num_pages == llm.config.num_pages == llm.metrics().num_pages == NUM_PAGES
    assert plan.device == small_device
    assert plan.is_measured
    assert plan.pages_bytes == nbytes(state.cache)
    assert plan.weights_bytes == nbytes(llm.params)
    edits = init_edits(32, tiny_model[0].config.vocab_size)
    assert plan.slots_bytes == nbytes(state.slots) + nbytes(edits)


def test_vllms_name_is_the_same_field(tiny_model: tuple, small_device: DeviceMemory) -> None:
    llm = LLM(tiny_model, **OPTIONS, gpu_memory_utilization=0.5)
    assert llm.config.num_pages == NUM_PAGES
    with pytest.raises(ValueError, match="two names of the same"):
        LLM(tiny_model, memory_fraction=0.5, gpu_memory_utilization=0.5)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"memory_fraction": 0.01}, "raise memory_fraction, which is 0.01; lower max_model_len"),
        ({"num_pages": 1000}, "lower num_pages"),
        ({"max_num_seqs": 64}, "lower max_num_seqs"),
    ],
)
def test_too_little_memory_is_told_before_anything_is_allocated(
    tiny_model: tuple, small_device: DeviceMemory, options: dict[str, Any], remedy: str
) -> None:
    before = nbytes(jax.live_arrays())
    with pytest.raises(ValueError, match=r"not enough memory: .* are needed, ") as info:
        LLM(tiny_model, **(OPTIONS | options))
    assert remedy in str(info.value)
    assert nbytes(jax.live_arrays()) == before


def test_weights_are_counted_before_they_are_read(
    tiny_directory: Any, tiny_model: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_params", never)
    device = DeviceMemory(limit_bytes=nbytes(tiny_model[1]))
    monkeypatch.setattr(build, "device_memory", lambda own_bytes=0, where=None: device)
    with pytest.raises(ValueError, match="not enough memory") as info:
        LLM(tiny_directory, dtype="float32", **OPTIONS, num_pages=NUM_PAGES)
    assert f"{nbytes(tiny_model[1]) / 2**10:.1f} KiB for weights" in str(info.value)


def test_the_compiled_steps_of_an_engine_keep_to_its_plan(tiny_model: tuple, measured: int) -> None:
    """Of all layers, with its own arrays: by XLA's analysis, none needs more than was planned.

    One layer more than were measured.
    """
    module, params = tiny_model
    module = module.clone(config=dataclasses.replace(module.config, num_layers=3))
    params = params | {"layers_2": params["layers_1"]}
    runner = LLM((module, params), **OPTIONS, num_pages=NUM_PAGES).engine.runner
    shapes = runner.shapes
    most, rows = shapes.prefill_rows[-1], shapes.decode_rows[-1]
    spec = runner.setup.spec(SamplingClass.TRUNCATED, 20)
    for one in (
        Executable("prefill", most, shapes.prefill_columns),
        Executable("decode", rows),
        Executable("sample", rows, spec=spec),
    ):
        # What a program is given is part of the plan but for its inputs and hidden states.
        given = (
            nbytes(padding(one, runner.batch, runner.grammars))
            + 4 * rows * module.config.hidden_size
        )
        compiled = compile_on_padding(
            one, runner.setup, runner.steps, runner.batch, runner.params, runner.state
        )
        for program in compiled:
            found = program.memory_analysis()
            peak = found.output_size_in_bytes + found.temp_size_in_bytes
            peak -= found.alias_size_in_bytes
            assert peak <= measured + given + 2**15, one  # arrays are rounded up


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (jnp.float32, {"num_pages": NUM_PAGES}),
        pytest.param(
            jnp.bfloat16,
            {"num_pages": 1024, "max_num_seqs": 2, "max_num_batched_tokens": 16},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            jnp.float32,
            {"num_pages": 16, "max_num_batched_tokens": 512},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["float32", "bfloat16-large-pool", "float32-long-prefill"],
)
def test_the_bound_from_shapes_is_above_what_is_measured(
    tiny_model: tuple, dtype: Any, options: dict[str, Any]
) -> None:
    setup = make_setup(tiny_model[0].clone(dtype=dtype), **options)
    assert step_memory.measure(setup) <= step_memory.estimate(setup)


def test_a_deterministic_step_is_measured(tiny_model: tuple) -> None:
    """It copies a page of every row: more than other programs need that read pages in place."""
    config = dataclasses.replace(
        tiny_model[0].config, num_heads=32, num_kv_heads=32, head_dim=64, num_layers=1
    )
    module = tiny_model[0].clone(config=config)
    limits: dict[str, Any] = {
        "max_num_seqs": 1,
        "max_model_len": 128,
        "page_size": 64,
        "max_num_batched_tokens": 64,
        "num_pages": 32,
    }
    exact = CPU.deterministic(module.config, jnp.float32)
    exact = dataclasses.replace(exact, kernels=exact.kernels[1:])  # what there is everywhere
    setup, plain = make_setup(module, exact, **limits), make_setup(module, **limits)
    copied = 32 * setup.layout.bytes_per_page // 2  # keys, or values
    found = step_memory.measure(setup)
    assert max(step_memory.measure(plain), copied) < found <= step_memory.estimate(setup)


def test_a_pool_by_memory_begins_with_one_request() -> None:
    by_memory = EngineConfig(memory_fraction=0.5).resolve(4096, CPU)
    assert by_memory.num_pages == pages_for(4096, 64)
    assert by_memory.memory_fraction is None
    assert EngineConfig().pool_fraction(CPU) is None
    assert EngineConfig().pool_fraction(GPU) == 0.9
    assert EngineConfig(num_pages=5).pool_fraction(GPU) is None
    with pytest.raises(ValueError, match=r"num_pages is 5 and memory_fraction is 0\.5"):
        EngineConfig(num_pages=5, memory_fraction=0.5)


def test_bytes_of_a_page_are_those_of_its_arrays(setup: Setup) -> None:
    layout = setup.layout
    elements = 2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * layout.page_size
    assert layout.bytes_per_page == 4 * elements


@pytest.mark.parametrize(
    ("stats", "free", "expected"),
    [
        # Only this process: what JAX may have, and what a trainer's arrays take of it.
        ({"bytes_limit": 100, "pool_bytes": 100, "bytes_in_use": 40}, 30, (100, 30)),
        # Others hold so much of the card that JAX cannot have all of its share.
        ({"bytes_limit": 100, "pool_bytes": 20, "bytes_in_use": 15}, 50, (70, 5)),
        # The driver does not tell.
        ({"bytes_limit": 100, "pool_bytes": 20, "bytes_in_use": 15}, None, (100, 5)),
    ],
)
def test_what_others_hold_of_a_gpu_counts(
    monkeypatch: pytest.MonkeyPatch,
    stats: dict[str, int],
    free: int | None,
    expected: tuple[int, int],
) -> None:
    device: Any = types.SimpleNamespace(platform="gpu", process_index=0, memory_stats=lambda: stats)
    monkeypatch.setattr("folojax.backend.device_memory._free_bytes", lambda device: free)
    found = device_memory(10, Devices((device,)))
    assert found is not None
    assert (found.limit_bytes, found.used_bytes) == expected


def test_a_pool_is_no_larger_than_requests_can_use() -> None:
    """Nothing is compiled where the bound on the temporaries is enough to see that."""
    ample = plan_fraction(with_device(LEAST, 2**40), never, 0.9, most_pages=7)
    assert (ample.num_pages, ample.is_capped, ample.is_measured) == (7, True, False)
    assert "requests of 64, all that max_num_seqs can use of memory_fraction;" in str(ample)
    tight = plan_fraction(with_device(LEAST, 1_950_000), lambda pages: 1_000, 1.0, most_pages=90)
    assert (tight.num_pages, tight.is_capped, tight.is_measured) == (90, True, True)
    for plan in (
        plan_fraction(with_device(LEAST, 2**40), None, 0.9),
        plan_fraction(with_device(LEAST, 4_000_000), lambda pages: 1_000, 0.5, most_pages=1_000),
    ):
        assert plan.num_pages > 90
        assert not plan.is_capped
        assert "max_num_seqs" not in str(plan)
