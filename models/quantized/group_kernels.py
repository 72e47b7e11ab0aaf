"""Kernels in four or eight bits by groups: a fifth of float32's memory, and fast products on CPU.

A kernel [O, I] is cut into groups of 32 inputs of one output. A weight of a group is
`scale * code + offset`, with a code of four bits (0 to 15) or eight (0 to 255): weights that were
read from GGUF's Q4_1 and Q8_0 are of this kind, and come back exactly in float32 if a group uses
both ends of its codes, as GGUF's own quantiser sees to. A product rounds its inputs
to int8, each group of 32 with a scale of its own, and sums codes times inputs as integers within a
group and in float32 over groups; a row's result has the same bits whatever the rows beside it. On
x86-64 it is `group_product.cc`; elsewhere, and where nothing can compile that, XLA.
"""

import functools
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Int8, UInt8

from folojax.models.machine import compiler as native

GROUP = 32
"""Inputs that share a scale."""

PANEL = 64
"""Outputs whose groups lie side by side."""

_SOURCE = Path(__file__).with_name("group_product.cc")
_NAME = "folojax_group_product"

TILE = 8
"""Outputs that a register has a lane for."""

_FOURS = 8  # fours of inputs in a group

# XLA makes of a division by a constant what these say.
_STEP_4, _STEP_8 = np.float32(1 / 15), np.float32(1 / 127)


class GroupKernel(NamedTuple):
    """A kernel in a parameter tree, in place of the array.

    P is O / 64, Q is I / 32, and B the bytes of a block of 64 outputs by 32 inputs: 1,024 if codes
    have four bits, else 2,048. Within a block they lie as [8 tiles, 8 fours of inputs, 8 outputs,
    4 inputs]; a byte of two codes has one of fours 0 to 3 in its lower half, and the one four fours
    further on in the upper half.
    """

    codes: UInt8[Array, "P Q B"]
    scale: Float16[Array, "P Q 64"]
    offset: Float16[Array, "P Q 64"]

    @property
    def bits(self) -> int:
        """4 or 8."""
        return self.codes.shape[-1] * 8 // (PANEL * GROUP)

    @property
    def shape(self) -> tuple[int, ...]:
        """O and I; before these, how many parts it lies in, if it does."""
        *parts, panels, groups, _ = self.codes.shape
        return *parts, panels * PANEL, groups * GROUP


def fits_groups(shape: tuple[int, ...]) -> bool:
    """Whether a kernel of this shape can be cut into whole blocks."""
    return len(shape) == 2 and shape[0] % PANEL == 0 and shape[1] % GROUP == 0


@functools.partial(jax.jit, static_argnames="bits")
def quantize_groups(kernel: Float[Array, "O I"], *, bits: int) -> GroupKernel:
    """The kernel in so many bits, as `round_to_groups` has it."""
    return pack_groups(*round_to_groups(kernel, bits=bits), bits=bits)


