"""Kernels that a checkpoint keeps in few bits: how their codes lie, and the floats that they mean.

Whatever the format, a weight is `(code - zero) * scale`; a block of outputs and inputs shares scale
and zero. Codes of four or eight bits are unsigned here, as their zeros are; float8 has no zero.
Where GGUF has offsets that are no products of scale and zero it is `code * scale + offset`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np

from folojax.models.files.safetensors_files import StoredTensor
from folojax.models.quantized.codes import Codes

Layout: TypeAlias = Literal["gptq", "awq", "packed", "int8", "float8"]
"""How the codes of a kernel [O, I] lie in the file, here eight of four bits in an int32:

    gptq    [I / 8, O]    the inputs of an output one behind the other, from the lowest bits up
    awq     [I, O / 8]    the outputs of an input, in the order of `_AWQ`
    packed  [O, I / 8]    the inputs of an output (compressed-tensors)
    int8    [O, I]        plain signed integers
    float8  [O, I]        plain float8_e4m3fn
"""

# Where in an int32 output 0 to 7 of eight is (AutoAWQ's `AWQ_REVERSE_ORDER`).
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)

_BLOCK_WEIGHTS = 2**22


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A kernel in checked files, read as `StoredTensor` is: as floats; or as its codes."""

    name: str  # as if it were floats: "….weight"
    shape: tuple[int, int]  # O and I
    layout: Layout
    bits: int
    codes: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None
    block: tuple[int, int]
    """Outputs and inputs that share a scale, the last ones perhaps fewer."""
    group_of: np.ndarray | None = None
    """The group of each input, where they do not follow each other (GPTQ's `desc_act`)."""
    zero_step: int = 0  # added to the zeros as they are stored
    dtype: str = "F32"  # what it is read as
    offset: StoredTensor | None = None  # in place of zeros

    def read_into(self, target: np.ndarray) -> None:
        """Computes the floats where they are wanted, rounded once, to the dtype of `target`.

        Beside it the codes are in memory, a byte for each, and some rows in float32.

        Raises:
            ValueError: the file cannot be read; it is named.
        """
        codes = self._codes()
        scale, zero, offset = self._scale(), self._zero(), self._offset()
        for rows, index in self._row_blocks():
            weights = codes[rows].astype(np.float32)
            if zero is not None:
                weights -= self._by_input(zero[index])
            weights *= self._by_input(scale[index])
            if offset is not None:
                weights += self._by_input(offset[index])
            with np.errstate(over="ignore"):  # float16 of what is too large is infinite
                target[rows] = weights

    def read_codes(self) -> Codes | None:
        """The codes themselves; None of float8, and of groups whose inputs lie apart."""
        zero = self._zero()
        if zero is None or self.group_of is not None:
            return None
        row_of = np.arange(self.shape[0]) // self.block[0]
        offset = self._offset()
        return Codes(
            self._codes(),
            self._scale()[row_of],
            zero[row_of],
            self.block[1],
            self.bits,
            None if offset is None else offset[row_of],
        )

    def read_float8(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Values in float8 and a scale for each output; None where it has another one for inputs.

        Of other layouts there are none.
        """
        if self.layout != "float8" or self.group_of is not None or self.block[1] < self.shape[1]:
            return None
        scale = self._scale()[np.arange(self.shape[0]) // self.block[0], 0]
        return self._codes(), scale

    def _row_blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Some outputs after the other, and the row of scales of each of them."""
        count = max(1, _BLOCK_WEIGHTS // max(1, self.shape[1]))
        for first in range(0, self.shape[0], count):
            rows = slice(first, min(first + count, self.shape[0]))
            yield rows, np.arange(rows.start, rows.stop) // self.block[0]

    def _by_input(self, grid: np.ndarray) -> np.ndarray:
        """[rows, groups] as something that broadcasts to [rows, I]."""
        if self.group_of is not None:
            return grid[:, self.group_of]
        if grid.shape[1] == 1:
            return grid
        return np.repeat(grid, self.block[1], axis=1)[:, : self.shape[1]]

    def _codes(self) -> np.ndarray:
        """[O, I], a byte each."""
        stored = self.codes.read()
        match self.layout:
            case "gptq":
                return _unpack(stored.T, self.bits)
            case "awq":
                return np.ascontiguousarray(_unpack_awq(stored).T)
            case "packed":
                return _unpack(stored, self.bits)[:, : self.shape[1]]
            case "int8":
                return stored.view(np.uint8) ^ 128
            case "float8":
                return stored

    def _scale(self) -> np.ndarray:
        """float32 [rows of blocks, groups]."""
        stored = self.scale.read().astype(np.float32)
        return stored.T if self.layout in ("gptq", "awq") else stored.reshape(self._grid())

    def _zero(self) -> np.ndarray | None:
        """The same for the zeros; None for float8."""
        if self.layout == "float8":
            return None
        if self.offset is not None:
            return np.zeros(self._grid(), np.float32)
        if self.zero is None:
            return np.full(self._grid(), 2 ** (self.bits - 1), np.float32)
        stored = self.zero.read()
        match self.layout:
            case "gptq":
                # In a byte: the first version stores one less than the zero, modulo 2 to the bits.
                zero = (_unpack(stored, self.bits) + self.zero_step) & (2**self.bits - 1)
                zero = zero[:, : self.shape[0]].T
            case "awq":
                zero = _unpack_awq(stored).T
            case "packed" if self.zero.dtype == "I32":
                zero = _unpack(stored.T, self.bits)[:, : self.shape[0]].T
            case _:  # signed, as codes of eight bits are
                return stored.reshape(self._grid()).astype(np.float32) + 2 ** (self.bits - 1)
        return zero.astype(np.float32)

    def _offset(self) -> np.ndarray | None:
        """The same for the offsets; None where there are none."""
        if self.offset is None:
            return None
        return self.offset.read().astype(np.float32).reshape(self._grid())

    def _grid(self) -> tuple[int, int]:
        return grid_of(self.shape, self.block)


def grid_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a kernel has, along outputs and along inputs."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes in int32 [rows, words], from the lowest bits up: uint8 [rows, codes]."""
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return data
    codes = np.empty((*data.shape, 2), np.uint8)
    np.bitwise_and(data, 15, out=codes[..., 0])
    np.right_shift(data, 4, out=codes[..., 1])
    return codes.reshape(len(data), -1)


def _unpack_awq(words: np.ndarray) -> np.ndarray:
    eights = _unpack(words, 4).reshape(len(words), -1, 8)
    return eights[..., _AWQ].reshape(len(words), -1)
