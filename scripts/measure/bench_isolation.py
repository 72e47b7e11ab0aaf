"""A contender in a process of its own: its threads, its peak memory and its compiler are its own.

While one is timed the others sleep in a read.
"""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from bench_workloads import Workload


class Contender(Protocol):
    """What runs workloads."""

    name: str

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """Gets ready for a workload; returns what that cost."""

    def run(self, workload: Workload) -> dict[str, Any]:
        """Runs it once; returns the figures."""

    def close(self) -> None:
        """Ends it."""


class Isolated:
    """A contender behind a pipe."""

    def __init__(self, make: Callable[[], Contender]) -> None:
        """Starts the process; `make` can be pickled, and is called there.

        Raises:
            RuntimeError: it could not be made. (Here as elsewhere, with the process's own
                traceback.)
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self.name: str = self._receive()

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """As `Contender`."""
        return self._call("prepare", workload)

    def run(self, workload: Workload) -> dict[str, Any]:
        """As `Contender`."""
        return self._call("run", workload)

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The likeliest tokens after each prompt."""
        return self._call("greedy", prompts, num_tokens)

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()

    def _call(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            is_error, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"it ended with exit code {self._process.exitcode}") from None
        if is_error:
            raise RuntimeError(answer)
        return answer


def _serve(pipe: Connection, make: Callable[[], Contender]) -> None:
    try:
        with contextlib.closing(make()) as contender:
            pipe.send((False, contender.name))
            while True:
                method, arguments = pipe.recv()
                pipe.send((False, getattr(contender, method)(*arguments)))
    except EOFError:
        return
    except Exception:
        pipe.send((True, traceback.format_exc()))
