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

from folojax import kv_cache, page_copies, step
from folojax.batch import ints
from folojax.buckets import DecodeShape, PrefillShape
from folojax.compile_plan import COPIES, EDITS, CompilePlan, Executable, Planned, model_executable
from folojax.deterministic import DeterministicRunner
from folojax.memory_areas import FULL, share_of_areas
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
        executable, lower = job
        start = time.perf_counter()
        compiled = [lowered.compile() for lowered in lower()]
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
    return make_plan(runner, sampling, has_logprobs)


def _jobs(
    runner: Runner, sampling: Collection[SamplingClass], has_logprobs: bool
) -> Iterator[tuple[Executable, Callable[[], list[Any]]]]:
    """Executables, and what traces the programs of each."""
    if isinstance(runner, DeterministicRunner):
        for one in runner.list_executables(sampling, has_logprobs):
            if one not in (COPIES, EDITS):
                yield one, functools.partial(runner.lower, one)
        return
    shapes = {model_executable(shape): shape for shape in runner.buckets.shapes()}
    for one in runner.list_executables(sampling, has_logprobs):
        if one.kind in ("prefill", "decode"):
            yield one, functools.partial(_lower_model, runner, shapes[one])
        elif one.kind == "decode_steps":
            model = one._replace(kind="decode", tokens=1, sampling=None, num_logprobs=None)
            yield one, functools.partial(_lower_steps, runner, shapes[model], _spec(one))
        elif one.kind == "sample":
            yield one, functools.partial(_lower_sampler, runner, one)
        elif one.kind == "score":
            yield one, functools.partial(_lower_scorer, runner, one)


def _spec(one: Executable) -> SamplingSpec:
    assert one.sampling is not None, f"{one} samples"
    return SamplingSpec(one.sampling, one.num_logprobs)


def _lower_model(runner: Runner, shape: PrefillShape | DecodeShape) -> list[Any]:
    head, _ = kv_cache.take_segments(runner.state.cache, shape.segments)
    if isinstance(shape, PrefillShape):
        inputs = runner.batch.prefill_inputs(shape, [])
        return runner.steps.lower_prefill(runner.params, head, inputs)
    row_inputs = runner.batch.decode_inputs(shape, [])
    tokens = runner.state.slots.tokens
    return runner.steps.lower_decode(runner.params, head, tokens, row_inputs)


def _lower_steps(runner: Runner, shape: Any, spec: SamplingSpec) -> list[Any]:
    head, _ = kv_cache.take_segments(runner.state.cache, shape.segments)
    inputs = runner.batch.decode_inputs(shape, [])
    arguments, options, _ = runner.decode_steps_arguments(inputs, ints(shape.rows), spec)
    return [step.decode_steps.lower(runner.params, head, *arguments, **options)]


def _lower_sampler(runner: Runner, one: Executable) -> list[Any]:
    slot = ints(one.rows, runner.batch.num_slots)
    slots, _, inputs, spec = runner.sampling(slot, ints(one.rows), _spec(one))
    params, hidden = step.head_params(runner.params), _hidden(runner, one.rows)
    lowered = step.sample_tokens.lower(params, slots, hidden, inputs, model=runner.model, spec=spec)
    return [lowered]


def _lower_scorer(runner: Runner, one: Executable) -> list[Any]:
    sizes = (one.rows, one.tokens)
    params, hidden = step.head_params(runner.params), _hidden(runner, *sizes)
    options = {"model": runner.model, "num_logprobs": one.num_logprobs}
    return [step.score_tokens.lower(params, hidden, ints(sizes), **options)]


def _hidden(runner: Runner, *sizes: int) -> jax.ShapeDtypeStruct:
    """Hidden states as the model returns them: committed to the device."""
    shape = (*sizes, runner.model.config.hidden_size)
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, runner.model.dtype, sharding=sharding)
