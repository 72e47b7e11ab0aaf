"""Where the time of a step goes. Functions of the engine are wrapped from outside, for a while.

A phase's time is that of its own functions, less that of other phases inside them. A device that
works while the host dispatches is waited for the less: the phases are what the host does. While
nothing is measured nothing is wrapped, and nothing is paid.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax

from folojax import LLM
from folojax.engine.engine import Engine
from folojax.runner.batch import Batch
from folojax.runner.runner import Runner
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
    "dispatch": [(Runner, name) for name in ("_move_pages", "_prefill", "_call_decode")]
    + [(Runner, name) for name in ("_call_decode_steps", "_call_sample")]
    + [(Runner, name) for name in ("_score", "write_edits")],
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
        self._running: list[str] = []
        self._since = 0.0

    def wrap(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """The same function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
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
