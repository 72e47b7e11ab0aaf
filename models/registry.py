"""Which architectures exist: one row a family.

To add a family whose layers differ from Llama's by these flags alone, add a row; for others, write
a module with the interface of `folojax.models.llama.Llama` and name it in the row.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What an architecture's name implies beyond the numbers in its config.json."""

    module: str
    """`package.module:Class` of the Flax module. A name, so reading a config imports no Flax."""
    qkv_bias: bool = False
    qk_norm: bool = False
    default_head_dim: int | None = None
    """Used when config.json states none; None means hidden_size / num_attention_heads."""


_LLAMA = "folojax.models.llama:Llama"

FAMILIES = {
    # SmolLM, SmolLM2 and TinyLlama call themselves Llama too.
    "LlamaForCausalLM": Family(module=_LLAMA),
    "Qwen2ForCausalLM": Family(module=_LLAMA, qkv_bias=True),
    "Qwen3ForCausalLM": Family(module=_LLAMA, qk_norm=True, default_head_dim=128),
}


def family_of(architectures: Any) -> tuple[str, Family]:
    """Finds the row for the `architectures` entry of a config.json.

    Returns:
        The architecture's name and its row.

    Raises:
        ValueError: the entry is no list of names, or none of them is in the registry.
    """
    names = architectures if isinstance(architectures, list | tuple) else [architectures]
    for name in names:
        if isinstance(name, str) and name in FAMILIES:
            return name, FAMILIES[name]
    raise ValueError(
        f"architectures {architectures!r} is not supported; supported: {', '.join(FAMILIES)}"
    )
