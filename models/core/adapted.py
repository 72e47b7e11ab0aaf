"""Kernels with low-rank updates beside them, unmerged: each row of a product has its own, or none.

The adapters that are on the device lie in stacks, a slot for each, so that one product serves rows
of different adapters; no program is made for one of them:

    x [N, I] ── a, of all slots ──> [N, L * R] ── zero but for the row's slot ── b ──> [N, O]

A kernel that joins several linear layers has P parts, each with an update of its own: queries, keys
and values; gate and up. Ranks are padded with zeros to R.

Axes: N rows, I and O a kernel's sides, L slots, R rank.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from folojax.models.core import low_rank_kernels
from folojax.models.core.config import ModelConfig
from folojax.models.machine import compiler as native

_SOURCE = Path(__file__).with_name("low_rank_product.cc")
_NAME = "folojax_low_rank_product"

ADAPTED = frozenset(
    {
        *("qkv", "qk", "o", "q", "q_a", "q_b", "kv_a", "kv_b"),
        *("gate_up", "up", "down", "shared_gate_up", "shared_up", "shared_down"),
        *("in_proj", "ba_proj", "out_proj"),
    }
)
"""Kernels of a layer that may have an update: those of its linear layers, experts and routers
apart."""


class Stack(NamedTuple):
    """The low-rank updates of one kernel, of all slots."""

    a: Float[Array, "P L R I"]
    b: tuple[Float[Array, "L R _"], ...]  # of each part, over its share of the O outputs


class AdaptedKernel(NamedTuple):
    """A kernel in a parameter tree, in place of the array or of a quantised kernel."""

    kernel: Any  # [O, I]
    stack: Stack
    slot: Int[Array, " N"] | None = None
    """Of each row of the product; L for one without an adapter. None: all rows have slot 0."""


def part_widths(name: str, config: ModelConfig, width_out: int) -> tuple[int, ...]:
    """How the outputs of a whole kernel are shared out among the linear layers that it joins."""
    if name in ("qkv", "qk"):
        heads = config.heads_in(name)
        return tuple(one * (width_out // sum(heads)) for one in heads)
    sizes = config.recurrent
    is_joined = sizes is not None and not sizes.is_by_key_head and sizes.kind == "delta"
    if sizes is not None and is_joined and name == "in_proj":
        return sizes.num_channels, sizes.num_values
    if name in ("gate_up", "shared_gate_up") or (is_joined and name == "ba_proj"):
        return width_out // 2, width_out // 2
    return (width_out,)


def adapt(params: Mapping[str, Any], stacks: Mapping[str, Any], slot: Any = None) -> dict[str, Any]:
    """Parameters in which the kernels that have stacks are `AdaptedKernel`s; copies no array.

    Args:
        params: Of a model, or of a layer.
        stacks: In their nesting, as far as there are any.
        slot: As of `AdaptedKernel`.
    """
    adapted = dict(params)
    for name, stack in stacks.items():
        is_block = isinstance(stack, Mapping)
        own = params[name]
        adapted[name] = adapt(own, stack, slot) if is_block else AdaptedKernel(own, stack, slot)
    return adapted


def with_slots(params: Mapping[str, Any], slot: Int[Array, " N"] | None) -> Mapping[str, Any]:
    """The parameters of a layer, with the slots of the rows that are about to pass it."""
    if slot is None:
        return params
    return {
        name: one._replace(slot=slot) if isinstance(one, AdaptedKernel) else one
        for name, one in params.items()
    }


def add_low_rank(
    x: Float[Array, "N I"],
    out: Float[Array, "N O"],
    stack: Stack,
    slot: Int[Array, " N"] | None,
    dtype: DTypeLike = jnp.float32,
    gate: Callable[[Any], Any] | None = None,
    is_ordered: bool = False,
) -> Float[Array, "N _"]:
    """A product of `x`, and what the adapters of its rows add to it, in `dtype`.

    On x86-64 CPUs, where a C++ compiler is found, it is `low_rank_product.cc`, on NVIDIA GPUs two
    kernels (`low_rank_kernels`); elsewhere, and where all rows have slot 0, XLA.

    Args:
        x: The inputs.
        out: Their product with the kernel.
        stack: The adapters of the kernel.
        slot: Of each row; see `AdaptedKernel`.
        dtype: Of the result.
        gate: Where the product is gate and up side by side, what computes silu(gate) * up of the
            sum; that is returned then, [N, O / 2].
        is_ordered: Whether sums have an order of their own on NVIDIA GPUs, whatever N is.
    """
    parts, slots, rank, width = stack.a.shape
    shapes = [one.shape for one in stack.b]
    is_fit = x.shape[1] == width and sum(one[2] for one in shapes) == out.shape[1]
    if not is_fit or any(one[:2] != (slots, rank) for one in shapes) or len(shapes) != parts:
        raise ValueError(f"x {x.shape} does not fit adapters of {stack.a.shape} and {shapes}")

    def gated(add: Callable[..., Any]) -> Callable[..., Any]:
        added = functools.partial(add, dtype=dtype)
        return added if gate is None else lambda *args: gate(added(*args))

    if slot is None:
        return gated(_add_by_xla)(x, out, slot, stack.a, *stack.b)
    ways: dict[str, Any] = {"default": gated(_add_by_xla)}
    if stack.a.dtype == jnp.float32 and _problem() is None:
        ways["cpu"] = gated(_add_in_cpp)
    if low_rank_kernels.is_taken(*stack):
        options: dict[str, Any] = {"is_gated": gate is not None, "is_ordered": is_ordered}
        kernels = low_rank_kernels.add_by_kernels
        ways["cuda"] = functools.partial(kernels, dtype=dtype, **options)
    return jax.lax.platform_dependent(x, out, slot, stack.a, *stack.b, **ways)


@functools.cache
def _problem() -> str | None:
    """Why programs on CPU cannot call the kernel; None: they can. The first call compiles it."""
    return native.register(_SOURCE, _NAME, "LowRankProduct")


def _add_in_cpp(x: Any, out: Any, slot: Any, a: Any, *b: Any, dtype: DTypeLike) -> Any:
    result = jax.ShapeDtypeStruct(out.shape, jnp.float32)
    aliases = {1: 0}
    call = jax.ffi.ffi_call(_NAME, result, vmap_method="sequential", input_output_aliases=aliases)
    return call(x.astype(jnp.float32), out, slot.astype(jnp.int32), a, *b).astype(dtype)


def _add_by_xla(x: Any, out: Any, slot: Any, a: Any, *b: Any, dtype: DTypeLike) -> Any:
    """All adapters' products with all rows, of which each row keeps its own."""
    parts, slots, rank, width = a.shape
    inner = _contract(x.astype(a.dtype), a.reshape(-1, width), 1)
    inner = inner.reshape(-1, parts, slots, rank)
    if slot is not None:
        is_own = slot[:, None] == jnp.arange(slots)[None, :]
        inner = jnp.where(is_own[:, None, :, None], inner, 0.0)
    inner = inner.astype(a.dtype).reshape(-1, parts, slots * rank)
    updates = [
        _contract(inner[:, part], one.reshape(slots * rank, -1), 0) for part, one in enumerate(b)
    ]
    update = updates[0] if parts == 1 else jnp.concatenate(updates, axis=1)
    return (out + update).astype(dtype)


def _contract(left: Any, right: Any, axis: int) -> Any:
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
