"""Which kernels of a model are kept in few bits, and what may be done with them."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from folojax.models.quantized.float8_kernels import (
    Float8Kernel,
    can_gate_float8,
    fits_float8,
    project_float8,
    quantize_float8,
    take_float8,
)
from folojax.models.quantized.group_kernels import (
    GroupKernel,
    fits_groups,
    project_groups,
    quantize_groups,
    take_groups,
)
from folojax.models.quantized.int8_kernels import Int8Kernel, project_int8, quantize_int8, take_int8
from folojax.models.quantized.names import QUANTIZATIONS, TILED
from folojax.models.quantized.tiled_kernels import (
    TiledKernel,
    can_gate_tiles,
    fits_tiles,
    project_tiles,
    quantize_tiles,
    take_tiles,
    tiles_of_groups,
)

QuantizedKernel: TypeAlias = Int8Kernel | GroupKernel | TiledKernel | Float8Kernel


# Experts have products of their own, a router's scores decide between experts, and "kv_b"
# is multiplied head by head, from either side (`models/core/latent.py`).
_LINEAR = frozenset(
    {
        "qkv",
        "qk",
        "o",
        "gate_up",
        "up",
        "down",
        "shared_gate_up",
        "shared_up",
        "shared_down",
        "q",
        "q_a",
        "q_b",
        "kv_a",
    }
)

# Four bits are too few for what tells tokens apart.
VOCABULARY = frozenset({"embed", "lm_head", "layer_embed"})
"""Parameters with a row for each token."""

Kind: TypeAlias = Literal["output", "groups4", "groups8", "tiles", "float8"]
"""Of a quantised kernel: an `Int8Kernel`, a `GroupKernel` of so many bits, a `TiledKernel`, a
`Float8Kernel`."""

_QUANTIZERS: dict[Kind, Callable[[Array], QuantizedKernel]] = {
    "output": quantize_int8,
    "groups4": functools.partial(quantize_groups, bits=4),
    "groups8": functools.partial(quantize_groups, bits=8),
    "tiles": quantize_tiles,
    "float8": quantize_float8,
}


def quantize_params(params: Mapping[str, Any], quantization: str) -> dict[str, Any]:
    """Parameters of a model with the kernels of its linear layers and its embeddings in few bits.

    With "int8" these are `Int8Kernel`s. With "int4" they are `GroupKernel`s: linear layers of four
    bits, token embedding and output of eight; where a shape cannot be cut into groups, an
    `Int8Kernel`. With `TILED` and "fp8" linear layers are `TiledKernel`s and `Float8Kernel`s, token
    embedding and output, and what does not fit, `Int8Kernel`s. Norms, biases, learned positions,
    routers and experts stay as they are, and so do kernels that are quantised already; but those in
    groups become tiles.
    """

    def convert(name: str, leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            return quantize_params(leaf, quantization)
        return quantize(name, leaf, quantization)

    return {name: convert(name, leaf) for name, leaf in params.items()}


def quantize(
    name: str, leaf: Array | QuantizedKernel, quantization: str | None
) -> Array | QuantizedKernel:
    """A parameter as it is kept: its name in a layer or model says whether it is quantised.

    One that is quantised already stays as it is, but for groups where tiles are wanted.
    """
    if isinstance(leaf, GroupKernel) and quantization == TILED and leaf.bits == 4:
        return (jax.vmap(tiles_of_groups) if leaf.codes.ndim == 4 else tiles_of_groups)(leaf)
    if isinstance(leaf, QuantizedKernel):
        return leaf
    is_cut = leaf.ndim == 3 and name in _LINEAR  # in the parts of several devices
    kind = kernel_kind(name, leaf.shape[-2:], quantization)
    if kind is None:
        return leaf
    return jax.vmap(_QUANTIZERS[kind])(leaf) if is_cut else _QUANTIZERS[kind](leaf)


def quantize_like(kernel: QuantizedKernel, leaf: Float[Array, "O I"]) -> QuantizedKernel:
    """A kernel of floats, quantised in the way of another one."""
    convert = _QUANTIZERS[_kind_of(kernel)]
    if isinstance(kernel, TiledKernel):
        convert = functools.partial(quantize_tiles, group=kernel.group)
    return jax.vmap(convert)(leaf) if leaf.ndim == 3 else convert(leaf)


def _kind_of(kernel: QuantizedKernel) -> Kind:
    if isinstance(kernel, GroupKernel):
        return "groups4" if kernel.bits == 4 else "groups8"
    if isinstance(kernel, TiledKernel):
        return "tiles"
    return "output" if isinstance(kernel, Int8Kernel) else "float8"


def kernel_kind(name: str, shape: tuple[int, ...], quantization: str | None) -> Kind | None:
    """What a parameter becomes; None: it stays floats."""
    if quantization not in (None, *QUANTIZATIONS, TILED):
        raise ValueError(f"quantization is {quantization!r}, not one of {', '.join(QUANTIZATIONS)}")
    is_linear = name in _LINEAR
    if quantization is None or not (is_linear or name in VOCABULARY):
        return None
    if quantization == TILED and is_linear and fits_tiles(shape):
        return "tiles"
    if quantization == "fp8" and is_linear and fits_float8(shape):
        return "float8"
    if quantization == "int4" and fits_groups(shape):
        return "groups4" if is_linear else "groups8"
    return "output"


def is_quantized(node: Any) -> bool:
    """Whether a node of a parameter tree is a quantised kernel; as `is_leaf` of `jax.tree.map`."""
    return isinstance(node, QuantizedKernel)


def widened_bytes(params: Any) -> int:
    """Of the largest temporary that a product makes of a kernel in tiles."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    return max(
        (2 * math.prod(one.shape) for one in leaves if isinstance(one, TiledKernel)), default=0
    )


