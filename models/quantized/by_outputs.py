"""Quantised kernels with their outputs first: several devices cut these as they cut floats.

How a kernel's numbers lie is for those who multiply with them: groups of 64 outputs side by side,
or blocks of inputs before outputs. Here all that belongs to an output lies together, and goes back.
No bit changes, no code is unpacked; arrays may be NumPy's or JAX's.
"""

from collections.abc import Sequence
from typing import Any

from folojax.models.quantized.float8_kernels import fits_float8
from folojax.models.quantized.group_kernels import GROUP, PANEL, TILE, GroupKernel, fits_groups
from folojax.models.quantized.int8_kernels import Int8Kernel
from folojax.models.quantized.quantize import QuantizedKernel
from folojax.models.quantized.tiled_kernels import TiledKernel, fits_tiles


def arrays_by_output(kernel: QuantizedKernel) -> list[Any]:
    """The arrays of a kernel, whose first axis are its O outputs."""
    if isinstance(kernel, GroupKernel):
        panels, groups, _ = kernel.codes.shape
        blocks = kernel.codes.reshape(panels, groups, PANEL // TILE, -1, TILE, 4)
        codes = blocks.transpose(0, 2, 4, 1, 3, 5).reshape(panels * PANEL, groups, -1)
        rest = [
            one.swapaxes(1, 2).reshape(panels * PANEL, groups)
            for one in (kernel.scale, kernel.offset)
        ]
        return [codes, *rest]
    if isinstance(kernel, TiledKernel):
        return [kernel.words.swapaxes(0, 1), kernel.pairs.T]
    return list(kernel)


def kernel_by_output(kind: type, arrays: Sequence[Any]) -> Any:
    """The inverse, of a kernel of this type."""
    if kind is GroupKernel:
        codes, *rest = arrays
        outputs, groups, size = codes.shape
        tiles = codes.reshape(-1, PANEL // TILE, TILE, groups, size // 4, 4)
        packed = tiles.transpose(0, 3, 1, 4, 2, 5).reshape(outputs // PANEL, groups, -1)
        return GroupKernel(packed, *(one.reshape(-1, PANEL, groups).swapaxes(1, 2) for one in rest))
    if kind is TiledKernel:
        words, pairs = arrays
        return TiledKernel(words.swapaxes(0, 1), pairs.T)
    return kind(*arrays)


def axes_of(kernel: QuantizedKernel, side: int) -> list[int | None]:
    """Along which axis each array of a kernel has its outputs (side 0) or inputs (1), if it has."""
    if isinstance(kernel, TiledKernel):
        return [1 - side] * 2
    if isinstance(kernel, GroupKernel):
        return [side] * 3
    return [side, None if side else 0]


def misfit(kernel: QuantizedKernel, shape: tuple[int, int]) -> str | None:
    """What sides a part of a kernel has to have, if one of this shape cannot be cut out of it."""
    if isinstance(kernel, GroupKernel):
        needed = f"multiples of {PANEL} outputs and {GROUP} inputs"
        return None if fits_groups(shape) else needed
    if isinstance(kernel, TiledKernel):
        needed = f"multiples of 64 outputs, and of 128 and {kernel.group} inputs"
        return None if fits_tiles(shape, kernel.group) else needed
    is_fit = isinstance(kernel, Int8Kernel) or fits_float8(shape)
    return None if is_fit else "multiples of 16 outputs and inputs"
