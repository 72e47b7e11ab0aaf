"""The backend of an engine: all that depends on the platform, as one value.

It is chosen where the engine is built (`choose_backend`) and handed down. No other room asks for
the platform; products of matrices have a branch for each, of which a program holds the one that it
is lowered for (`models.core.layers`).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from folojax.backend.devices import DEFAULT_DEVICE, Devices
from folojax.backend.swap_cost import SwapRates
from folojax.compile.shapes import Shapes, powers, up_to, with_parts
from folojax.kv.cache import KVLayout, PageFormat, PageOrder
from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama
from folojax.models.quantized.names import TILED
from folojax.sched.pages import pages_for
from folojax.steps import ordered
from folojax.steps.by_layer import LayeredSteps
from folojax.steps.calls import Steps
from folojax.steps.executables import StepKind
from folojax.steps.fused import WholeSteps
from folojax.steps.row_by_row import RowSteps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """A platform, as far as the engine minds."""

    name: str  # JAX's, of the platform
    default_dtype: DTypeLike  # of a model whose user has no wish
    defaults: dict[str, int] = dataclasses.field(hash=False)
    """Fields of `EngineConfig` that are None unless they are given."""
    memory_fraction: float | None
    """Share of the device that weights, pages and temporaries take by default; None: the pool is
    not sized by memory unless that is asked for."""
    page_order: PageOrder
    kernels: tuple[str, ...]  # of attention, the preferred one first
    exact_kernels: tuple[str, ...]  # likewise, of an engine in deterministic mode
    stores_float32: bool
    """Whether pages are of float32 whatever the model's dtype. On CPU XLA sends an array of half
    precision through float32 on every write and most reads."""
    steps: StepKind  # how the calls of a step are made (`folojax.steps.calls`)
    exact_steps: StepKind  # likewise in deterministic mode, for models that these take
    warms_up: bool  # whether an engine compiles what it will need when it is made
    measures_memory: bool
    """Whether what steps need is asked of compiled ones where the pool is sized by it; else a bound
    does, which wastes a part of a large memory and no time."""
    rows_per_call: int  # T, tokens of a call of steps in rows
    arrays_per_copy: int | None  # layers' arrays that a copy of pages moves in one call; None: all
    swap_rates: SwapRates  # what moving K/V to the host and computing them again cost
    host_memory: str | None  # JAX's name of the host's memory; None: it is the device's
    int4_kind: str = "int4"  # what "int4" is there (`folojax.models.quantized.names`)
    capability: float = 0.0  # NVIDIA's compute capability of the device; 0 for any other
    devices: Devices = DEFAULT_DEVICE  # that the engine runs on, and how its arrays lie there

    def kv_layout(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        num_pages: int,
        page_size: int,
        num_seqs: int = 0,
        num_kept_states: int = 0,
    ) -> KVLayout:
        """The layout of a cache.

        Args:
            config: Of the model.
            dtype: Of its keys and values.
            num_pages: Of the pool.
            page_size: Tokens of a page.
            num_seqs: Most requests in a plan: of each, recurrent layers have a state.
            num_kept_states: States beside those, for the prefix cache.
        """
        heads = []
        for layer in range(config.num_layers):
            own = config.at(layer)
            num_heads = 0 if layer in config.mixerless_layers else own.num_kv_heads
            heads.append((num_heads, own.key_dim))
        return KVLayout(
            num_pages=num_pages,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.key_dim,
            value_dim=config.kv_rank or None,
            recurrent=config.recurrent,
            num_slots=num_seqs if config.recurrent else 0,
            num_kept_states=num_kept_states,
            heads=tuple(heads) if len(set(heads)) > 1 else (),
            num_shards=self.devices.count,
            dtype=dtype,
            storage_dtype=jnp.float32 if self.stores_float32 else dtype,
            format=PageFormat(page_size, self.page_order, self.kernels, self.capability),
        )

    def kind_of(self, quantization: str | None) -> str | None:
        """What kernels are quantised to where a user asks for this."""
        return self.int4_kind if quantization == "int4" else quantization

    def quantization_problem(self, quantization: str | None) -> str | None:
        """Why it cannot be had here, and what to do; None: it can."""
        if quantization is None or self.name == "cpu":
            return None
        if self.name != "gpu" or not self.capability:
            return "for CPU and NVIDIA GPUs; leave it out"
        least = _LEAST_CAPABILITY.get(quantization, 0.0)
        if self.capability >= least:
            return None
        return (
            f"for cards of compute capability {least} on, and this one's is {self.capability}; "
            f"{_INSTEAD[quantization]}"
        )

    def deterministic(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        quantization: str | None = None,
        has_adapters: bool = False,
    ) -> "Backend":
        """The same platform where what a row gets has the same bits whatever its company.

        Sums of an order of their own where the platform has these and they take the model, else
        rows of one shape, which are slower on a GPU.
        """
        asked = config, dtype, quantization, has_adapters
        if self.exact_steps == "ordered" and self.not_ordered(*asked) is None:
            return dataclasses.replace(self, steps="ordered", kernels=(ordered.KERNEL,))
        return dataclasses.replace(self, steps="rows", kernels=self.exact_kernels)

    def not_ordered(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        quantization: str | None = None,
        has_adapters: bool = False,
    ) -> str | None:
        """Why deterministic mode is in rows of one shape, as the rest of a sentence; None: not."""
        if self.devices.count > 1:
            return "runs on one device"
        if has_adapters:
            return "takes no adapters beside the weights"
        page_format = self.kv_layout(config, dtype, 1, 1).format
        return ordered.refusal(config, dtype, page_format, quantization)

    def make_steps(self, model: Llama) -> Steps:
        """From executables to the device calls of a model."""
        kinds: dict[StepKind, Callable[[Llama], Steps]] = {
            "layers": LayeredSteps,
            "rows": RowSteps,
            "whole": WholeSteps,
            "ordered": ordered.OrderedSteps,
        }
        return kinds[self.steps](self.devices.part(model))

    def shapes(self, config: Any, dtype: DTypeLike) -> Shapes:
        """The shapes of an engine's calls.

        Args:
            config: A `ResolvedConfig`.
            dtype: Of the model.
        """
        most_rows = pages_for(config.max_num_batched_tokens, config.prefill_row_len)
        table_pages = pages_for(config.max_model_len, config.page_size)
        most = config.max_num_seqs
        if self.steps == "rows":
            rows = (self.rows_per_call,)
            return Shapes(
                decode_rows=rows,
                sampled_rows=rows,
                prefill_rows=rows,
                prefill_columns=1,
                table_pages=table_pages,
            )
        is_layered = self.steps == "layers"
        if is_layered:
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
            prefill_rows = up_to((1, 8, 32), most_rows + most_rows // 2)
        return Shapes(
            decode_rows=decode_rows,
            sampled_rows=sampled_rows,
            prefill_rows=prefill_rows,
            prefill_columns=config.prefill_row_len,
            table_pages=table_pages,
            is_coarse=not is_layered,
            prefill_tokens=None if is_layered else config.max_num_batched_tokens,
        )


# Of NVIDIA's cards: bfloat16 from Ampere on, float8 from Ada and Hopper on.
_LEAST_CAPABILITY = {"int4": 8.0, "fp8": 8.9}
_INSTEAD = {"int4": 'take "int8"', "fp8": 'take "int8" or "int4"'}

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
    steps="layers",
    exact_steps="rows",
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
    kernels=("cudnn", "latent", "reference"),
    exact_kernels=("alike",),
    stores_float32=False,
    steps="whole",
    exact_steps="ordered",
    warms_up=True,
    measures_memory=False,
    rows_per_call=128,
    arrays_per_copy=None,
    swap_rates=SwapRates(flops_per_s=3e14, bytes_per_s=2e10, overhead_s=5e-3),
    host_memory="pinned_host",
    int4_kind=TILED,
)


# Prompts take half as many steps, each of which reads the weights for the rows that go on, too
# (docs/gpu.md). Of 8B temporaries are two GiB more, which smaller cards need for pages.
_LARGE_BYTES = 32 * 2**30
_OF_LARGE = {"max_num_batched_tokens": 8192}


def choose_backend(devices: Devices = DEFAULT_DEVICE) -> Backend:
    """The backend of devices of a kind; one that nobody has measured is as a GPU."""
    device = devices.first
    if device.platform == "cpu":
        return dataclasses.replace(CPU, devices=devices)
    stated = str(getattr(device, "compute_capability", ""))  # AMD's are names
    capability = float(stated) if re.fullmatch(r"\d+\.\d+", stated) else 0.0
    is_large = devices.least_memory >= _LARGE_BYTES
    return dataclasses.replace(
        GPU,
        name=device.platform,
        capability=capability,
        devices=devices,
        defaults=GPU.defaults | _OF_LARGE if is_large else GPU.defaults,
    )
