"""Compiles an engine's executables ahead of time, several at once."""

import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from folojax import kv_cache, page_copies
from folojax.batch import ints
from folojax.buckets import DecodeShape, PrefillShape
from folojax.compile_plan import COPIES, EDITS, CompilePlan, Executable, Planned, model_executable
from folojax.deterministic import DeterministicRunner
from folojax.memory_areas import FULL, give_back_memory, share_of_areas
from folojax.programs import Call
from folojax.runner import Runner
from folojax.sampling import SamplingClass, SamplingSpec

_LOG = logging.getLogger("folojax")

_MOST_THREADS = 8  # tracing holds Python's lock: more would wait for it


def make_plan(
    runner: Runner, sampling: Collection[SamplingClass], has_logprobs: bool
) -> CompilePlan:
    """What a runner may need for these classes of sampling; nothing is compiled."""
    executables = runner.list_executables(sampling, has_logprobs)
    return CompilePlan(tuple(map(runner.gate.cost, executables)))


def warm_up(
    runner: Runner,
    sampling: Collection[SamplingClass],
    has_logprobs: bool,
    num_threads: int | None = None,
) -> CompilePlan:
    """Compiles all that `make_plan` lists; a call then finds the same program.

    XLA compiles without Python's lock, so that threads help; programs that an earlier process has
    compiled come from the cache on disk.

    Args:
        runner: Its parameters and state are in place.
        sampling: Classes of sampling parameters that will be used.
        has_logprobs: Whether log-probabilities will be asked for.
        num_threads: None: one for each processor, at most eight.

    Raises:
        RuntimeError: the process has no room for all programs, and the engine is strict. Another
            one goes on without the rest, and says so.
    """
    done = []
    if SamplingClass.EDITED in sampling:
        start = time.perf_counter()
        runner.compile_edits()
        done.append(Planned(EDITS, None, time.perf_counter() - start))

    def compile_one(job: tuple[Any, Any]) -> Planned | None:
        if share_of_areas() >= FULL:
            return None
        executable, prepare = job
        start = time.perf_counter()
        compiled = [one.compile() for one in prepare()]
        found = [one.memory_analysis() for one in compiled]
        temporaries = max(one.temp_size_in_bytes for one in found)
        return Planned(executable, temporaries, time.perf_counter() - start)

    jobs = list(_jobs(runner, sampling, has_logprobs))
    with ThreadPoolExecutor(num_threads or min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        compiled = list(pool.map(compile_one, jobs))
    done += [one for one in compiled if one is not None]
    left_out = [job[0] for job, one in zip(jobs, compiled, strict=True) if one is None]
    if left_out:
        text = (
            f"{len(left_out)} of {len(jobs)} executables are not compiled ahead of time: "
            "the programs so far take most of the memory areas that Linux grants a process. Raise "
            "vm.max_map_count, or allow fewer shapes (max_num_seqs, max_model_len)"
        )
        if runner.gate.is_strict:
            raise RuntimeError(f"{text}, or set strict to False")
        _LOG.warning("%s. The rest are compiled when they are needed.", text)
    start = time.perf_counter()
    cache, _ = page_copies.compile_copies(runner.state.cache)
    runner.state = runner.state._replace(cache=cache)
    done.append(Planned(COPIES, None, time.perf_counter() - start))
    runner.gate.set_compiled(done, left_out)
    give_back_memory()
    return make_plan(runner, sampling, has_logprobs)


def _jobs(
    runner: Runner, sampling: Collection[SamplingClass], has_logprobs: bool
) -> Iterator[tuple[Executable, Callable[[], list[Any]]]]:
    """Executables, and what makes the calls of each, or traces them in deterministic mode."""
    if isinstance(runner, DeterministicRunner):
        for one in runner.list_executables(sampling, has_logprobs):
            if one not in (COPIES, EDITS):
                yield one, functools.partial(runner.lower, one)
        return
    shapes = {model_executable(shape): shape for shape in runner.buckets.shapes()}
    for one in runner.list_executables(sampling, has_logprobs):
        if one.kind in ("prefill", "decode"):
            yield one, functools.partial(_model_calls, runner, shapes[one])
        elif one.kind == "decode_steps":
            model = one._replace(kind="decode", tokens=1, sampling=None, num_logprobs=None)
            yield one, functools.partial(_steps_call, runner, shapes[model], _spec(one))
        elif one.kind == "sample":
            yield one, functools.partial(_sampler_call, runner, one)
        elif one.kind == "score":
            yield one, functools.partial(_scorer_call, runner, one)


def _spec(one: Executable) -> SamplingSpec:
    assert one.sampling is not None, f"{one} samples"
    return SamplingSpec(one.sampling, one.num_logprobs)


def _model_calls(runner: Runner, shape: PrefillShape | DecodeShape) -> list[Call]:
    head, _ = kv_cache.take_segments(runner.state.cache, shape.segments)
    if isinstance(shape, PrefillShape):
        inputs = runner.batch.prefill_inputs(shape, [])
        return runner.steps.prefill_calls(runner.params, head, inputs)
    row_inputs = runner.batch.decode_inputs(shape, [])
    tokens = runner.state.slots.tokens
    return runner.steps.decode_calls(runner.params, head, tokens, row_inputs)


def _steps_call(runner: Runner, shape: Any, spec: SamplingSpec) -> list[Call]:
    head, _ = kv_cache.take_segments(runner.state.cache, shape.segments)
    inputs = runner.batch.decode_inputs(shape, [])
    call, _, _ = runner.decode_steps_call(head, inputs, ints(shape.rows), spec)
    return [call]


def _sampler_call(runner: Runner, one: Executable) -> list[Call]:
    return [runner.sample_call(_hidden(runner, one.rows), one.rows, _spec(one))]


def _scorer_call(runner: Runner, one: Executable) -> list[Call]:
    assert one.num_logprobs is not None, f"{one} reports log-probabilities"
    sizes = (one.rows, one.tokens)
    return [runner.score_call(_hidden(runner, *sizes), ints(sizes), one.num_logprobs)]


def _hidden(runner: Runner, *sizes: int) -> jax.ShapeDtypeStruct:
    """Hidden states as the model returns them: committed to the device."""
    shape = (*sizes, runner.model.config.hidden_size)
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, runner.model.dtype, sharding=sharding)
