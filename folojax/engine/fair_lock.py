"""A lock for several threads on one engine: first come, first served."""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

_P = ParamSpec("_P")
_Result = TypeVar("_Result")


class FairLock:
    """A reentrant lock that goes to whoever has waited longest.

    Python's own may go to the thread that has just given it back, any number of times: a thread
    that steps an engine until its requests are done would keep all others from adding theirs.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0
        self._process = os.getpid()

    def __enter__(self) -> None:
        """Waits for the lock.

        Raises:
            RuntimeError: this is a fork of the process that has made it.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "this process is a fork of the one that has made the engine, and JAX does not "
                'survive that: make the engine in the new process, or start it with the "spawn" '
                "method of multiprocessing"
            )
        me, turn = threading.get_ident(), threading.Lock()
        with self._mutex:
            if self._owner in (None, me):
                self._owner = me
                self._depth += 1
                return
            turn.acquire()
            self._waiting.append((me, turn))
        try:
            turn.acquire()  # until `__exit__` releases it: the lock is ours then
        except BaseException:  # Ctrl-C
            with self._mutex:
                is_mine = (me, turn) not in self._waiting
                if not is_mine:
                    self._waiting.remove((me, turn))
            if is_mine:
                self.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives the lock to the next thread."""
        with self._mutex:
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._waiting:
                self._owner, turn = self._waiting.popleft()
                self._depth = 1
                turn.release()


class HasLock(Protocol):
    """An object whose methods may be `exclusive`."""

    @property
    def lock(self) -> FairLock:
        """Of the engine."""
        ...


_Self = TypeVar("_Self", bound=HasLock)


def exclusive(
    method: Callable[Concatenate[_Self, _P], _Result],
) -> Callable[Concatenate[_Self, _P], _Result]:
    """A method that holds the lock of its object while it runs."""

    @functools.wraps(method)
    def run(self: Any, *args: _P.args, **kwargs: _P.kwargs) -> _Result:
        with self.lock:
            return method(self, *args, **kwargs)

    return run