def quantization_of(params: Any) -> str | None:
    """The quantisation that parameters have already; None: all are floats."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    if any(isinstance(leaf, GroupKernel | TiledKernel) for leaf in leaves):
        return "int4"
    if any(isinstance(leaf, Float8Kernel) for leaf in leaves):
        return "fp8"
    return "int8" if any(map(is_quantized, leaves)) else None


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def project_quantized(
    x: Float[Array, "N I"],
    kernel: QuantizedKernel,
    dtype: DTypeLike = jnp.float32,
    is_gated: bool = False,
) -> Float[Array, "N W"]:
    """A linear layer, in `dtype`: `x`, rounded as the kernel's kind has it, times the kernel.

    It has no derivative: to ask for one is a TypeError.

    Args:
        x: The inputs.
        kernel: Of the layer.
        dtype: Of the result.
        is_gated: Whether the result is gated, as `project_tiles` has it; if it `can_gate`.
    """
    assert not is_gated or isinstance(kernel, TiledKernel | Float8Kernel)
    match kernel:
        case Int8Kernel():
            return project_int8(x, kernel, dtype)
        case TiledKernel():
            return project_tiles(x, kernel, dtype, is_gated)
        case Float8Kernel():
            return project_float8(x, kernel, dtype, is_gated)
    return project_groups(x, kernel).astype(dtype)


def can_gate(x: Float[Array, "N I"], kernel: Any) -> bool:
    """Whether the kernel that multiplies such rows on NVIDIA GPUs gates them as well."""
    if isinstance(kernel, TiledKernel):
        return can_gate_tiles(x, kernel)
    return isinstance(kernel, Float8Kernel) and can_gate_float8(x, kernel)


@project_quantized.defjvp
def _has_no_derivative(dtype: Any, is_gated: bool, primals: Any, tangents: Any) -> Any:
    # Without this rule there would be one, of the scales alone: finite and wrong.
    raise TypeError(
        "quantised kernels cannot be differentiated through: take the float parameters that they "
        "were made from"
    )


def take_quantized(table: QuantizedKernel, index: Int[Array, " N"]) -> Float[Array, "N I"]:
    """Rows of an embedding in float32; an index outside reads the nearest row."""
    match table:
        case Int8Kernel():
            return take_int8(table, index)
        case TiledKernel():
            return take_tiles(table, index)
        case Float8Kernel():
            return take_float8(table, index)
    return take_groups(table, index)
