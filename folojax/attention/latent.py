"""Attention to pages of latents by kernels of our own: NVIDIA GPUs."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from folojax.attention import reference
from folojax.attention.interface import AttentionSpec
from folojax.attention.paged_decode import attend_single, is_taken
from folojax.attention.paged_latent import attend_chunks
from folojax.kv.placement import Placement
from folojax.models.core.row_kernels import kernel_or
from folojax.models.machine.triton import triton

_AMPERE = 8.0  # compute capability


class _Latent:
    """The kernel; see `folojax.attention.interface.Kernel`."""

    def refusal(self, spec: AttentionSpec) -> str | None:
        """Refuses all but latents in half precision, uncapped scores, and some sizes."""
        if spec.scoring.value_dim is None:
            return "takes keys whose first numbers are the values"
        if spec.page_format.order != "tokens":
            return "reads pages in the order of tokens"
        if triton is None:
            return "needs a JAX that has Triton"
        if spec.page_format.capability < _AMPERE:
            return "needs an NVIDIA GPU of the Ampere generation or later"
        if spec.dtype not in (jnp.bfloat16, jnp.float16) or spec.storage_dtype != spec.dtype:
            return "takes bfloat16 and float16"
        if spec.scoring.softcap is not None:
            return "does not cap scores"
        if spec.scoring.has_sinks:
            return "knows no sinks"
        of_page = spec.page_format.page_size, spec.page_format.capability
        if not is_taken(spec.head_dim, 1, *of_page, spec.value_dim):
            return (
                "takes latents, turning keys and pages whose sizes are powers of two from 16 on, "
                "the first two up to 640 together"
            )
        return None

    def attend(
        self,
        query: Float[Array, "T H D"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T K D"] | None,
        pages: Num[Array, "P N S K D"],
        placement: Placement,
        spec: AttentionSpec,
        sinks: Float[Array, " H"] | None = None,
    ) -> tuple[Num[Array, "P N S K D"], Float[Array, "T H V"]]:
        """As `Kernel.attend`; elsewhere than on such a GPU as plain XLA."""
        del sinks, value  # refused
        scale = query.shape[-1] ** -0.5 if spec.scoring.scale is None else spec.scoring.scale
        call = attend_single if placement.columns == 1 else attend_chunks

        def kernel(query: Any, key: Any, pages: Any, placement: Any) -> Any:
            of_layer = spec.scoring.window, scale
            return call(query, key, spec.value_dim, pages, placement, *of_layer)

        def plain(query: Any, key: Any, pages: Any, placement: Any) -> Any:
            return reference.KERNEL.attend(query, key, None, pages, placement, spec)

        result: Any = kernel_or(kernel, plain)(query, key, pages, placement)
        return result


KERNEL = _Latent()
