"""Which adapter a request is continued with, in vLLM's words."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from folojax.text.plain_numbers import plain


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """Names an adapter, and where it is to be read if it is not known yet.

    Attributes:
        lora_name: Of the adapter; a name stands for one adapter only.
        lora_int_id: From 1; likewise.
        lora_path: A directory that peft has written; "" for one that `LLM.load_lora` was given.

    Raises:
        ValueError: a field is none of these.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_int_id", plain(self.lora_int_id))
        problems = []
        if not isinstance(self.lora_name, str) or not self.lora_name:
            problems.append(f"lora_name is {self.lora_name!r}; it must be a string, not empty")
        number = self.lora_int_id
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            problems.append(f"lora_int_id is {number!r}; it must be an integer of at least 1")
        if not isinstance(self.lora_path, str | os.PathLike):
            problems.append(f"lora_path is {self.lora_path!r}; it must be a path")
        if problems:
            raise ValueError("LoRARequest: " + "; ".join(problems))
        object.__setattr__(self, "lora_path", os.fspath(self.lora_path))

    @property
    def name(self) -> str:
        """`lora_name`."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """`lora_int_id`."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """`lora_path`."""
        return self.lora_path


LoRAs: TypeAlias = LoRARequest | Sequence[LoRARequest | None] | None
"""One adapter for all prompts of a call, or one or None for each."""


def lora_per_prompt(lora_request: Any, num_prompts: int) -> list[LoRARequest | None]:
    """The adapter of each prompt; None is none.

    Raises:
        ValueError: a list of another length, or something else in it.
    """
    if lora_request is None or isinstance(lora_request, LoRARequest):
        return [lora_request] * num_prompts
    if isinstance(lora_request, str | bytes) or not isinstance(lora_request, Sequence):
        raise ValueError(
            f"lora_request is {lora_request!r:.80}; it must be a LoRARequest, a list with one or "
            "None for each prompt, or None"
        )
    if not lora_request:
        return [None] * num_prompts
    others = [one for one in lora_request if one is not None and not isinstance(one, LoRARequest)]
    if others:
        raise ValueError(f"lora_request holds {others[0]!r:.80}; it must hold LoRARequests or None")
    if len(lora_request) != num_prompts:
        raise ValueError(
            f"lora_request has {len(lora_request)} entries for {num_prompts} prompts: give one for "
            "all, or a list with one for each"
        )
    return list(lora_request)
