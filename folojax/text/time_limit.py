"""A call that ends in bounded time, in any thread and on any platform."""

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PATIENCE_S = 0.2
_NUM_ATTEMPTS = 5


class _Stop(BaseException):
    """Raised in a thread from outside; no `except Exception` holds it up."""


def call_within(seconds: float, function: Callable[[], T]) -> T:
    """Calls a function in a thread of its own, and ends it when its time is up.

    It is ended between two steps of the interpreter, so loops end at once. A single long operation
    in C ends when it ends, but nobody waits for it. Whatever the function raises is raised here.

    Raises:
        TimeoutError: the time is up.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        with contextlib.suppress(_Stop):  # where it comes when all is done
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="folojax-time-limit")
    thread.start()
    try:
        thread.join(seconds)
    finally:  # also after Ctrl-C
        _end(thread)
    if results:
        return results[0]
    if errors and not isinstance(errors[0], _Stop):
        raise errors[0]
    raise TimeoutError(f"it took longer than {seconds:g} s")


def _end(thread: threading.Thread) -> None:
    """Raises _Stop in a thread that still runs, again if somebody has swallowed it."""
    for _ in range(_NUM_ATTEMPTS):
        if not thread.is_alive() or thread.ident is None:
            return
        ident = ctypes.c_ulong(thread.ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Stop))
        thread.join(_PATIENCE_S)
