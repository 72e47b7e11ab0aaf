"""What a user builds into an engine, functions and taps: which of them a step needs."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from folojax.processors import LogitsProcessor
from folojax.residual import ActivationEdit


@dataclasses.dataclass(frozen=True)
class UserFunctions:
    """Logits processors and activation edits, in the order in which they apply, and taps.

    Attributes:
        processors: Of the logits.
        edits: Of the residual stream.
        taps: Layers behind which the stream is read.

    Raises:
        ValueError: two of a kind have one name, or an edit has no layer.
    """

    processors: tuple[LogitsProcessor, ...] = ()
    edits: tuple[ActivationEdit, ...] = ()
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        kinds: dict[str, Iterable[LogitsProcessor | ActivationEdit]] = {
            "logits_processors": self.processors,
            "activation_edits": self.edits,
        }
        for kind, functions in kinds.items():
            names = [one.name for one in functions]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                problems.append(f"{kind} has {twice} more than once; names must differ")
        problems += [
            f"activation edit {one.name!r} has no layers" for one in self.edits if not one.layers
        ]
        problems += [
            f"activation_taps holds {layer!r}; it must hold numbers of layers, from 0"
            for layer in self.taps
            if isinstance(layer, bool) or not isinstance(layer, int)
        ]
        if len(set(self.taps)) < len(self.taps):
            problems.append(f"activation_taps is {list(self.taps)}; layers must differ")
        if problems:
            raise ValueError("; ".join(problems))

    def check_strict(self, is_strict: bool) -> None:
        """Raises a ValueError if there are any in an engine that compiles only what is planned."""
        names = [one.name for one in (*self.processors, *self.edits)]
        if is_strict and (names or self.taps):
            raise ValueError(
                "strict is True and there are logits_processors, activation_edits or "
                f"activation_taps ({[*names, *self.taps]}), which no compile plan lists: leave "
                "them out, or set strict to False"
            )

    def check_layers(self, num_layers: int) -> None:
        """Raises a ValueError if an edit or a tap names a layer that the model lacks."""
        named = {f"activation edit {one.name!r}": one.layers for one in self.edits}
        for who, layers in (named | {"activation_taps": self.taps}).items():
            wrong = [layer for layer in layers if not 0 <= layer < num_layers]
            if wrong:
                raise ValueError(
                    f"{who} names layers {wrong}; the model has layers 0 to {num_layers - 1}"
                )

    def tapped_bytes(self, module: Any) -> int:
        """What the tapped streams of one token take, in the model's dtype."""
        return len(self.taps) * module.config.hidden_size * jnp.dtype(module.dtype).itemsize


NO_FUNCTIONS = UserFunctions()
