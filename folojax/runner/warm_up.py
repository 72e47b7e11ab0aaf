"""Compiles an engine's executables ahead of time, several at once."""

import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from tqdm.auto import tqdm

from folojax.compile.mapped_memory import FULL, give_back_memory, share_of_areas
from folojax.compile.programs import Call
from folojax.compile.shapes import DecodeShape, PrefillShape
from folojax.runner.batch import ints
from folojax.runner.deterministic import DeterministicRunner
from folojax.runner.executables import COPIES, EDITS, CompilePlan, Executable, Planned
from folojax.runner.runner import Runner
from folojax.runner.sampler_calls import place
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.steps.fused import WholeSteps
from folojax.steps.packing import PackedReport

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
    *,
    is_shown: bool = False,
) -> CompilePlan:
    """Compiles all that `make_plan` lists; a call then finds the same program.

    Programs with their sampling in them (`WholeSteps`) are also run once, on padding: on a GPU a
    program is loaded and its graph recorded at its first run, and that of every other program
    is dropped whenever one is loaded.

    XLA compiles without Python's lock, so that threads help; programs that an earlier process has
    compiled come from the cache on disk.

    Args:
        runner: Its parameters and state are in place.
        sampling: Classes of sampling parameters that will be used.
        has_logprobs: Whether log-probabilities will be asked for.
        num_threads: None: one for each processor, at most eight.
        is_shown: Whether there is a progress bar, on a terminal.

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
    num_threads = num_threads or min(os.cpu_count() or 1, _MOST_THREADS)
    bar = tqdm(total=len(jobs), desc="compiling", disable=None if is_shown else True)
    with bar, ThreadPoolExecutor(num_threads) as pool:
        compiled = []
        for found in pool.map(compile_one, jobs):
            compiled.append(found)
            bar.update()
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
    cache = runner.copies.compile(runner.state.cache)
    runner.state = runner.state._replace(cache=cache)
    done.append(Planned(COPIES, None, time.perf_counter() - start))
    runner.gate.set_compiled(done, left_out)
    if isinstance(runner.steps, WholeSteps) and not isinstance(runner, DeterministicRunner):
        for one in done:
            _run_once(runner, one.executable)
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
    for one in runner.list_executables(sampling, has_logprobs):
        if one.kind in ("prefill", "decode"):
            yield one, functools.partial(_model_calls, runner, one)
        elif one.kind == "decode_steps":
            yield one, functools.partial(_steps_call, runner, one)
        elif one.kind == "sample":
            yield one, functools.partial(_sampler_call, runner, one)
        elif one.kind == "score":
            yield one, functools.partial(_scorer_call, runner, one)


def _spec(one: Executable) -> SamplingSpec:
    assert one.sampling is not None, f"{one} samples"
    return SamplingSpec(one.sampling, one.num_logprobs)


def _model_calls(runner: Runner, one: Executable) -> list[Call]:
    state, steps = runner.state, runner.steps
    if one.kind == "prefill":
        inputs = runner.batch.prefill_inputs(PrefillShape(one.rows, one.tokens), [])
        return steps.prefill_calls(runner.params, state.cache, inputs)
    row_inputs = runner.batch.decode_inputs(DecodeShape(one.rows), [])
    if one.sampling is not None and isinstance(steps, WholeSteps):
        slot, position = row_inputs.slot, row_inputs.position
        slots, _, sampling, spec = runner.sampling(slot, position, _spec(one))
        both = row_inputs, sampling
        return steps.sampled_calls(runner.params, state.cache, slots, both, spec)
    return steps.decode_calls(runner.params, state.cache, state.slots.tokens, row_inputs)


def _steps_call(runner: Runner, one: Executable) -> list[Call]:
    inputs = runner.batch.decode_inputs(DecodeShape(one.rows), [])
    cache = runner.state.cache
    call, _, _ = runner.decode_steps_call(cache, inputs, ints(one.rows), _spec(one))
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


def _run_once(runner: Runner, one: Executable) -> None:
    """Runs an executable of the plan on padding; waits for it."""
    nowhere = ints(one.rows, runner.batch.num_slots)
    width = runner.model.config.hidden_size
    out: Any = None
    if one.kind == "prefill":
        inputs = runner.batch.prefill_inputs(PrefillShape(one.rows, one.tokens), [])
        cache, out, *_ = runner.steps.prefill(runner.params, runner.state.cache, inputs)
        runner.state = runner.state._replace(cache=cache)
    elif one.kind == "decode" and isinstance(runner.steps, WholeSteps):
        assert one.sampling is not None, f"{one} samples"
        spec = SamplingSpec(one.sampling, one.num_logprobs)
        rows = runner.batch.decode_inputs(DecodeShape(one.rows), [])
        slots, kept, sampling, spec = runner.sampling(nowhere, rows.position, spec)
        cache, slots, out, _ = runner.steps.decode_and_sample(
            runner.params, runner.state.cache, slots, (rows, sampling), spec
        )
        runner.state = runner.state._replace(cache=cache)
        runner._keep(slots, kept)
    elif one.kind == "sample":
        assert one.sampling is not None, f"{one} samples"
        hidden = place(jnp.zeros((one.rows, width), runner.model.dtype))
        spec = SamplingSpec(one.sampling, one.num_logprobs)
        slots, kept, sampling, spec = runner.sampling(nowhere, ints(one.rows), spec)
        slots, out = runner._sample_hidden(hidden, slots, sampling, spec)
        runner._keep(slots, kept)
    elif one.kind == "score":
        hidden = place(jnp.zeros((one.rows, one.tokens, width), runner.model.dtype))
        assert one.num_logprobs is not None, f"{one} reports log-probabilities"
        out = runner.score_call(hidden, ints((one.rows, one.tokens)), one.num_logprobs).run()
    jax.block_until_ready(out.array if isinstance(out, PackedReport) else out)
