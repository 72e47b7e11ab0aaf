"""The calls of `LLM` that load, update and remove adapters."""

from collections.abc import Sequence
from typing import Any

from folojax.engine import lora_updates
from folojax.engine.engine import Engine
from folojax.engine.replicas import Replicas
from folojax.engine.request_loop import RequestLoop
from folojax.engine.shared_engine import exclusive
from folojax.requests.lora_request import LoRARequest


class LoraCalls(RequestLoop):
    """The part of `LLM` that knows adapters (docs/lora.md)."""

    @exclusive
    def load_lora(self, lora_name: str, tree: Any, scale: float = 1.0) -> LoRARequest:
        """Takes in an adapter that is in memory.

        It is brought to a slot on the device at once if one is free, which has a copy then. Where
        more than `max_loras` adapters are known, its arrays are read again whenever it comes back
        to a slot: they have to be alive and unchanged.

        Args:
            lora_name: Of no other adapter.
            tree: As `folojax.init_lora` makes it, of rank up to `max_lora_rank`.
            scale: Of all of its updates; often alpha / r.

        Returns:
            What `generate` and other calls take as `lora_request`.

        Raises:
            ValueError: the tree does not fit the model, or the name is taken.
        """
        return self.engine.adapters.load(lora_name, tree, scale)

    @exclusive
    def update_lora(
        self, lora_name: str, tree: Any, scale: float = 1.0, running: str = "recompute"
    ) -> None:
        """Goes on with another state of an adapter, such as after a step of training.

        No step is compiled anew. Cached keys and values of this adapter are dropped, those of
        others and of the model alone stay. `CompletionOutput.lora_versions` tells which tokens
        came before and after.

        Args:
            lora_name: Of a known adapter.
            tree: As in `load_lora`.
            scale: As in `load_lora`.
            running: What becomes of unfinished requests with this adapter; as in `update_params`.

        Raises:
            ValueError: there is no such adapter, or the tree does not fit; nothing has changed.
        """
        lora_updates.update_lora(self._engines(), lora_name, tree, scale, running)

    @exclusive
    def remove_lora(self, lora_name: str) -> None:
        """Forgets an adapter, and what is cached of it.

        Raises:
            ValueError: there is no such adapter, or unfinished requests have it.
        """
        lora_updates.remove_lora(self._engines(), lora_name)

    @exclusive
    def list_loras(self) -> list[LoRARequest]:
        """The known adapters."""
        return self.engine.adapters.requests

    def _engines(self) -> Sequence[Engine]:
        return self.replicas.engines if isinstance(self.replicas, Replicas) else (self.replicas,)
