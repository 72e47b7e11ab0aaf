"""Triton's inline assembly on a CPU, as far as kernels here have it, instruction by instruction."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_OPERAND = re.compile(r"\$?\w+")


def elementwise_inline_asm(
    asm: str,
    *,
    args: Sequence[Any],
    constraints: str,
    pack: int,
    result_shape_dtypes: Sequence[Any],
) -> list[Any]:
    """As `jax.experimental.pallas.triton` has it, for one result."""
    (result,) = result_shape_dtypes
    registers = [_registers(one, pack) for one in args]
    given = [None, *(register for some in registers for register in some)]
    assert constraints == ",".join(["=r", *["r"] * (len(given) - 1)])
    values: dict[str, Any] = {f"${i}": one for i, one in enumerate(given)}
    for line in asm.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *operands = _OPERAND.findall(rest)
        found = [values[one] if one in values else np.uint32(int(one, 0)) for one in operands]
        values[target] = _INSTRUCTIONS[name](*found)
    return [_elements(values["$0"], result)]


def _registers(array: Any, pack: int) -> list[Any]:
    """Registers of 32 bits for every `pack` neighbours along the last axis."""
    bits = array.dtype.itemsize * 8
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    if bits == 32:
        return [words[..., i::pack] for i in range(pack)]
    assert bits * pack == 32
    return [sum((words[..., i::pack] << bits * i for i in range(pack)), jnp.uint32(0))]


def _elements(register: Any, result: Any) -> Any:
    bits = result.dtype.itemsize * 8
    parts = [register >> bits * i for i in range(32 // bits)]
    words = jnp.stack(parts, axis=-1).reshape(result.shape).astype(jnp.dtype(f"uint{bits}"))
    return jax.lax.bitcast_convert_type(words, result.dtype)


def _halves(register: Any) -> Any:
    parts = jnp.stack([register, register >> 16]).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(parts, jnp.bfloat16).astype(jnp.float32)


def _fma(*factors: Any) -> Any:
    left, right, more = map(_halves, jnp.broadcast_arrays(*factors))
    # In float32 the product is exact, and a sum of such numbers as are here too.
    rounded = (left * right + more).astype(jnp.bfloat16)
    lower, upper = jax.lax.bitcast_convert_type(rounded, jnp.uint16).astype(jnp.uint32)
    return lower | upper << 16


def _lop3(left: Any, middle: Any, right: Any, table: Any) -> Any:
    assert int(table) == 0xEA, "(left & middle) | right"
    return (left & middle) | right


def _prmt(left: Any, right: Any, selector: Any) -> Any:
    several = [left >> 8 * i & 255 for i in range(4)] + [right >> 8 * i & 255 for i in range(4)]
    chosen = [several[int(selector) >> 4 * i & 15] for i in range(4)]
    return sum((one << 8 * i for i, one in enumerate(chosen)), jnp.uint32(0))


_INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "fma.rn.bf16x2": _fma,
    "lop3.b32": _lop3,
    "mov.b32": lambda value: value,
    "prmt.b32": _prmt,
    "shr.b32": jnp.right_shift,
}
