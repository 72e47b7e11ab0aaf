"""The mode that an engine runs in: which backends it gets for what it was asked."""

import logging
from typing import Any

from folojax.backend.backend import Backend

_LOG = logging.getLogger("folojax")


def deterministic_backends(backends: tuple[Backend, ...], *asked: Any) -> tuple[Backend, ...]:
    """The same in deterministic mode; a slow way is told in the log, with the reason.

    Args:
        backends: Of engines that are alike.
        *asked: As of `Backend.deterministic`.
    """
    found = tuple(backend.deterministic(*asked) for backend in backends)
    if found[0].steps != backends[0].exact_steps:
        _LOG.warning(
            "deterministic mode goes token by token, several times slower: its fast way %s",
            backends[0].not_ordered(*asked),
        )
    return found
