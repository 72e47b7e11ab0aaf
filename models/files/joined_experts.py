"""Experts whose kernels a checkpoint has in one tensor, read as one of each."""

from collections.abc import Mapping, Set

from folojax.models.files.safetensors_files import HeldTensor, StoredTensor, Tensor

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def part_experts(tensors: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """Every tensor, those of all experts in their parts where these are what is wanted.

    What is called `experts.gate_up_proj`, [X, 2F, E], or `experts.down_proj`, [X, E, F], is X times
    `experts.<x>.gate_proj.weight` and so on, one behind the other: copies nothing.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, role = name.rpartition(".")
        parts = _PARTS.get(role, ()) if prefix.endswith("experts") else ()
        is_joined = bool(parts) and len(tensor.shape) == 3 and not tensor.shape[1] % len(parts)
        count = tensor.shape[0] if is_joined else 0
        names = [f"{prefix}.{x}.{part}.weight" for x in range(count) for part in parts]
        if not isinstance(tensor, StoredTensor | HeldTensor) or not names or set(names) - wanted:
            found[name] = tensor
            continue
        shape = tensor.shape[1] // len(parts), tensor.shape[2]
        found |= {one: tensor.cut(one, place, shape) for place, one in enumerate(names)}
    return found
