"""Kernels as files have them, and the way from there to the kernels of products, and back."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float16, Float32, UInt8

from folojax.models.quantized.float8_kernels import Float8Kernel
from folojax.models.quantized.group_kernels import (
    GROUP,
    pack_groups,
    round_to_groups,
    unpack_groups,
)
from folojax.models.quantized.int8_kernels import Int8Kernel
from folojax.models.quantized.quantize import QuantizedKernel, kernel_kind
from folojax.models.quantized.tiled_kernels import (
    TiledKernel,
    fits_tiles,
    pack_tiles,
    round_to_tiles,
    unpack_tiles,
    widened,
)


class Codes(NamedTuple):
    """A kernel as a file has it, on the host: a weight is (code - zero) * scale + offset."""

    values: UInt8[np.ndarray, "O I"]
    scale: Float32[np.ndarray, "O G"]
    zero: Float32[np.ndarray, "O G"]
    group: int  # inputs that share a scale
    bits: int
    offset: Float32[np.ndarray, "O G"] | None = None  # None: 0


Part: TypeAlias = Codes | Float32[np.ndarray, "O I"]
"""Some outputs of a kernel, which a file has as codes or as floats."""


def kernel_of_codes(name: str, parts: Sequence[Part], quantization: str) -> QuantizedKernel | None:
    """A kernel whose parts, joined along the outputs, lie as codes already, or some of them do.

    The codes are kept, where the quantisation has as many bits for a kernel of that name and a
    scale for each of their groups, and the other parts are rounded to as many; None: all have to be
    rounded anew, as floats. In groups, a scale is rounded to float16, and so is the offset, which
    is that of the codes less scale times zero; in tiles both are rounded to bfloat16.
    """
    arrays = [one.values if isinstance(one, Codes) else one for one in parts]
    shape = sum(map(len, arrays)), arrays[0].shape[1]
    kind = kernel_kind(name, shape, quantization)
    if kind is None:
        return None
    if kind == "tiles":
        return _tiles_of(parts, shape)
    if kind == "output":
        return _outputs_of(parts)
    bits = {"groups4": 4, "groups8": 8}.get(kind, 0)
    coded = _coded(
        parts,
        lambda one: one.bits <= bits and one.group % GROUP == 0,
        lambda floats: _rounded_to_groups(floats, bits),
    )
    if coded is None:
        return None
    groups = shape[1] // GROUP

    def spread(numbers: Float32[np.ndarray, "O G"], group: int) -> Float16[np.ndarray, "O Q"]:
        with np.errstate(over="ignore"):
            return np.repeat(numbers, group // GROUP, axis=1)[:, :groups].astype(np.float16)

    scale = np.concatenate([spread(one.scale, one.group) for one in coded])
    offset = np.concatenate([spread(_meant(one, 0), one.group) for one in coded])
    codes = np.concatenate([one.values for one in coded]).reshape(-1, groups, GROUP)
    return pack_groups(jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(offset), bits=bits)


def _outputs_of(parts: Sequence[Part]) -> Int8Kernel | None:
    coded = [one for one in parts if isinstance(one, Codes)]
    if len(coded) < len(parts):
        return None
    if any(one.scale.shape[1] > 1 or one.offset is not None for one in coded):
        return None
    values = np.concatenate([one.values - one.zero.astype(np.int16) for one in coded])
    if values.min() < -128 or values.max() > 127:
        return None
    scale = np.concatenate([one.scale[:, 0] for one in coded])
    return Int8Kernel(jnp.asarray(values.astype(np.int8)), jnp.asarray(scale))


def _tiles_of(parts: Sequence[Part], shape: tuple[int, int]) -> TiledKernel | None:
    group = next((one.group for one in parts if isinstance(one, Codes) and one.bits == 4), 0)
    if not group or not fits_tiles(shape, group):
        return None
    coded = _coded(
        parts,
        lambda one: (one.bits, one.group) == (4, group),
        lambda floats: _rounded_to_tiles(floats, group),
    )
    assert coded is not None
    codes = np.concatenate([one.values for one in coded])
    scale = np.concatenate([one.scale for one in coded])
    offset = np.concatenate([_meant(one, 8) for one in coded])
    return pack_tiles(codes, *(jnp.asarray(one, jnp.bfloat16) for one in (scale, offset)))


def _coded(
    parts: Sequence[Part],
    is_kept: Callable[[Codes], bool],
    rounded: Callable[[Float32[np.ndarray, "O I"]], Codes],
) -> list[Codes] | None:
    """All parts as codes; None if none has codes that are kept."""
    kept = [isinstance(one, Codes) and is_kept(one) for one in parts]
    if not any(kept):
        return None
    floats = (_floats(one) if isinstance(one, Codes) else one for one in parts)
    return [
        one if is_one and isinstance(one, Codes) else rounded(wide)
        for one, is_one, wide in zip(parts, kept, floats, strict=True)
    ]


def _meant(codes: Codes, code: int) -> Float32[np.ndarray, "O G"]:
    """The weight that a code means, in each group."""
    offset = (code - codes.zero) * codes.scale
    return offset if codes.offset is None else offset + codes.offset


def _floats(codes: Codes) -> Float32[np.ndarray, "O I"]:
    def spread(numbers: Float32[np.ndarray, "O G"]) -> Float32[np.ndarray, "O I"]:
        return np.repeat(numbers, codes.group, axis=1)[:, : codes.values.shape[1]]

    wide = (codes.values - spread(codes.zero)) * spread(codes.scale)
    return wide if codes.offset is None else wide + spread(codes.offset)


def _rounded_to_groups(floats: Float32[np.ndarray, "O I"], bits: int) -> Codes:
    rounded = round_to_groups(jnp.asarray(floats), bits=bits)
    codes, scale, offset = (np.asarray(one) for one in rounded)
    wide = scale.astype(np.float32)
    zero = np.zeros_like(wide)
    return Codes(codes.reshape(floats.shape), wide, zero, GROUP, bits, offset.astype(np.float32))


def _rounded_to_tiles(floats: Float32[np.ndarray, "O I"], group: int) -> Codes:
    rounded = round_to_tiles(jnp.asarray(floats), group=group)
    codes, scale, offset = (np.asarray(one) for one in rounded)
    wide = scale.astype(np.float32)
    return Codes(codes, wide, np.full_like(wide, 8), group, 4, offset.astype(np.float32))


def codes_of(kernel: QuantizedKernel) -> Codes | None:
    """The inverse of `kernel_of_codes`; None where an offset is no product of scale and a zero.

    Those of tiles have groups of 32 again. Float8 has no codes.
    """
    if isinstance(kernel, Float8Kernel):
        return None
    if isinstance(kernel, TiledKernel):
        return _codes_of_tiles(kernel)
    if isinstance(kernel, Int8Kernel):
        values = np.asarray(kernel.values).view(np.uint8) ^ 128
        scale = np.asarray(kernel.scale)[:, None]
        return Codes(values, scale, np.full_like(scale, 128), values.shape[1], 8)
    codes, scale, offset = (np.asarray(one) for one in unpack_groups(kernel))
    wide, bits = scale.astype(np.float32), kernel.bits
    zero = np.round(-offset / np.where(wide == 0, 1, wide)).clip(0, 2**bits - 1)
    zero[wide == 0] = 2 ** (bits - 1)  # as any other
    if not np.array_equal((-zero * wide).astype(np.float16), offset):
        return None
    return Codes(codes.reshape(kernel.shape), wide, zero, GROUP, bits)


def _codes_of_tiles(kernel: TiledKernel) -> Codes | None:
    codes, scale, offset = (np.asarray(one) for one in unpack_tiles(kernel))
    zero = (8 - np.round(offset / np.where(scale == 0, 1, scale))).clip(0, 15)
    zero[scale == 0] = 8  # as any other
    if not np.array_equal(((8 - zero) * scale).astype(jnp.bfloat16), offset.astype(jnp.bfloat16)):
        return None
    scale, zero = (np.repeat(one, kernel.group // GROUP, axis=1) for one in (scale, zero))
    return Codes(codes, scale, zero, GROUP, 4)


def dequantize(kernel: QuantizedKernel) -> Float32[np.ndarray, "O I"]:
    """The floats that the codes of a kernel mean, on the host."""
    if isinstance(kernel, Int8Kernel | Float8Kernel):
        return np.asarray(kernel.values).astype(np.float32) * np.asarray(kernel.scale)[:, None]
    if isinstance(kernel, TiledKernel):
        return np.asarray(widened(kernel))
    codes, scale, offset = (np.asarray(one) for one in unpack_groups(kernel))
    wide = codes * scale.astype(np.float32)[..., None] + offset.astype(np.float32)[..., None]
    return wide.reshape(kernel.shape)
