"""Attention with sums in the order of positions: deterministic mode on NVIDIA GPUs."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from folojax.attention import reference
from folojax.attention.interface import AttentionSpec
from folojax.attention.paged_ordered import attend_in_order
from folojax.kv.placement import Placement
from folojax.models.core.row_kernels import kernel_or
from folojax.models.machine.triton import triton

_HOPPER, _AFTER = 9.0, 10.0  # compute capabilities
_HEAD_DIMS = (64, 128, 256)  # with others tiles are of several kinds of instruction


class _Ordered:
    """The kernel; see `folojax.attention.interface.Kernel`."""

    def refusal(self, spec: AttentionSpec) -> str | None:
        """Refuses all but half precision, uncapped scores and head dims of 64, 128 and 256."""
        if spec.page_format.order != "tokens":
            return "reads pages in the order of tokens"
        if triton is None:
            return "needs a JAX that has Triton"
        if not _HOPPER <= spec.page_format.capability < _AFTER:
            return "needs an NVIDIA GPU of the Hopper generation"
        if spec.dtype not in (jnp.bfloat16, jnp.float16) or spec.storage_dtype != spec.dtype:
            return "takes bfloat16 and float16"
        if spec.scoring.softcap is not None:
            return "does not cap scores"
        if spec.scoring.chunk is not None:
            return "knows no chunks"
        if spec.scoring.has_sinks:
            return "knows no sinks"
        if spec.scoring.value_dim is not None:
            return "takes values that lie beside their keys"
        if spec.head_dim not in _HEAD_DIMS:
            return f"takes head dims of {_HEAD_DIMS}"
        return None

    def attend(
        self,
        query: Float[Array, "T H D"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T K D"] | None,
        pages: Num[Array, "P 2 S K D"],
        placement: Placement,
        spec: AttentionSpec,
        sinks: Float[Array, " H"] | None = None,
    ) -> tuple[Num[Array, "P 2 S K D"], Float[Array, "T H D"]]:
        """As `Kernel.attend`; elsewhere than on such a GPU as plain XLA, in any order."""
        del sinks  # refused
        assert value is not None, "values that are a part of keys are refused"
        scale = query.shape[-1] ** -0.5 if spec.scoring.scale is None else spec.scoring.scale
        kernel = functools.partial(attend_in_order, window=spec.scoring.window, scale=scale)

        plain = functools.partial(reference.KERNEL.attend, spec=spec)
        result: Any = kernel_or(kernel, plain)(query, key, value, pages, placement)
        return result


KERNEL = _Ordered()
