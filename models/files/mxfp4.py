"""Experts in MXFP4, as gpt-oss has them: numbers of four bits, a power of two for 32 of them."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from folojax.models.core.param_tree import listed
from folojax.models.files.safetensors_files import StoredTensor, Tensor

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
"""By the code: a sign, two bits of exponent, one of mantissa."""

_GROUP = 32
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclasses.dataclass(frozen=True)
class Mxfp4Tensor:
    """Kernels of X experts in checked files, read as floats [X, I, O]."""

    name: str
    blocks: StoredTensor  # [X, O, I / 32, 16]; a byte is two codes, the lower bits first
    scales: StoredTensor  # [X, O, I / 32]: exponents of two, plus 127
    dtype: str = "F32"  # what it is read as

    @property
    def shape(self) -> tuple[int, ...]:
        """X, I and O."""
        count, outputs, groups, _ = self.blocks.shape
        return count, groups * _GROUP, outputs

    def read_into(self, target: np.ndarray) -> None:
        """Computes the floats where they are wanted, expert by expert.

        Raises:
            ValueError: the file cannot be read; it is named.
        """
        scales = self.scales.read().astype(np.int32) - 127
        for expert, codes in enumerate(self.blocks.read()):
            values = _VALUES[np.stack((codes & 15, codes >> 4), axis=-1)]
            values = np.ldexp(values, scales[expert][:, :, None, None])
            with np.errstate(over="ignore"):  # float16 of what is too large is infinite
                target[expert] = values.reshape(len(codes), -1).T


def join_mxfp4(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Every tensor by the name that floats would have.

    Raises:
        ValueError: blocks and scales do not fit together; all that do not are named.
    """
    found: dict[str, Tensor] = {}
    problems = []
    for name, tensor in tensors.items():
        if name.endswith(_BLOCKS):
            whole = name.removesuffix(_BLOCKS)
            scales = tensors.get(whole + _SCALES)
            is_whole = len(tensor.shape) == 4 and tensor.shape[-1] == _GROUP // 2
            is_fitting = scales is not None and scales.shape == tensor.shape[:-1]
            if scales is None or not (is_whole and is_fitting) or whole in tensors:
                problems.append(f"{whole}: its blocks and scales do not fit together")
            elif {tensor.dtype, scales.dtype} != {"U8"}:
                problems.append(f"{whole}: blocks and scales must be U8")
            else:
                found[whole] = Mxfp4Tensor(whole, tensor, scales)
        elif not (name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in tensors):
            found[name] = tensor
    if problems:
        raise ValueError("quantised kernels are malformed:\n  " + listed(problems, "\n  "))
    return found