@functools.partial(jax.jit, static_argnames="bits")
def round_to_groups(
    kernel: Float[Array, "O I"], *, bits: int
) -> tuple[UInt8[Array, "O Q 32"], Float16[Array, "O Q"], Float16[Array, "O Q"]]:
    """Codes, scales and offsets of a kernel with any number of outputs.

    Codes of four bits go from a group's least weight to its largest one, codes of eight as far to
    either side of zero as its largest magnitude. Scales and offsets are float16: of groups whose
    largest magnitude is below 0.001 the codes of eight bits are no longer the nearest.
    """
    outputs, inputs = kernel.shape
    weights = kernel.astype(jnp.float32).reshape(outputs, inputs // GROUP, GROUP)
    if bits == 4:
        least = weights.min(axis=-1)
        scale = ((weights.max(axis=-1) - least) * _STEP_4).astype(jnp.float16)
        offset = least.astype(jnp.float16)
    else:
        scale = (jnp.abs(weights).max(axis=-1) * _STEP_8).astype(jnp.float16)
        offset = -128 * scale
    step = scale.astype(jnp.float32)[..., None]
    codes = (weights - offset.astype(jnp.float32)[..., None]) / jnp.where(step == 0, 1.0, step)
    return jnp.clip(jnp.round(codes), 0, 2**bits - 1).astype(jnp.uint8), scale, offset


@functools.partial(jax.jit, static_argnames="bits")
def pack_groups(
    codes: UInt8[Array, "O Q 32"],
    scale: Float16[Array, "O Q"],
    offset: Float16[Array, "O Q"],
    *,
    bits: int,
) -> GroupKernel:
    """The kernel of these codes, each below 2 to the `bits`."""
    return GroupKernel(_pack(codes, bits), _by_panels(scale), _by_panels(offset))


@jax.jit
def unpack_groups(
    kernel: GroupKernel,
) -> tuple[UInt8[Array, "O Q 32"], Float16[Array, "O Q"], Float16[Array, "O Q"]]:
    """Codes, scales and offsets, as `pack_groups` takes them."""
    panels, groups, _ = kernel.scale.shape
    scale, offset = (
        one.swapaxes(1, 2).reshape(panels * PANEL, groups) for one in (kernel.scale, kernel.offset)
    )
    return _unpack(kernel), scale, offset


def project_groups(x: Float[Array, "N I"], kernel: GroupKernel) -> Float[Array, "N O"]:
    """A linear layer in float32: `x`, rounded to eight bits by groups of 32, times the kernel."""
    panels, groups, size = kernel.codes.shape
    scales = (panels, groups, PANEL)
    if (
        (kernel.scale.shape, kernel.offset.shape) != (scales, scales)
        or size not in (PANEL * GROUP // 2, PANEL * GROUP)
        or x.shape[1] != groups * GROUP
    ):
        shapes = [list(one.shape) for one in kernel]
        raise ValueError(f"x {list(x.shape)} does not fit a kernel in groups of {shapes}")
    x = x.astype(jnp.float32)
    if not has_product():
        return multiply_by_xla(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=_multiply_in_cpp, default=multiply_by_xla)


@functools.cache
def has_product() -> bool:
    """Whether programs on CPU may call `group_product.cc`; if not, a RuntimeWarning says why."""
    problem = native.register(_SOURCE, _NAME, "GroupProduct")
    if problem is not None:
        warnings.warn(
            f'products of kernels with quantization="int4" are left to XLA, which is many times '
            f"slower: {problem}",
            RuntimeWarning,
            stacklevel=2,
        )
    return problem is None


def _multiply_in_cpp(x: Float[Array, "N I"], kernel: GroupKernel) -> Float[Array, "N O"]:
    result = jax.ShapeDtypeStruct((x.shape[0], kernel.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(_NAME, result, vmap_method="sequential")(x, *kernel)


def multiply_by_xla(x: Float[Array, "N I"], kernel: GroupKernel) -> Float[Array, "N O"]:
    """What `group_product.cc` computes, group by group, in plain JAX."""
    groups = x.shape[1] // GROUP
    values, input_scale = _round(x.reshape(-1, groups, GROUP))
    codes = jnp.moveaxis(_unpack(kernel), 1, 0)
    scale, offset = (
        one.astype(jnp.float32).swapaxes(1, 2).reshape(-1, groups).T
        for one in (kernel.scale, kernel.offset)
    )

    def add(sums: Array, group: tuple[Array, ...]) -> tuple[Array, None]:
        values, input_scale, codes, scale, offset = group
        dims = (((1,), (1,)), ((), ()))
        products = jax.lax.dot_general(
            values.astype(jnp.int32), codes.astype(jnp.int32), dims
        ).astype(jnp.float32)
        sums += products * (input_scale[:, None] * scale[None, :])
        sum_of_inputs = values.astype(jnp.int32).sum(axis=1).astype(jnp.float32)
        return sums + (input_scale * sum_of_inputs)[:, None] * offset[None, :], None

    start = jnp.zeros((x.shape[0], kernel.shape[0]), jnp.float32)
    by_group = (values.swapaxes(0, 1), input_scale.T, codes, scale, offset)
    return jax.lax.scan(add, start, by_group)[0]


def take_groups(kernel: GroupKernel, index: Int[Array, " N"]) -> Float[Array, "N I"]:
    """Rows of an embedding whose codes have eight bits; an index outside reads the nearest one."""
    panels, groups, _ = kernel.codes.shape
    panel, output = jnp.divmod(jnp.clip(index, 0, kernel.shape[0] - 1), PANEL)
    blocks = kernel.codes.reshape(panels, groups, PANEL // TILE, _FOURS, TILE, 4)
    codes = blocks[panel, :, output // TILE, :, output % TILE].reshape(-1, groups, GROUP)
    scale, offset = (
        one[panel, :, output].astype(jnp.float32)[..., None]
        for one in (kernel.scale, kernel.offset)
    )
    return (codes.astype(jnp.float32) * scale + offset).reshape(-1, groups * GROUP)


def _by_panels(numbers: Float16[Array, "O Q"]) -> Float16[Array, "P Q 64"]:
    return numbers.reshape(-1, PANEL, numbers.shape[1]).swapaxes(1, 2)


def _pack(codes: UInt8[Array, "O Q 32"], bits: int) -> UInt8[Array, "P Q B"]:
    outputs, groups, _ = codes.shape
    tiles = codes.reshape(outputs // PANEL, PANEL // TILE, TILE, groups, _FOURS, 4)
    blocks = tiles.transpose(0, 3, 1, 4, 2, 5)
    if bits == 4:
        blocks = blocks[:, :, :, : _FOURS // 2] | blocks[:, :, :, _FOURS // 2 :] << 4
    return blocks.reshape(outputs // PANEL, groups, -1)


def _unpack(kernel: GroupKernel) -> UInt8[Array, "O Q 32"]:
    panels, groups, _ = kernel.codes.shape
    blocks = kernel.codes.reshape(panels, groups, PANEL // TILE, -1, TILE, 4)
    if kernel.bits == 4:
        blocks = jnp.concatenate((blocks & 15, blocks >> 4), axis=3)
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(panels * PANEL, groups, GROUP)


def _round(x: Float[Array, "N Q 32"]) -> tuple[Int8[Array, "N Q 32"], Float[Array, "N Q"]]:
    """Groups as integers of -127 to 127, and what these count in.

    NaN and infinity go into the scale, so that they are in all that is made of their row.
    """
    largest = jnp.max(jnp.abs(x), axis=-1)
    rate = jnp.where(largest == 0, 0.0, 127 / largest)
    values = jnp.round(x * rate[..., None])
    return values.astype(jnp.int8), largest * _STEP_8
