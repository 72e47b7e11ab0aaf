"""The product with a kernel in four bits as one kernel on an NVIDIA GPU, from Ampere on.

A program multiplies some outputs, of few of which a step has rows, so it cuts its inputs into
shares, each of a warp's own: the rows of its tile are outputs by shares, the columns the tokens'
rows by shares, and of the products those of one share are kept and added, in a fixed order. What
the others cost is nothing: a product of 16 columns is the least there is.

    tile [shares * outputs, 32 words]  x  part p of each word  x  tokens [shares * rows, 32 inputs]

A word's four codes belong to inputs 32 apart, so each part of a tile of words is a matrix by itself
and no code changes its thread.

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


class _Cut(NamedTuple):
    """How a product is cut into programs."""

    outputs: int  # of a program
    shares: int  # of the inputs
    rows: int  # of a program


def _cut(num_rows: int, outputs: int, blocks: int) -> _Cut:
    """Measured (docs/gpu.md): enough programs for the card, and tiles of 64 rows in all."""
    is_wide = outputs >= 2**14
    if num_rows <= 16:
        wanted = _Cut(32, 2, 8) if is_wide else _Cut(16, 4, 4 if num_rows <= 4 else 8)
        wanted = wanted if num_rows <= 8 else _Cut(32, 2, 16)
    elif num_rows <= 32:
        wanted = _Cut(64, 1, 32) if is_wide else _Cut(32, 2, 32)
    else:
        wanted = _Cut(64, 1, 64) if is_wide or num_rows > 64 else _Cut(32, 2, 64)
    while blocks % wanted.shares:
        wanted = _Cut(wanted.outputs, wanted.shares // 2, max(wanted.rows, 16))
    return wanted


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
    return pl.pallas_call(
        functools.partial(_multiply, cut=cut),
        grid=(outputs // cut.outputs, pl.cdiv(x.shape[0], cut.rows)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outputs), dtype),
        # Two warps: with four, Triton takes Hopper's products, which wait for one another.
        compiler_params=triton.CompilerParams(num_warps=2, num_stages=4 if cut.rows < 32 else 3),
        name="multiply_tiles",
    )(x, words, pairs)


def _multiply(x_ref: Any, words_ref: Any, pairs_ref: Any, out_ref: Any, *, cut: _Cut) -> None:
    """Some outputs of some rows."""
    blocks, num_rows = words_ref.shape[0], x_ref.shape[0]
    steps = blocks // cut.shares  # blocks of a share
    row, column = jnp.arange(cut.shares * cut.outputs), jnp.arange(cut.shares * cut.rows)
    share, own = row // cut.outputs, pl.program_id(0) * cut.outputs + row % cut.outputs
    token = pl.program_id(1) * cut.rows + column % cut.rows
    first = column // cut.rows * (steps * BLOCK)
    within = jnp.arange(_WORDS)
    masked = _masked((token < num_rows)[:, None], (column.size, _WORDS), num_rows % cut.rows == 0)

    def add(step: Any, total: Any) -> Any:
        block = share * steps + step
        words = triton.load(words_ref.at[block[:, None], own[:, None], within[None, :]])
        for part in range(_PARTS):
            given = first[:, None] + step * BLOCK + part * _WORDS + within[None, :]
            x = triton.load(x_ref.at[token[:, None], given], **masked)
            group = _group(block, part, pairs_ref.shape[0], blocks)
            weights = _weights(words, part, triton.load(pairs_ref.at[group, own]))
            dims = (((1,), (1,)), ((), ()))
            total += jax.lax.dot_general(weights, x, dims, preferred_element_type=jnp.float32)
        return total

    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((row.size, column.size), jnp.float32))
    if cut.shares > 1:
        total = jnp.where(share[:, None] == (column // cut.rows)[None, :], total, 0.0)
        total = jnp.sum(total.reshape(cut.shares, cut.outputs, column.size), axis=0)
        total = jnp.sum(total.reshape(cut.outputs, cut.shares, cut.rows), axis=1)
    own = pl.program_id(0) * cut.outputs + jnp.arange(cut.outputs)
    token = pl.program_id(1) * cut.rows + jnp.arange(cut.rows)
    masked = _masked((token < num_rows)[None, :], total.shape, num_rows % cut.rows == 0)
    masked.pop("other", None)
    triton.store(out_ref.at[token[None, :], own[:, None]], total.astype(out_ref.dtype), **masked)


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
        group = _group(block, part, pairs_ref.shape[0], words_ref.shape[0])
        weights = _weights(words, part, triton.load(pairs_ref.at[group, own]))
        given = block * BLOCK + part * _WORDS + within
        triton.store(out_ref.at[own[:, None], given[None, :]], weights)


def _group(block: Any, part: int, groups: int, blocks: int) -> Any:
    """The group of a part of a block."""
    return (block * _PARTS + part) * groups // (blocks * _PARTS)


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
