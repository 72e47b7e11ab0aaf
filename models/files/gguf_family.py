"""How an architecture of GGUF files is read, and what several of them have in common."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

FULL, LOCAL = "full_attention", "sliding_attention"

_MOST_LAYERS = 2**10

Metadata = Mapping[str, Any]
Read = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """How one GGUF architecture is read."""

    architecture: str  # of the Hugging Face config
    extra: Callable[[Read], dict[str, Any]] = lambda read: {}
    """Further entries of its config; `read(key, default)` gives metadata, and counts a key without
    a default as missing. `further_rope` goes into `rope_parameters`, which are of heads of
    `rope_head_dim`, or of `head_dim`; an entry of that name takes the place of them all."""
    by_tensor: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Entries of its config that are true if some layer has a tensor of this name."""
    by_lack: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """The same if some layer has the first of two weights and lacks the second."""
    is_permuted: bool = False
    """Rows of queries and keys are in llama.cpp's order (see `gguf_layout`)."""
    norm_offset: float = 0.0  # was added to every norm's weight, but those of recurrent layers
    is_conv1d: bool = False  # kernels were transposed from [in, out]


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for the 9.999999747e-06 of the file."""
    return float(str(np.float32(value)))


def window(read: Read) -> dict[str, Any]:
    """The window, where a 0 is none."""
    return {"sliding_window": read("attention.sliding_window", None) or None}


def num_layers(read: Read) -> int:
    """Without those that guess further tokens, which the file counts too.

    Raises:
        ValueError: no model has so many.
    """
    count = read("block_count")
    if count > _MOST_LAYERS:
        raise ValueError(f"block_count is {count}: no model has so many layers")
    return count - read("nextn_predict_layers", 0)


def by_layer(read: Read, key: str) -> list[Any]:
    """What a list says of each layer; a number says it of all.

    Raises:
        ValueError: the list ends before the layers do.
    """
    value, count = read(key), num_layers(read)
    return _listed(key, value, count) if isinstance(value, list) else [value] * count


def _listed(key: str, value: list[Any], count: int) -> list[Any]:
    """The entries of as many layers; those that guess further tokens may have some too."""
    if len(value) < count:
        raise ValueError(f"{key} has {len(value)} entries for {count} layers: it needs as many")
    return value[:count]


def kinds_of(is_local: list[bool]) -> list[str]:
    """`layer_types` of layers with a window and without."""
    return [LOCAL if one else FULL for one in is_local]


def local_layers(read: Read, *period: int) -> list[bool]:
    """Which layers have a window: what a list says, or all but every so many-th.

    Some files have a number in the place of a list; `period` is that of files that have neither,
    without which these are refused.

    Raises:
        ValueError: the list ends before the layers do.
    """
    key, count = "attention.sliding_window_pattern", num_layers(read)
    stated = read(key, *period)
    if isinstance(stated, list):
        return _listed(key, stated, count)
    return [(layer + 1) % stated != 0 for layer in range(count)]


def experts_alone(read: Read) -> dict[str, Any]:
    """How many experts there are, and how many a token goes to."""
    return {
        "num_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
    }


def expert_sizes(read: Read) -> dict[str, Any]:
    """The same, with their width."""
    return experts_alone(read) | {"moe_intermediate_size": read("expert_feed_forward_length")}
