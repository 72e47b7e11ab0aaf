"""The product with a kernel in four bits as one kernel on an NVIDIA GPU, from Ampere on.

A program multiplies some outputs with some rows of tokens. A step takes a block of inputs: codes
become bfloat16 in the registers from which the tensor cores take them, tokens lie in shared memory:

    tile [outputs, 32 words] -> weights [outputs, 64 inputs], twice  x  tokens [rows, 64 inputs]

A word's four codes belong to inputs 32 apart, so each part of a tile of words is a matrix by
itself, two parts side by side are one of twice its inputs, and no code changes its thread. Scales
and offsets are read in the step that needs them, as words are: what a loop carries Triton would
take through shared memory, with all that is made of it.

Where outputs and rows are too few for programs on all processors, inputs are cut into parts, each a
program's own, whose sums are added afterwards, in a fixed order.

Axes: N tokens, O outputs, I inputs, B blocks of 128 inputs, G groups of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Int16, Int32, UInt8

from folojax.models.machine.triton import triton

_WORDS, _PARTS = 32, 4
BLOCK = _WORDS * _PARTS
"""Inputs of a block, which an output has one row of words for."""

_WIDENED_OUTPUTS = 64
_WARPS = 4  # as Hopper's products want them


class _Cut(NamedTuple):
    """How a product is cut into programs, and how many steps of these read ahead."""

    outputs: int  # of a program
    rows: int  # of a program
    stages: int
    parts: int = 1  # of the inputs


_ENOUGH, _MOST_PARTS = 264, 8
"""Programs: two for each processor of an H200."""


def _cut(num_rows: int, outputs: int, blocks: int) -> _Cut:
    """Measured on an H200 (docs/gpu.md)."""
    if num_rows <= 64:
        rows = max(16, 1 << (num_rows - 1).bit_length())
        cut, enough = _Cut(128 if outputs % 128 == 0 else 64, rows, 3), _ENOUGH
    else:
        # More parts cost more in sums than they gain.
        cut, enough = _Cut(64, 128, 3), _ENOUGH // 2
    programs = pl.cdiv(num_rows, cut.rows) * (outputs // cut.outputs)
    parts = 1
    while programs * parts < enough and parts < _MOST_PARTS and blocks % (2 * parts) == 0:
        parts *= 2
    return cut._replace(parts=parts)


def words_of(codes: UInt8[Array, "O I"]) -> Int16[Array, "B O 32"]:
    """Codes below 16 as the words of a `TiledKernel`."""
    outputs, inputs = codes.shape
    parts = codes.astype(jnp.uint16).reshape(outputs, inputs // BLOCK, _PARTS, _WORDS)
    words = functools.reduce(jnp.bitwise_or, (parts[:, :, p] << 4 * p for p in range(_PARTS)))
    return jax.lax.bitcast_convert_type(words.swapaxes(0, 1), jnp.int16)


def multiply_tiles(
    x: BFloat16[Array, "N I"],
    words: Int16[Array, "B O 32"],
    pairs: Int32[Array, "G O"],
    dtype: DTypeLike,
) -> Float[Array, "N O"]:
    """The product, summed in float32, in `dtype`."""
    blocks, outputs, _ = words.shape
    cut = _cut(x.shape[0], outputs, blocks)
    tiles = pl.cdiv(x.shape[0], cut.rows), outputs // cut.outputs
    sums = pl.pallas_call(
        functools.partial(_multiply, cut=cut),
        grid=(*tiles, cut.parts),
        out_shape=jax.ShapeDtypeStruct(
            (cut.parts, x.shape[0], outputs), dtype if cut.parts == 1 else jnp.float32
        ),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=cut.stages),
        name="multiply_tiles",
    )(x, words, pairs)
    return functools.reduce(jnp.add, list(sums)).astype(dtype)


def _multiply(x_ref: Any, words_ref: Any, pairs_ref: Any, out_ref: Any, *, cut: _Cut) -> None:
    """Some outputs of some rows, of one part of the inputs."""
    blocks, num_rows = words_ref.shape[0], x_ref.shape[0]
    steps, part = blocks // cut.parts, pl.program_id(2)
    token = pl.program_id(0) * cut.rows + jnp.arange(cut.rows)
    own = pl.program_id(1) * cut.outputs + jnp.arange(cut.outputs)
    within, wide = jnp.arange(_WORDS), jnp.arange(2 * _WORDS)
    is_whole = num_rows % cut.rows == 0
    masked = _masked((token < num_rows)[:, None], (cut.rows, wide.size), is_whole)

    def add(step: Any, total: Any) -> Any:
        block = part * steps + step
        words = triton.load(words_ref.at[block, own[:, None], within[None, :]])
        weights = [
            _weights(words, p, triton.load(pairs_ref.at[_group(block, p, pairs_ref, blocks), own]))
            for p in range(_PARTS)
        ]
        for half in range(2):
            both = _side_by_side(*weights[2 * half : 2 * half + 2])
            given = block * BLOCK + half * wide.size + wide
            x = triton.load(x_ref.at[token[:, None], given[None, :]], **masked)
            dims = (((1,), (1,)), ((), ()))
            total += jax.lax.dot_general(both, x, dims, preferred_element_type=jnp.float32)
        return _waited_for(total)

    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((cut.outputs, cut.rows), jnp.float32))
    masked = _masked((token < num_rows)[None, :], total.shape, is_whole)
    masked.pop("other", None)
    triton.store(
        out_ref.at[part, token[None, :], own[:, None]], total.astype(out_ref.dtype), **masked
    )


def _waited_for(total: Any) -> Any:
    """The sums themselves, once they are there.

    A product of Hopper's runs on after it is started and reads weights from their registers until
    it ends. Triton waits only for sums that something other than a product asks for, and the codes
    of the next step would take the registers of the last product of this one.
    """
    (found,) = triton.elementwise_inline_asm(
        "mov.b32 $0, $1;",
        args=[total],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, total.dtype)],
    )
    return found


def _side_by_side(left: Any, right: Any) -> Any:
    """Two matrices as one, so that no number changes its thread."""
    rows, columns = left.shape
    return jnp.stack([left, right], axis=-1).transpose(0, 2, 1).reshape(rows, 2 * columns)


def widen_tiles(
    words: Int16[Array, "B O 32"], pairs: Int32[Array, "G O"]
) -> BFloat16[Array, "O I"]:
    """The weights, in the memory of 16 bits."""
    blocks, outputs, _ = words.shape
    return pl.pallas_call(
        _widen,
        grid=(blocks, outputs // _WIDENED_OUTPUTS),
        out_shape=jax.ShapeDtypeStruct((outputs, blocks * BLOCK), jnp.bfloat16),
        compiler_params=triton.CompilerParams(num_warps=4),
        name="widen_tiles",
    )(words, pairs)


def _widen(words_ref: Any, pairs_ref: Any, out_ref: Any) -> None:
    """One block of some outputs."""
    block, within = pl.program_id(0), jnp.arange(_WORDS)
    own = pl.program_id(1) * _WIDENED_OUTPUTS + jnp.arange(_WIDENED_OUTPUTS)
    words = triton.load(words_ref.at[block, own[:, None], within[None, :]])
    for part in range(_PARTS):
        group = _group(block, part, pairs_ref, words_ref.shape[0])
        weights = _weights(words, part, triton.load(pairs_ref.at[group, own]))
        given = block * BLOCK + part * _WORDS + within
        triton.store(out_ref.at[own[:, None], given[None, :]], weights)


def _group(block: Any, part: int, pairs_ref: Any, blocks: int) -> Any:
    """The group of a part of a block."""
    groups = pairs_ref.shape[0]
    if groups >= blocks:
        return block * (groups // blocks) + part * groups // (blocks * _PARTS)
    return jax.lax.div(block, blocks // groups)


def _masked(is_there: Any, shape: tuple[int, int], is_all: bool) -> dict[str, Any]:
    """Arguments of a load that reads zeros where nothing is there."""
    return {} if is_all else {"mask": jnp.broadcast_to(is_there, shape), "other": 0.0}


def _weights(words: Any, part: int, pairs: Any) -> Any:
    """The weights of one part of each word, in bfloat16, rounded once; two to an instruction."""
    scale, offset = (
        jnp.broadcast_to(_twice(pairs, half)[:, None], words.shape) for half in range(2)
    )
    (weights,) = triton.elementwise_inline_asm(
        _UNPACK.format(shift=4 * part),
        args=[words, scale, offset],
        # Of two words next to each other scale and offset are the same, in registers of their own.
        constraints="=r,r,r,r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
    )
    return weights


# 128 + code has the code in its last bits, and 136 less is exact: code - 8.
_UNPACK = (
    "{{ .reg .b32 code, one, less; shr.b32 code, $1, {shift}; "
    "lop3.b32 code, code, 0x000F000F, 0x43004300, 0xEA; "
    "mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; "
    "fma.rn.bf16x2 code, code, one, less; "
    "fma.rn.bf16x2 $0, code, $2, $4; }}"
)


def _twice(pairs: Any, half: int) -> Any:
    """The lower or upper halves, in both halves."""
    (found,) = triton.elementwise_inline_asm(
        "prmt.b32 $0, $1, $1, " + ("0x1010;", "0x3232;")[half],
        args=[pairs],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(pairs.shape, jnp.int32)],
    )
    return found
