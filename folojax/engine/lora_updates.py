"""Adapters between two steps: others in their place, or none."""

from collections.abc import Iterator, Sequence
from typing import Any

from folojax.engine.engine import Engine
from folojax.engine.reports import Live
from folojax.engine.weights import check_policy


def update_lora(
    engines: Sequence[Engine], name: str, tree: Any, scale: float, running: str
) -> None:
    """Replaces an adapter; what was computed with it is dropped. See `LLM.update_lora`."""
    check_policy(running)
    known = engines[0].adapters
    known[name]  # or there is none
    adapter = known.checked(tree, scale)
    for engine in engines:
        engine.drain()
        engine.scheduler.drop_adapter(name, keeps_running=running == "keep")
    if running == "restart":
        for live in _users(engines, name):
            live.restart()
    known.update(name, adapter)


def remove_lora(engines: Sequence[Engine], name: str) -> None:
    """Forgets an adapter; see `LLM.remove_lora`."""
    known = engines[0].adapters
    known[name]  # or there is none
    users = sorted(live.request_id for live in _users(engines, name))
    if users:
        raise ValueError(f"requests {users} go on with adapter {name!r}: abort them first")
    for engine in engines:
        engine.drain()
        engine.scheduler.drop_adapter(name, keeps_running=False)
    known.remove(name)


def _users(engines: Sequence[Engine], name: str) -> Iterator[Live]:
    """Unfinished requests with an adapter."""
    for engine in engines:
        yield from (one for one in engine.live.values() if one.parts[0].adapter == name)
