"""Kernels in four bits as an NVIDIA GPU reads them: few rows at the speed of their bytes.

A weight is `(code - 8) * scale + offset`, scale and offset in bfloat16 for each group of inputs of
one output; so are weights of GPTQ, AWQ and compressed-tensors, and their groups are kept. Inputs
are bfloat16 and are not rounded further. Up to `_MOST_TILED` rows one kernel unpacks codes in
registers and multiplies (`tiled_product`), for few of them another (`few_rows_product`), where the
machine can compile it, which gates as well; for more rows weights are widened to a temporary, which
XLA multiplies with.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Int, Int16, Int32, UInt8

from folojax.models.machine import decode_product
from folojax.models.machine.triton import triton
from folojax.models.quantized import few_rows_product
from folojax.models.quantized.group_kernels import GROUP, GroupKernel, unpack_groups
from folojax.models.quantized.tiled_product import BLOCK, multiply_tiles, widen_tiles, words_of

_OUTPUTS = 64
"""Outputs of the largest tile."""

_MOST_TILED = 256
"""Rows up to which unpacking the codes once for every 64 of them is faster than widening them."""


class TiledKernel(NamedTuple):
    """A kernel in a parameter tree, in place of the array.

    B is I / 128, G the groups of an output. A word of a block has the codes of inputs j, j + 32,
    j + 64 and j + 96 from its lowest four bits up. A pair is a scale in the lower half and an
    offset in the upper one, both bfloat16.
    """

    words: Int16[Array, "B O 32"]
    pairs: Int32[Array, "G O"]

    @property
    def shape(self) -> tuple[int, ...]:
        """O and I; before these, how many parts it lies in, if it does."""
        *parts, blocks, outputs, _ = self.words.shape
        return *parts, outputs, blocks * BLOCK

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[-1] // self.pairs.shape[-2]


def fits_tiles(shape: tuple[int, ...], group: int = GROUP) -> bool:
    """Whether a kernel of this shape, in such groups, can be cut into whole tiles."""
    if len(shape) != 2 or shape[0] % _OUTPUTS or shape[1] % BLOCK or shape[1] % group:
        return False
    return group % BLOCK == 0 or (BLOCK % group == 0 and group >= GROUP)


@functools.partial(jax.jit, static_argnames="group")
def quantize_tiles(kernel: Float[Array, "O I"], group: int = GROUP) -> TiledKernel:
    """The kernel in groups, as `round_to_tiles` has it."""
    return pack_tiles(*round_to_tiles(kernel, group))


@functools.partial(jax.jit, static_argnames="group")
def round_to_tiles(
    kernel: Float[Array, "O I"], group: int = GROUP
) -> tuple[UInt8[Array, "O I"], BFloat16[Array, "O G"], BFloat16[Array, "O G"]]:
    """Codes, scales and offsets of a kernel with any number of outputs.

    Codes go from a group's least weight to its largest one; an offset is what code 8 means.
    """
    outputs, inputs = kernel.shape
    weights = kernel.astype(jnp.float32).reshape(outputs, inputs // group, group)
    least, largest = weights.min(axis=-1), weights.max(axis=-1)
    scale = ((largest - least) / 15).astype(jnp.bfloat16)
    step = scale.astype(jnp.float32)
    offset = (least + 8 * step).astype(jnp.bfloat16)
    wide = offset.astype(jnp.float32)[..., None]
    codes = jnp.round((weights - wide) / jnp.where(step == 0, 1, step)[..., None])
    codes = jnp.clip(codes + 8, 0, 15).astype(jnp.uint8)
    return codes.reshape(outputs, inputs), scale, offset


@jax.jit
def pack_tiles(
    codes: UInt8[Array, "O I"], scale: BFloat16[Array, "O G"], offset: BFloat16[Array, "O G"]
) -> TiledKernel:
    """The kernel of these codes, each below 16; an offset is what code 8 means."""
    lower, upper = (
        jax.lax.bitcast_convert_type(one.T, jnp.uint16).astype(jnp.uint32)
        for one in (scale, offset)
    )
    pairs = jax.lax.bitcast_convert_type(lower | upper << 16, jnp.int32)
    return TiledKernel(words_of(codes), pairs)


@jax.jit
def tiles_of_groups(kernel: GroupKernel) -> TiledKernel:
    """The same codes; scales and offsets are rounded to bfloat16."""
    codes, scale, offset = unpack_groups(kernel)
    middle = offset.astype(jnp.float32) + 8 * scale.astype(jnp.float32)
    narrow = scale.astype(jnp.bfloat16), middle.astype(jnp.bfloat16)
    return pack_tiles(codes.reshape(kernel.shape), *narrow)


@jax.jit
def unpack_tiles(
    kernel: TiledKernel,
) -> tuple[UInt8[Array, "O I"], Float[Array, "O G"], Float[Array, "O G"]]:
    """Codes, and scales and offsets in float32, as `pack_tiles` takes them."""
    words = jax.lax.bitcast_convert_type(kernel.words, jnp.uint16)
    codes = jnp.stack([words >> 4 * part & 15 for part in range(4)], axis=2)
    scale, offset = (
        jax.lax.bitcast_convert_type(one, jnp.float32).T
        for one in (kernel.pairs << 16, kernel.pairs & jnp.int32(-(2**16)))
    )
    return codes.astype(jnp.uint8).swapaxes(0, 1).reshape(kernel.shape), scale, offset


def project_tiles(
    x: Float[Array, "N I"], kernel: TiledKernel, dtype: DTypeLike, is_gated: bool = False
) -> Float[Array, "N W"]:
    """A linear layer: `x`, rounded to bfloat16, times the kernel, in `dtype`.

    Args:
        x: The inputs.
        kernel: Of the layer.
        dtype: Of the result.
        is_gated: Whether outputs are gates and ups, side by side, and the result is silu(gate) * up
            of both as they are rounded to the dtype of `x`, computed in float32: W is then O / 2.
    """
    plain = functools.partial(_multiply_plain, dtype=dtype, is_gated=is_gated)
    if triton is None:
        return plain(x, kernel)
    own = functools.partial(_multiply, dtype=dtype, is_gated=is_gated)
    return jax.lax.platform_dependent(x, kernel, cuda=own, default=plain)


def can_gate_tiles(x: Float[Array, "N I"], kernel: TiledKernel) -> bool:
    """Whether the kernel that multiplies such rows on NVIDIA GPUs gates them as well."""
    is_size = triton is not None and x.dtype == jnp.bfloat16
    return is_size and (_are_few(x) or _cut(x, kernel) is not None)


def _cut(x: Array, kernel: TiledKernel) -> decode_product.Cut | None:
    return decode_product.cut_for(x, kernel.shape[0], bits=4)


def _are_few(x: Array) -> bool:
    return x.shape[0] <= few_rows_product.MOST_ROWS and few_rows_product.has_product()


# Jitted, so that a model's layers trace and lower their kernels once.
@functools.partial(jax.jit, static_argnames=("dtype", "is_gated"))
def _multiply(x: Array, kernel: TiledKernel, dtype: DTypeLike, is_gated: bool) -> Array:
    if is_gated and not can_gate_tiles(x, kernel):
        return decode_product.gate(_multiply(x, kernel, x.dtype, is_gated=False), dtype)
    x = x.astype(jnp.bfloat16)
    if _are_few(x):
        given = x, kernel.words, kernel.pairs
        return few_rows_product.multiply_few_rows(*given, dtype, is_gated)
    cut = _cut(x, kernel)
    if cut is not None:
        written = jnp.bfloat16 if jnp.dtype(dtype) == jnp.bfloat16 else jnp.float32
        return decode_product.product(x, tuple(kernel), written, cut, is_gated).astype(dtype)
    if x.shape[0] <= _MOST_TILED:
        return multiply_tiles(x, kernel.words, kernel.pairs, dtype)
    return _contract(x, widen_tiles(kernel.words, kernel.pairs), dtype)


def _multiply_plain(x: Array, kernel: TiledKernel, dtype: DTypeLike, is_gated: bool) -> Array:
    """What the kernels compute: weights are rounded to bfloat16 before they are multiplied with."""
    wide = widened(kernel).astype(jnp.bfloat16).astype(jnp.float32)
    out = _contract(x.astype(jnp.bfloat16).astype(jnp.float32), wide, jnp.float32)
    return decode_product.gate(out.astype(x.dtype), dtype) if is_gated else out.astype(dtype)


def _contract(left: Array, right: Array, dtype: DTypeLike) -> Array:
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=dtype)


def widened(kernel: TiledKernel) -> Float[Array, "O I"]:
    """The floats that the codes mean, in float32."""
    codes, scale, offset = unpack_tiles(kernel)
    outputs, inputs = codes.shape
    grouped = codes.reshape(outputs, -1, kernel.group).astype(jnp.float32) - 8
    return (grouped * scale[..., None] + offset[..., None]).reshape(outputs, inputs)


def take_tiles(kernel: TiledKernel, index: Int[Array, " N"]) -> Float[Array, "N I"]:
    """Rows of an embedding; an index outside reads the nearest one."""
    index = jnp.clip(index, 0, kernel.shape[0] - 1)
    return widened(TiledKernel(kernel.words[:, index], kernel.pairs[:, index]))
