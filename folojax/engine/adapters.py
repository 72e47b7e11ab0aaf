"""The adapters that an engine knows, by name."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from folojax.engine.weights import fingerprint
from folojax.models.core.low_rank import Adapter, adapter_of_tree
from folojax.models.core.shards import whole_shapes
from folojax.models.files.peft_adapter import read_peft_adapter
from folojax.requests.lora_request import LoRARequest
from folojax.runner.adapter_slots import AdapterSlots
from folojax.runner.runner import Runner

_FIRST_OWN = 2**31
"""Of the numbers of adapters in memory: users count theirs from 1."""


@dataclasses.dataclass
class Known:
    """An adapter that requests may ask for.

    Attributes:
        request: What names it.
        adapter: Its updates.
        version: How often it has been updated.
    """

    request: LoRARequest
    adapter: Adapter
    version: int = 0

    def fingerprint(self) -> str:
        """Tells it from others, as `folojax.engine.weights.fingerprint` does of parameters."""
        return fingerprint(
            {
                f"{layer}/{name}/{part}": {"a": one.a, "b": one.b, "s": np.array([one.scale])}
                for layer, block in self.adapter.items()
                for name, parts in block.items()
                for part, one in enumerate(parts)
                if one is not None
            }
        )


class KnownAdapters:
    """Finds, reads and checks adapters; the runner has those that are known, too."""

    def __init__(self, runners: Sequence[Runner]) -> None:
        self._runners = tuple(runners)
        self._known: dict[str, Known] = {}
        self._numbers = itertools.count(_FIRST_OWN)

    @property
    def requests(self) -> list[LoRARequest]:
        """What names them."""
        return [one.request for one in self._known.values()]

    def name_of(self, request: LoRARequest | None) -> str | None:
        """The name of a request's adapter, which is read if it is not known yet; None for None.

        Raises:
            ValueError: there are no adapters here, name and number are of different ones, or the
                adapter is refused.
            FileNotFoundError: there is no such.
        """
        if request is None:
            return None
        known = self._known.get(request.lora_name)
        if known is None:
            self._check_new(request)
            if not request.lora_path:
                raise ValueError(
                    f"adapter {request.lora_name!r} is not known, and lora_path is empty: "
                    "load_lora it, or say where it is"
                )
            config, rank = self._runners[0].model.config, self._slots()[0].rank
            adapter = read_peft_adapter(request.lora_path, config, rank)
            self._put(request, adapter)
        elif known.request.lora_int_id != request.lora_int_id or (
            request.lora_path and request.lora_path != known.request.lora_path
        ):
            raise ValueError(
                f"{request} and {known.request} have one name: give another adapter another name, "
                "or remove_lora the first"
            )
        return request.lora_name

    def load(self, name: str, tree: Any, scale: float) -> LoRARequest:
        """Takes in a tree under a new name; see `LLM.load_lora`."""
        request = LoRARequest(name, next(self._numbers))
        if name in self._known:
            raise ValueError(f"adapter {name!r} is known: update_lora replaces it")
        self._check_new(request)
        self._put(request, self.checked(tree, scale))
        return request

    def checked(self, tree: Any, scale: float) -> Adapter:
        """A tree as an adapter of the model; ValueError if it does not fit."""
        runner, rank = self._runners[0], self._slots()[0].rank
        config = runner.model.config
        return adapter_of_tree(tree, whole_shapes(runner.params, config), config, rank, scale)

    def update(self, name: str, adapter: Adapter) -> None:
        """Replaces an adapter; nothing is under way with it."""
        known = self[name]
        for slots in self._slots():
            slots.put(name, adapter)
        known.adapter = adapter
        known.version += 1

    def remove(self, name: str) -> None:
        """Forgets an adapter that no request has."""
        for slots in self._slots():
            slots.remove(name)
        del self._known[name]

    def __getitem__(self, name: str) -> Known:
        known = self._known.get(name)
        if known is None:
            raise ValueError(f"adapter {name!r} is not known; there are {sorted(self._known)}")
        return known

    def _put(self, request: LoRARequest, adapter: Adapter) -> None:
        for slots in self._slots():
            slots.put(request.lora_name, adapter)
        self._known[request.lora_name] = Known(request, adapter)

    def _check_new(self, request: LoRARequest) -> None:
        self._slots()
        for other in self.requests:
            if other.lora_int_id == request.lora_int_id:
                raise ValueError(f"{request} and {other} have one number: give each its own")

    def _slots(self) -> list[AdapterSlots]:
        """Of each runner."""
        found = [one.adapters for one in self._runners if one.adapters is not None]
        if not found:
            raise ValueError("the engine has no room for adapters: pass enable_lora=True to LLM")
        return found
