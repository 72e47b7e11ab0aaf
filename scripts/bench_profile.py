"""Where the time of a step goes. Functions of the engine are timed from outside, for a while.

A phase's time is that of its own functions, less that of other phases inside them. A device that
works while the host dispatches is waited for the less: the phases are what the host does.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from folojax import LLM
from folojax.batch import Batch
from folojax.detokenizer import Detokenizer
from folojax.engine import Engine
from folojax.runner import Runner
from folojax.sched.scheduler import Scheduler

# schedule: which tokens come next; pack: NumPy arrays for the device; dispatch: jitted calls;
# device wait: until results are there; commit: tokens to requests, and outputs.
PHASES: dict[str, list[tuple[Any, str]]] = {
    "schedule": [(Scheduler, "schedule")],
    "pack": [(Runner, "dispatch")],
    "dispatch": [(Runner, name) for name in ("_move_pages", "_prefill", "_call_decode")]
    + [(Runner, name) for name in ("_call_decode_steps", "_call_sample")]
    + [(Runner, name) for name in ("_score", "write_edits")],
    "device wait": [(jax, "device_get")],
    "commit": [(Engine, "_commit")],
    "detokenise": [(Detokenizer, "read"), (Detokenizer, "finish")],
    "other": [(LLM, "step")],
}

# Packing that the calls above do between two dispatches.
PHASES["pack"] += [(Batch, name) for name in ("update", "prefill_inputs", "decode_inputs", "pad")]


class Stopwatch:
    """Seconds by phase; only one phase runs at any time, the innermost."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
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
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


@contextlib.contextmanager
def profile_steps() -> Iterator[Stopwatch]:
    """Times the steps of every engine in the process; costs some microseconds a step."""
    stopwatch = Stopwatch()
    with contextlib.ExitStack() as stack:
        for phase, functions in PHASES.items():
            for owner, name in functions:
                function = getattr(owner, name)
                setattr(owner, name, stopwatch.wrap(function, phase))
                stack.callback(setattr, owner, name, function)
        yield stopwatch
