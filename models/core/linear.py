"""Linear layers, and the nonlinearities between those of an MLP.

Axes: N tokens, F mlp width, I and O a product's sides.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from folojax.models.core import ordered_product, row_kernels
from folojax.models.core.adapted import AdaptedKernel, add_low_rank
from folojax.models.core.config import Activation
from folojax.models.machine import decode_product
from folojax.models.quantized.quantize import QuantizedKernel, can_gate, project_quantized

_FAST_ROWS = (4, 8, 16, 20, 24, 32)
"""Rows of float32 whose products take XLA on CPU no longer than those of one row less."""


def project(
    x: Float[Array, "N I"],
    kernel: Float[Array, "O I"] | QuantizedKernel | AdaptedKernel,
    is_rounded: bool = False,
    is_ordered: bool = False,
) -> Float[Array, "N O"]:
    """A linear layer: `x` times the transposed kernel, summed in float32 whatever the dtype.

    Contracts the kernel's last axis where it lies: for `kernel.T`, XLA on CPU copies a bfloat16
    kernel in full every call.

    Args:
        x: The inputs.
        kernel: Of the layer.
        is_rounded: Whether the result comes in the dtype of `x`, which halves what an accelerator
            has to write; else it is float32.
        is_ordered: Whether sums have an order of their own on NVIDIA GPUs (`ordered_product`).
    """
    if isinstance(kernel, AdaptedKernel):
        dtype = x.dtype if is_rounded else jnp.float32
        out = project(x, kernel.kernel, is_ordered=is_ordered)
        return add_low_rank(x, out, kernel.stack, kernel.slot, dtype, is_ordered=is_ordered)
    if isinstance(kernel, QuantizedKernel):
        return project_quantized(x, kernel, x.dtype if is_rounded else jnp.float32)
    dtype = jnp.dtype(x.dtype if is_rounded else jnp.float32)
    if is_ordered:
        ways = _branches(x, dtype) | {"cuda": functools.partial(_ordered, dtype=dtype)}
        return jax.lax.platform_dependent(x, kernel, **ways)
    cut = _cut(x, kernel)
    if cut is not None:
        return _in_one(x, kernel, dtype=dtype, cut=cut)
    return _multiply(x, kernel, dtype)


def _cut(x: Float[Array, "N I"], kernel: Float[Array, "O I"]) -> decode_product.Cut | None:
    """How a kernel of our own deals the product out; None: it does not."""
    return decode_product.cut_for(x, kernel.shape[0]) if x.dtype == kernel.dtype else None


def _multiply(x: Float[Array, "N I"], kernel: Float[Array, "O I"], dtype: DTypeLike) -> Any:
    """As XLA does it."""
    return jax.lax.platform_dependent(x, kernel, **_branches(x, dtype))


def _branches(x: Float[Array, "N I"], dtype: DTypeLike) -> dict[str, Any]:
    return _ROUNDED if x.dtype == dtype else _WIDE


# Jitted, so that products of one shape are traced and lowered once.
_ordered = jax.jit(ordered_product.product, static_argnames="dtype")


@functools.partial(jax.jit, static_argnames=("dtype", "cut", "is_gated"))
def _in_one(x: Array, kernel: Array, *, dtype: Any, cut: Any, is_gated: bool = False) -> Any:
    """A kernel of our own multiplies, and gates."""

    def own(x: Array, kernel: Array) -> Any:
        return decode_product.product(x, (kernel,), dtype, cut, is_gated)

    def plain(x: Array, kernel: Array) -> Any:
        out = _multiply(x, kernel, dtype)
        return _gated(out, kind="silu", dtype=dtype) if is_gated else out

    return row_kernels.kernel_or(own, plain)(x, kernel)


def _project_on_cpu(x: Float[Array, "N I"], kernel: Float[Array, "O I"]) -> Float[Array, "N O"]:
    """With few rows XLA on CPU is faster with the kernel as the left operand, turned afterwards."""
    num_rows = x.shape[0]
    if not (2 if x.dtype == jnp.float32 else 9) <= num_rows <= 64:
        return _contract_last(x, kernel)
    if x.dtype == jnp.float32 and num_rows < _FAST_ROWS[-1]:
        more = next(size for size in _FAST_ROWS if size >= num_rows) - num_rows
        x = jnp.pad(x, ((0, more), (0, 0)))
    # The barrier, or XLA makes of it the other order again.
    return jax.lax.optimization_barrier(_contract_last(kernel, x)).T[:num_rows]


def _contract_last(
    left: Float[Array, "A I"], right: Float[Array, "B I"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "A B"]:
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=dtype)


# What is lowered for a platform holds its branch alone. On CPU a product that is asked for in
# bfloat16 is several times slower than one in float32 that is cast afterwards.
_WIDE: dict[str, Any] = {"cpu": _project_on_cpu, "default": _contract_last}
_ROUNDED: dict[str, Any] = {
    "cpu": lambda x, kernel: _project_on_cpu(x, kernel).astype(x.dtype),
    "default": lambda x, kernel: _contract_last(x, kernel, x.dtype),
}


CURVE = ("act_above", "act_below", "act_slope", "act_edge")
"""Parameters of an activation that is learned."""


def activate(
    x: Float[Array, "*batch F"], kind: Activation, curve: Any = None
) -> Float[Array, "*batch F"]:
    """The nonlinearity of an MLP; `curve` are the numbers of one that is learned, [1] each.

    "xielu" is that of Huang and Schlag (arXiv:2411.13010).
    """
    match kind:
        case "xielu":
            above, below, slope, edge = (number[0].astype(x.dtype) for number in curve)
            rise, fall = jax.nn.softplus(above), slope + jax.nn.softplus(below)
            under = (jnp.expm1(jnp.minimum(x, edge)) - x) * fall
            return jnp.where(x > 0, rise * x * x, under) + slope * x
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu2":
            return jnp.square(jax.nn.relu(x))


def gated(
    gate_up: Float[Array, "N FF"], kind: Activation = "silu", dtype: DTypeLike = jnp.float32
) -> Float[Array, "N F"]:
    """act(gate) * up, for gate and up side by side in the last axis: FF is 2F.

    Computed in float32 and rounded to `dtype`. One kernel on NVIDIA GPUs for "silu" where both
    dtypes are the same half precision.
    """
    if kind == "silu" and gate_up.dtype == dtype and row_kernels.is_taken(dtype):
        return _silu_in_one(gate_up)
    return _gated(gate_up, kind=kind, dtype=dtype)


def project_gated(
    x: Float[Array, "N I"],
    kernel: Float[Array, "FF I"] | QuantizedKernel | AdaptedKernel,
    kind: Activation,
    dtype: DTypeLike,
    is_ordered: bool,
) -> Float[Array, "N F"]:
    """What is `gated` of a linear layer without a bias, rounded as `project` rounds it.

    Arguments are those of both. Where rows have adapters, one kernel adds what these change and
    gates. Rows of a decode step are multiplied and gated in one kernel on Hopper
    (`decode_product`), and few of them with four bits on other cards, too (`few_rows_product`).
    """
    make = functools.partial(gated, kind=kind, dtype=dtype)
    is_taken = kind == "silu" and x.dtype == dtype and row_kernels.is_taken(dtype)
    if is_taken and isinstance(kernel, jax.Array) and not is_ordered:
        cut = _cut(x, kernel)
        if cut is not None:
            return _in_one(x, kernel, dtype=jnp.dtype(dtype), cut=cut, is_gated=True)
    if is_taken and not is_ordered and can_gate(x, kernel):
        return project_quantized(x, kernel, x.dtype, is_gated=True)
    if not isinstance(kernel, AdaptedKernel) or not is_taken:
        return make(project(x, kernel, is_rounded=True, is_ordered=is_ordered))
    out = project(x, kernel.kernel, is_ordered=is_ordered)
    return add_low_rank(x, out, kernel.stack, kernel.slot, dtype, make, is_ordered)


def _gated(gate_up: Array, *, kind: Activation, dtype: DTypeLike) -> Array:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (activate(gate, kind) * up).astype(dtype)


@jax.jit
def _silu_in_one(gate_up: Array) -> Any:
    plain = functools.partial(_gated, kind="silu", dtype=gate_up.dtype)
    return row_kernels.kernel_or(row_kernels.gated_silu, plain)(gate_up)
