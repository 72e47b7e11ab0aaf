"""Compiles an engine's executables ahead of time, several at once."""

import logging
import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

from folojax.compile.mapped_memory import FULL, give_back_memory, share_of_areas
from folojax.kv.state_copies import compile_copies
from folojax.runner.compile_plan import CompilePlan, Planned
from folojax.runner.padding import compile_on_padding, padding
from folojax.runner.runner import Runner
from folojax.sampling.sampler import SamplingClass
from folojax.steps.calls import hidden_shapes
from folojax.steps.executables import COPIES, EDITS, Executable

_LOG = logging.getLogger("folojax")

_MOST_THREADS = 8  # tracing holds Python's lock: more would wait for it


def list_compile_plan(
    runner: Runner,
    sampling: Collection[SamplingClass],
    has_logprobs: bool,
    has_grammars: bool = False,
) -> CompilePlan:
    """What a runner may need; nothing is compiled. Arguments are those of `warm_up`."""
    executables = runner.setup.list_executables(sampling, has_logprobs, has_grammars)
    return CompilePlan(tuple(map(runner.gate.cost, executables)))


def warm_up(
    runner: Runner,
    sampling: Collection[SamplingClass],
    has_logprobs: bool,
    has_grammars: bool = False,
    num_threads: int | None = None,
    *,
    is_shown: bool = False,
) -> CompilePlan:
    """Compiles all that `list_compile_plan` lists; a call then finds the same program.

    Where a step is one program, each is also run once, on padding: on a GPU a program is loaded and
    its graph recorded at its first run, and that of every other program is dropped whenever one is
    loaded.

    XLA compiles without Python's lock, so that threads help; programs that an earlier process has
    compiled come from the cache on disk.

    Args:
        runner: Its parameters and state are in place.
        sampling: Classes of sampling parameters that will be used.
        has_logprobs: Whether log-probabilities will be asked for.
        has_grammars: Whether structured outputs will be.
        num_threads: None: one for each processor, at most eight.
        is_shown: Whether there is a progress bar, on a terminal.

    Raises:
        RuntimeError: the process has no room for all programs, and the engine is strict. Another
            one goes on without the rest, and says so.
    """
    executables = runner.setup.list_executables(sampling, has_logprobs, has_grammars)
    done = []
    if EDITS in executables:
        start = time.perf_counter()
        runner.compile_edits()
        done.append(Planned(EDITS, None, time.perf_counter() - start))

    def compile_one(one: Executable) -> Planned | None:
        if share_of_areas() >= FULL:
            return None
        start = time.perf_counter()
        compiled = compile_on_padding(
            one, runner.setup, runner.steps, runner.batch, runner.params_of(one), runner.state
        )
        found = [one.memory_analysis() for one in compiled]
        temporaries = max(one.temp_size_in_bytes for one in found)
        return Planned(one, temporaries, time.perf_counter() - start)

    jobs = [one for one in executables if one not in (COPIES, EDITS)]
    num_threads = num_threads or min(os.cpu_count() or 1, _MOST_THREADS)
    bar = tqdm(total=len(jobs), desc="compiling", disable=None if is_shown else True)
    with bar, ThreadPoolExecutor(num_threads) as pool:
        compiled = []
        for found in pool.map(compile_one, jobs):
            compiled.append(found)
            bar.update()
    done += [one for one in compiled if one is not None]
    left_out = [job for job, one in zip(jobs, compiled, strict=True) if one is None]
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
    cache = compile_copies(runner.copies.compile(runner.state.cache))
    runner.state = runner.state._replace(cache=cache)
    done.append(Planned(COPIES, None, time.perf_counter() - start))
    runner.gate.set_compiled(done, left_out)
    if runner.steps.kind in ("whole", "ordered"):
        for one in jobs:
            if one not in left_out:
                _run_on_padding(runner, one)
    give_back_memory()
    return list_compile_plan(runner, sampling, has_logprobs, has_grammars)


def warm_up_each(
    runners: Sequence[Runner],
    sampling: Collection[SamplingClass],
    has_logprobs: bool,
    has_grammars: bool = False,
) -> int:
    """Does so for one runner after the other; returns how many executables each has."""
    wanted = sampling, has_logprobs, has_grammars
    plans = [warm_up(runner, *wanted, is_shown=True) for runner in runners]
    return len(plans[0])


def _run_on_padding(runner: Runner, one: Executable) -> None:
    """Waits for it."""
    shapes = hidden_shapes(one, runner.model, runner.steps.kind)
    hidden = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    place = runner.backend.devices.place
    results = runner.call(one, padding(one, runner.batch, runner.grammars, place(hidden)))
    report = None if results.report is None else results.report.array
    jax.block_until_ready((results.hidden, report, results.scores))
