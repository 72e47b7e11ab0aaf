"""The functions that a user builds into an engine, and which of them a step needs."""

import dataclasses
from collections.abc import Iterable

from folojax.processors import LogitsProcessor
from folojax.residual import ActivationEdit


@dataclasses.dataclass(frozen=True)
class UserFunctions:
    """Logits processors and activation edits, in the order in which they apply.

    Raises:
        ValueError: two of a kind have one name, or an edit has no layer.
    """

    processors: tuple[LogitsProcessor, ...] = ()
    edits: tuple[ActivationEdit, ...] = ()

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
        if problems:
            raise ValueError("; ".join(problems))

    def check_strict(self, is_strict: bool) -> None:
        """Raises a ValueError if there are any in an engine that compiles only what is planned."""
        names = [one.name for one in self.processors] + [one.name for one in self.edits]
        if is_strict and names:
            raise ValueError(
                f"strict is True and there are logits_processors or activation_edits ({names}), "
                "which no compile plan lists: leave them out, or set strict to False"
            )

    def check_layers(self, num_layers: int) -> None:
        """Raises a ValueError if an edit names a layer that the model lacks."""
        for one in self.edits:
            wrong = [layer for layer in one.layers if not 0 <= layer < num_layers]
            if wrong:
                raise ValueError(
                    f"activation edit {one.name!r} names layers {wrong}; the model has layers 0 to "
                    f"{num_layers - 1}"
                )


NO_FUNCTIONS = UserFunctions()
