"""Experts whose kernels lie in one tensor where each has its own, or the other way round."""

import dataclasses
import re
from collections.abc import Mapping, Set

import numpy as np

from folojax.models.files.safetensors_files import HeldTensor, StoredTensor, Tensor

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


_PIECE = re.compile(r"(.+)\.(\d+)\.(\d+)\.weight")
"""A name that a tensor would have, the number of an expert and that of a part of its kernel."""


def piece_name(whole: str, expert: int, part: int) -> str:
    """What conversions of GGUF files call a part of a tensor of all experts, which is in few bits.

    Rows of all parts of an expert, one behind the other, are its kernel as [out, in].
    """
    return f"{whole}.{expert}.{part}.weight"


@dataclasses.dataclass(frozen=True)
class PiecedTensor:
    """The kernels of all experts, whose parts lie apart, read as floats."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[Tensor, ...], ...]  # of each expert
    is_in_out: bool  # how a kernel lies in the whole
    dtype: str = "F32"

    def read_into(self, target: np.ndarray) -> None:
        """As `StoredTensor.read_into` does, part by part."""
        for kernel, pieces in zip(target, self.pieces, strict=True):
            rows, start = kernel.T if self.is_in_out else kernel, 0
            for piece in pieces:
                piece.read_into(rows[start : (start := start + piece.shape[0])])


def join_pieces(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], is_out_in: bool
) -> dict[str, Tensor]:
    """Every tensor, those that `piece_name` names as parts of the ones that are wanted.

    Raises:
        ValueError: parts do not make what is wanted.
    """
    found: dict[str, Tensor] = {}
    parted: dict[str, dict[tuple[int, int], Tensor]] = {}
    for name, tensor in tensors.items():
        piece = _PIECE.fullmatch(name)
        if piece is None or len(wanted.get(piece[1], ())) != 3:
            found[name] = tensor
        else:
            parted.setdefault(piece[1], {})[int(piece[2]), int(piece[3])] = tensor
    for whole, parts in parted.items():
        count, *shape = wanted[whole]
        rows, width = shape if is_out_in else shape[::-1]
        pieces = tuple(
            tuple(parts[key] for key in sorted(parts) if key[0] == expert)
            for expert in range(count)
        )
        is_whole = all(
            sum(piece.shape[0] for piece in own) == rows
            and all(piece.shape[1:] == (width,) for piece in own)
            for own in pieces
        )
        if not is_whole or sum(map(len, pieces)) != len(parts):
            raise ValueError(f"the parts of {whole} do not make {wanted[whole]}")
        found[whole] = PiecedTensor(whole, wanted[whole], pieces, not is_out_in)
    return found


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
