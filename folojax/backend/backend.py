"""The backend of an engine: all that depends on the platform, as one value.

It is chosen where the engine is built (`choose_backend`) and handed down. No other room asks for
the platform; products of matrices have a branch for each, of which a program holds the one that it
is lowered for (`models.core.layers`).
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from folojax.backend.swap_cost import SwapRates
from folojax.compile.shapes import Shapes, powers, up_to, with_parts
from folojax.kv.cache import KVLayout, PageFormat, PageOrder
from folojax.models.core.config import ModelConfig
from folojax.sched.pages import pages_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """A platform, as far as the engine minds.

    Attributes:
        name: JAX's name of the platform.
        default_dtype: Of a model whose user has no wish.
        defaults: Fields of `EngineConfig` that are None unless they are given.
        memory_fraction: Share of the device that weights, pages and temporaries take by default;
            None: the pool is not sized by memory unless that is asked for.
        page_order: How pages lie.
        kernels: Of attention, the preferred one first.
        exact_kernels: Likewise, of an engine in deterministic mode.
        stores_float32: Whether pages are of float32 whatever the model's dtype. On CPU XLA sends an
            array of half precision through float32 on every write and most reads.
        is_layered: Whether a step is run some layers at a time (`folojax.steps.by_layer`), or as
            one program with its sampling in it (`folojax.steps.fused`).
        warms_up: Whether an engine compiles what it will need when it is made.
        measures_memory: Whether what steps need is asked of compiled ones where the pool is sized
            by it; else a bound does, which wastes a part of a large memory and no time.
        rows_per_call: T, tokens of a call in deterministic mode.
        arrays_per_copy: How many layers' arrays a copy of pages moves in one call; None is all.
        swap_rates: What moving K/V to the host and computing them again cost.
        host_memory: JAX's name of the memory in which pages wait on the host; None: the device's
            own, where host and device have one.
        capability: NVIDIA's compute capability of the device; 0 for any other.
    """

    name: str
    default_dtype: DTypeLike
    defaults: dict[str, int] = dataclasses.field(hash=False)
    memory_fraction: float | None
    page_order: PageOrder
    kernels: tuple[str, ...]
    exact_kernels: tuple[str, ...]
    stores_float32: bool
    is_layered: bool
    warms_up: bool
    measures_memory: bool
    rows_per_call: int
    arrays_per_copy: int | None
    swap_rates: SwapRates
    host_memory: str | None
    capability: float = 0.0

    def kv_layout(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        num_pages: int,
        page_size: int,
        *,
        is_deterministic: bool = False,
    ) -> KVLayout:
        """The layout of a cache for a model."""
        kernels = self.exact_kernels if is_deterministic else self.kernels
        page_format = PageFormat(page_size, self.page_order, kernels, self.capability)
        storage = jnp.float32 if self.stores_float32 else dtype
        return KVLayout.of(config, dtype, num_pages, page_format, storage)

    def shapes(self, config: Any, dtype: DTypeLike) -> Shapes:
        """The shapes of an engine's calls.

        Args:
            config: A `ResolvedConfig`.
            dtype: Of the model.
        """
        most_rows = pages_for(config.max_num_batched_tokens, config.prefill_row_len)
        table_pages = pages_for(config.max_model_len, config.page_size)
        most = config.max_num_seqs
        if self.is_layered:
            # A product with a single row of half precision converts all weights, in every call.
            least = 1 if jnp.dtype(dtype) == jnp.float32 else 2
            # A batch that runs dry spends half of its steps between two powers of two; below 4 rows
            # one more takes no longer.
            decode_rows = with_parts(powers(most, 2, least), first_halved=4, first_quartered=16)
            prefill_rows = powers(most_rows, 2)
            sampled_rows = decode_rows
        else:
            # An executable takes 10 s to compile, and up to 64 rows a step takes as long as its
            # kernels take to start; rows of padding read no pages.
            most_power = powers(max(most, 64), 2, 64)
            sizes = (1, 8, 32, *with_parts(most_power, first_halved=64, first_quartered=128))
            decode_rows = up_to(sizes, most)
            sampled_rows = up_to((8, 32, *most_power), most)
            # Half as many again as the budget fills: the last row of a prompt is rarely full, and
            # what does not fit is a second pass over the weights.
            prefill_rows = up_to((1, 8), most_rows + most_rows // 2)
        return Shapes(
            decode_rows=decode_rows,
            sampled_rows=sampled_rows,
            prefill_rows=prefill_rows,
            prefill_columns=config.prefill_row_len,
            table_pages=table_pages,
            is_coarse=not self.is_layered,
            prefill_tokens=None if self.is_layered else config.max_num_batched_tokens,
        )


# Measured: docs/decisions.md, docs/gpu.md. A copy to the host faults its pages in on CPU, and goes
# over PCIe on a GPU.
CPU = Backend(
    name="cpu",
    default_dtype=jnp.float32,
    defaults={
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
        "page_size": 64,
        "prefill_row_len": 16,
    },
    memory_fraction=None,
    page_order="heads",
    kernels=("native", "reference"),
    exact_kernels=("native", "alike"),
    stores_float32=True,
    is_layered=True,
    warms_up=False,
    measures_memory=True,
    rows_per_call=32,
    arrays_per_copy=1,
    swap_rates=SwapRates(flops_per_s=1e11, bytes_per_s=4e9, overhead_s=5e-3),
    host_memory=None,
)

GPU = Backend(
    name="gpu",
    default_dtype=jnp.bfloat16,
    defaults={
        "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
        "page_size": 64,
        "prefill_row_len": 128,
    },
    memory_fraction=0.9,
    page_order="tokens",
    kernels=("cudnn", "reference"),
    exact_kernels=("alike",),
    stores_float32=False,
    is_layered=False,
    warms_up=True,
    measures_memory=False,
    rows_per_call=128,
    arrays_per_copy=None,
    swap_rates=SwapRates(flops_per_s=3e14, bytes_per_s=2e10, overhead_s=5e-3),
    host_memory="pinned_host",
)


def choose_backend() -> Backend:
    """The backend of JAX's default platform; platforms nobody has measured are as a GPU."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return CPU
    stated = str(getattr(device, "compute_capability", ""))  # AMD's are names
    capability = float(stated) if re.fullmatch(r"\d+\.\d+", stated) else 0.0
    return dataclasses.replace(GPU, name=device.platform, capability=capability)
