"""A look inside the engine: shares of a step, a trace of one run, and what it held over time.

Functions of the engine are wrapped from outside, for a while.

A phase's time is that of its own functions, less that of other phases inside them. A device that
works while the host dispatches is waited for the less: the phases are what the host does. While
nothing is measured nothing is wrapped, and nothing is paid.
"""

import contextlib
import functools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax

from folojax import LLM
from folojax.engine.engine import Engine
from folojax.runner.batch import Batch
from folojax.runner.runner import Runner
from folojax.runner.slot_states import SlotStates
from folojax.sched.scheduler import Scheduler
from folojax.text.detokenizer import Detokenizer

Wrap: TypeAlias = Callable[[Callable[..., Any], str], Callable[..., Any]]
"""From a function and its phase to what takes its place."""

# schedule: which tokens come next; pack: NumPy arrays for the device; dispatch: jitted calls;
# device wait: until results are there; read back: to the host, and to Python's numbers; commit:
# tokens to requests, and outputs.
PHASES: dict[str, list[tuple[Any, str]]] = {
    "schedule": [(Scheduler, "schedule")],
    "pack": [(Runner, "dispatch")],
    "dispatch": [(Runner, "_move_pages"), (Runner, "call"), (SlotStates, "join")],
    "device wait": [(jax, "block_until_ready")],
    "read back": [(Runner, "collect"), (jax, "device_get")],
    "commit": [(Engine, "_commit")],
    "detokenise": [(Detokenizer, "read"), (Detokenizer, "finish")],
    "other": [(LLM, "step")],
}

# Packing that the calls above do between two dispatches.
PHASES["pack"] += [(Batch, name) for name in ("update", "prefill_inputs", "decode_inputs", "pad")]


HOST_PHASES = tuple(phase for phase in PHASES if phase not in ("dispatch", "device wait"))
"""Those that are the host's alone: a device may compute inside the other two."""


class Stopwatch:
    """Seconds by phase; only one phase runs at any time, the innermost."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` tells seconds; `time.thread_time` leaves out what other threads do."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._clock = clock
        self._thread = threading.get_ident()
        self._running: list[str] = []
        self._since = 0.0

    def wrap(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """The same function, timed where this thread calls it: several engines have others, too."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            self._enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return timed

    def shares(self) -> dict[str, float]:
        """Parts of the whole, in the order of PHASES."""
        total = sum(self.seconds.values())
        return {phase: seconds / max(total, 1e-12) for phase, seconds in self.seconds.items()}

    def _enter(self, phase: str) -> None:
        self._stop()
        self._running.append(phase)

    def _leave(self) -> None:
        self._stop()
        self._running.pop()

    def _stop(self) -> None:
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


@contextlib.contextmanager
def profile_steps(clock: Callable[[], float] = time.perf_counter) -> Iterator[Stopwatch]:
    """Times the steps of every engine in the process; costs some microseconds a step."""
    stopwatch = Stopwatch(clock)
    with wrap_phases(stopwatch.wrap):
        yield stopwatch


@contextlib.contextmanager
def wrap_phases(wrap: Wrap) -> Iterator[None]:
    """Puts something around the functions of every phase, for every engine in the process."""
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, function)

        # One call waits and copies: in two, a wait is told from what it waits for.
        device_get = jax.device_get

        def wait_and_get(arrays: Any) -> Any:
            jax.block_until_ready(arrays)
            return device_get(arrays)

        replace(jax, "device_get", wait_and_get)
        for phase, functions in PHASES.items():
            for owner, name in functions:
                replace(owner, name, wrap(getattr(owner, name), phase))
        yield


_TRACE_NAMES = {"other": "step"}
"""Phases that are called differently here: what is left of a step is the step without the rest."""


def trace_run(path: Path, run: Callable[[], Any]) -> Path:
    """Runs something under JAX's profiler.

    Args:
        path: Becomes the trace, JSON in gzip. The profiler's own files, which XProf reads, go into
            the directory of the same name without a suffix.
        run: Steps engines; it takes a few times as long as without.

    Returns:
        The path.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a slice for each call of Python would hide the phases
    directory = path.with_name(path.name.partition(".")[0])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with (
        jax.profiler.trace(directory, create_perfetto_trace=True, profiler_options=options),
        wrap_phases(_annotate),
    ):
        run()
    (found,) = directory.glob("plugins/profile/*/perfetto_trace.json.gz")
    shutil.copyfile(found, path)
    return path


def _annotate(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    return jax.profiler.annotate_function(function, name=_TRACE_NAMES.get(phase, phase))


TIMELINE_FIELDS = ("running", "waiting", "used_pages", "idle_pages", "free_pages")


class Timeline:
    """Looks at an engine after each step; a look costs microseconds."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._times_s: list[float] = []
        self._values: dict[str, list[int]] = {name: [] for name in TIMELINE_FIELDS}

    def look(self, now_s: float) -> None:
        """Notes how the engine stands, at a time of any clock."""
        metrics = self._llm.metrics()
        used, idle = metrics.num_used_pages, metrics.num_cached_pages
        free = metrics.num_pages - used - idle
        self._times_s.append(now_s)
        now = (metrics.num_running, metrics.num_waiting, used, idle, free)
        for name, value in zip(TIMELINE_FIELDS, now, strict=True):
            self._values[name].append(value)

    def as_dict(self, start_s: float) -> dict[str, list[float] | list[int]]:
        """The looks: "time_s" from a start on the same clock, and the TIMELINE_FIELDS.

        `running` and `waiting` are samples; idle pages belong to nobody and are kept for prompts
        that begin alike.
        """
        return {"time_s": [time_s - start_s for time_s in self._times_s], **self._values}
