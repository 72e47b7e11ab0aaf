"""Which kernels of a model are kept in few bits, and what may be done with them."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Float, Int

from folojax.models.quantized.group_kernels import (
    GroupKernel,
    fits_groups,
    project_groups,
    quantize_groups,
    take_groups,
)
from folojax.models.quantized.int8_kernels import Int8Kernel, project_int8, quantize_int8, take_int8
from folojax.models.quantized.names import QUANTIZATIONS

QuantizedKernel: TypeAlias = Int8Kernel | GroupKernel


# Experts are multiplied by `lax.ragged_dot`, and a router's scores decide between experts.
_LINEAR = frozenset(
    {
        "qkv",
        "o",
        "gate_up",
        "up",
        "down",
        "shared_gate_up",
        "shared_down",
        "q",
        "q_a",
        "q_b",
        "kv_a",
        "kv_b",
    }
)

# Four bits are too few for what tells tokens apart.
VOCABULARY = frozenset({"embed", "lm_head"})
"""Parameters with a row for each token."""

BY_OUTPUT = 0
"""In the place of bits: a scale for each output, not for each group."""


def quantize_params(params: Mapping[str, Any], quantization: str) -> dict[str, Any]:
    """Parameters of a model with the kernels of its linear layers and its embeddings in few bits.

    With "int8" these are `Int8Kernel`s. With "int4" they are `GroupKernel`s: linear layers of four
    bits, token embedding and output of eight; where a shape cannot be cut into groups, an
    `Int8Kernel`. Norms, biases, learned positions, routers and experts stay as they are, and so do
    kernels that are quantised already.
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

    One that is quantised already stays as it is.
    """
    if isinstance(leaf, QuantizedKernel):
        return leaf
    quantizer = _quantizer(name, leaf.shape, quantization)
    return leaf if quantizer is None else quantizer(leaf)


def quantize_like(kernel: QuantizedKernel, leaf: Float[Array, "O I"]) -> QuantizedKernel:
    """A kernel of floats, quantised in the way of another one."""
    if isinstance(kernel, Int8Kernel):
        return quantize_int8(leaf)
    return quantize_groups(leaf, bits=kernel.bits)


def _quantizer(
    name: str, shape: tuple[int, ...], quantization: str | None
) -> Callable[[Array], QuantizedKernel] | None:
    kind = kernel_kind(name, shape, quantization)
    if kind is None:
        return None
    return quantize_int8 if kind == BY_OUTPUT else lambda leaf: quantize_groups(leaf, bits=kind)


def kernel_kind(name: str, shape: tuple[int, ...], quantization: str | None) -> int | None:
    """The bits of a parameter's codes in groups; `BY_OUTPUT` for an `Int8Kernel`; None: floats."""
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization is {quantization!r}, not one of {', '.join(QUANTIZATIONS)}")
    if quantization is None or name not in _LINEAR | VOCABULARY:
        return None
    if quantization == "int8" or not fits_groups(shape):
        return BY_OUTPUT
    return 4 if name in _LINEAR else 8


def is_quantized(node: Any) -> bool:
    """Whether a node of a parameter tree is a quantised kernel; as `is_leaf` of `jax.tree.map`."""
    return isinstance(node, QuantizedKernel)


def quantization_of(params: Any) -> str | None:
    """The quantisation that parameters have already; None: all are floats."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    if any(isinstance(leaf, GroupKernel) for leaf in leaves):
        return "int4"
    return "int8" if any(map(is_quantized, leaves)) else None


@jax.custom_jvp
def project_quantized(x: Float[Array, "N I"], kernel: QuantizedKernel) -> Float[Array, "N O"]:
    """A linear layer in float32: `x`, rounded to eight bits, times the kernel.

    It has no derivative: to ask for one is a TypeError.
    """
    if isinstance(kernel, Int8Kernel):
        return project_int8(x, kernel)
    return project_groups(x, kernel)


@project_quantized.defjvp
def _has_no_derivative(primals: Any, tangents: Any) -> Any:
    # Without this rule there would be one, of the scales alone: finite and wrong.
    raise TypeError(
        "quantised kernels cannot be differentiated through: take the float parameters that they "
        "were made from"
    )


def take_quantized(table: QuantizedKernel, index: Int[Array, " N"]) -> Float[Array, "N I"]:
    """Rows of an embedding in float32; an index outside reads the nearest row."""
    if isinstance(table, Int8Kernel):
        return take_int8(table, index)
    return take_groups(table, index)
