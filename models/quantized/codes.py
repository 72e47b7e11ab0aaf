"""Kernels as files have them, and the way from there to the kernels of products, and back."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float16, Float32, UInt8

from folojax.models.quantized.float8_kernels import Float8Kernel
from folojax.models.quantized.group_kernels import GROUP, pack_groups, unpack_groups
from folojax.models.quantized.int8_kernels import Int8Kernel
from folojax.models.quantized.quantize import QuantizedKernel, kernel_kind
from folojax.models.quantized.tiled_kernels import (
    TiledKernel,
    fits_tiles,
    pack_tiles,
    unpack_tiles,
    widened,
)


class Codes(NamedTuple):
    """A kernel as a file has it, on the host: a weight is (code - zero) * scale."""

    values: UInt8[np.ndarray, "O I"]
    scale: Float32[np.ndarray, "O G"]
    zero: Float32[np.ndarray, "O G"]
    group: int  # inputs that share a scale
    bits: int


def kernel_of_codes(name: str, parts: Sequence[Codes], quantization: str) -> QuantizedKernel | None:
    """A kernel that lies as codes already, its parts joined along the outputs.

    The codes are kept, where the quantisation has as many bits for a kernel of that name and a
    scale for each of their groups; None: they have to be rounded anew, as floats. In groups, a
    scale is rounded to float16, and so is the product with a zero that makes an offset; in tiles
    both are rounded to bfloat16.
    """
    shape = sum(len(one.values) for one in parts), parts[0].values.shape[1]
    kind = kernel_kind(name, shape, quantization)
    if kind is None:
        return None
    if kind == "tiles":
        return _tiles_of(parts, shape)
    if kind == "output":
        if any(one.scale.shape[1] > 1 for one in parts):
            return None
        values = np.concatenate([one.values - one.zero.astype(np.int16) for one in parts])
        if values.min() < -128 or values.max() > 127:
            return None
        scale = np.concatenate([one.scale[:, 0] for one in parts])
        return Int8Kernel(jnp.asarray(values.astype(np.int8)), jnp.asarray(scale))
    bits = {"groups4": 4, "groups8": 8}.get(kind, 0)
    if any(one.bits > bits or one.group % GROUP for one in parts):
        return None
    groups = shape[1] // GROUP

    def spread(numbers: Float32[np.ndarray, "O G"], group: int) -> Float16[np.ndarray, "O Q"]:
        with np.errstate(over="ignore"):
            return np.repeat(numbers, group // GROUP, axis=1)[:, :groups].astype(np.float16)

    scale = np.concatenate([spread(one.scale, one.group) for one in parts])
    offset = np.concatenate([spread(-one.zero * one.scale, one.group) for one in parts])
    codes = np.concatenate([one.values for one in parts]).reshape(-1, groups, GROUP)
    return pack_groups(jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(offset), bits=bits)


def _tiles_of(parts: Sequence[Codes], shape: tuple[int, int]) -> TiledKernel | None:
    group = parts[0].group
    is_alike = all((one.bits, one.group) == (4, group) for one in parts)
    if not is_alike or not fits_tiles(shape, group):
        return None
    codes = np.concatenate([one.values for one in parts])
    scale = np.concatenate([one.scale for one in parts])
    offset = np.concatenate([(8 - one.zero) * one.scale for one in parts])
    return pack_tiles(codes, *(jnp.asarray(one, jnp.bfloat16) for one in (scale, offset)))


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
