"""The platform that programs are traced for: nearly always the one that they run on."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_TRACED_FOR: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """JAX's name of the platform whose compiler gets what is traced now: "cpu", "gpu" ..."""
    return _TRACED_FOR.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(name: str) -> Iterator[None]:
    """For programs that are compiled for a platform which this machine does not have.

    It holds in this thread, and for what is traced anew: `jax.jit` does not know of it and gives a
    trace that it has of arguments of the same shapes.
    """
    token = _TRACED_FOR.set(name)
    try:
        yield
    finally:
        _TRACED_FOR.reset(token)
