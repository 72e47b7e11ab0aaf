"""What this machine can do at best, and how near to it an engine comes.

The rates are those of XLA's own products and copies, and of folojax's product with kernels of four
bits, which XLA lacks; at the shapes of the model, measured in the same run as the engine: in its
rounds, in a process of its own.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_work import (
    Product,
    decode_bytes,
    decode_flops,
    head_product,
    layer_products,
    num_weights,
    token_flops,
    workload_flops,
)
from bench_workloads import Workload

from folojax import LLM, SamplingParams
from folojax.models.core.config import ModelConfig
from folojax.models.core.linear import project
from folojax.models.quantized.quantize import quantize

CEILINGS = "ceilings"

WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.625}
"""By dtype of the weights; of "int4" those of layers, scales included: the head has more."""

DTYPES = tuple(WEIGHT_BYTES)

DECODE_ROWS, PREFILL_ROWS = 32, 512
"""Rows of the products that are timed."""

_ENOUGH_BYTES = 2**27
"""Of arrays that are read from memory: more than a core's caches hold."""

_REPEATS = 5


class Ceilings:
    """A contender that runs no workload: its rounds measure the machine.

    Attributes:
        name: In the figures.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Remembers the model's shapes."""
        self.name = CEILINGS
        self._config = config
        self._chains: list[_Products] = []
        self._head: list[_Products] = []

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """Makes the matrices and compiles."""
        products = layer_products(self._config, 0)
        for dtype in DTYPES:
            size = num_weights(products) * WEIGHT_BYTES[dtype]
            count = max(1, min(self._config.num_layers, int(_ENOUGH_BYTES // size)))
            head = [head_product(self._config)]
            for is_transposed in (False, True) if dtype != "int4" else (True,):
                self._chains.append(_Products(products * count, dtype, is_transposed))
                self._head.append(_Products(head, dtype, is_transposed, "lm_head"))
        self.run(workload)
        return {}

    def run(self, workload: Workload) -> dict[str, Any]:
        """Measures once.

        Returns:
            GB/s of `copy_gb_s` (read and written, into a donated array) and `read_gb_s` (a matrix
            by a vector); GFLOP/s of products by dtype: `gemm_decode_gflops` at DECODE_ROWS, head
            included, `gemm_prefill_gflops` at PREFILL_ROWS, and `gemm_gflops`, the better one.
        """
        decode = {dtype: self._decode_gflops(dtype) for dtype in DTYPES}
        prefill = {
            dtype: max(chain.gflops(PREFILL_ROWS) for chain in self._of(self._chains, dtype))
            for dtype in DTYPES
        }
        return {
            "copy_gb_s": copy_gb_s(),
            "read_gb_s": read_gb_s(),
            "gemm_decode_gflops": decode,
            "gemm_prefill_gflops": prefill,
            "gemm_gflops": {dtype: max(decode[dtype], prefill[dtype]) for dtype in DTYPES},
        }

    def close(self) -> None:
        """Nothing is left to be given back."""

    def _decode_gflops(self, dtype: str) -> float:
        """Of all layers and the head, each in its better layout."""
        parts = [
            (token_flops(self._config), self._chains),
            (2 * num_weights([head_product(self._config)]), self._head),
        ]
        duration = 0.0
        for flops, kind in parts:
            rates = [products.gflops(DECODE_ROWS) for products in self._of(kind, dtype)]
            duration += flops / max(rates)
        return sum(flops for flops, _ in parts) / duration

    @staticmethod
    def _of(kind: Sequence["_Products"], dtype: str) -> list["_Products"]:
        return [products for products in kind if products.dtype == dtype]


class _Products:
    """Products that follow each other, each with a matrix of its own."""

    def __init__(
        self, products: Sequence[Product], dtype: str, is_transposed: bool, name: str = "down"
    ) -> None:
        rng = np.random.default_rng(0)
        is_quantized = dtype == "int4"
        self.dtype = dtype
        self._shapes = products
        multiply = _project if is_quantized else functools.partial(_multiply, axis=is_transposed)
        self._run = jax.jit(multiply)
        self._matrices: list[Any] = []
        for inner, outer in products:
            shape = (outer, inner) if is_transposed else (inner, outer)
            # About as large as their input: products of products neither vanish nor overflow.
            values = rng.uniform(-1, 1, shape).astype(np.float32) * (3 / inner) ** 0.5
            scale = 40 if dtype == "int8" else 1
            matrix = jnp.asarray(scale * values, "float32" if is_quantized else dtype)
            self._matrices.append(quantize(name, matrix, dtype if is_quantized else None))

    def gflops(self, num_rows: int) -> float:
        """The rate, compiled beforehand."""
        x = jnp.ones(
            (num_rows, self._shapes[0][0]), "float32" if self.dtype == "int4" else self.dtype
        )
        seconds = best_s(lambda: self._run(x, self._matrices))
        return 2 * num_rows * num_weights(self._shapes) / seconds / 1e9


def _multiply(x: jax.Array, matrices: Sequence[jax.Array], axis: int) -> jax.Array:
    """Contracts that axis of every matrix."""
    dtype = x.dtype
    wide = jnp.int32 if dtype == jnp.int8 else jnp.float32
    for matrix in matrices:
        x = _fit(x, matrix.shape[axis]).astype(dtype)
        dimensions = (((1,), (axis,)), ((), ()))
        x = jax.lax.dot_general(x, matrix, dimensions, preferred_element_type=wide)
    return x


def _project(x: jax.Array, kernels: Sequence[Any]) -> jax.Array:
    """As the engine multiplies with quantised kernels."""
    for kernel in kernels:
        x = project(_fit(x, kernel.shape[1]), kernel)
    return x


def _fit(x: jax.Array, width: int) -> jax.Array:
    """What is too wide for the next product is cut, what is too narrow padded."""
    return jnp.pad(x, ((0, 0), (0, max(width - x.shape[1], 0))))[:, :width]


def copy_gb_s() -> float:
    """Bytes read and written a second, from one array into another that is donated."""
    source = jnp.zeros(_ENOUGH_BYTES // 4, jnp.float32)
    target = jnp.ones_like(source)

    def once() -> jax.Array:
        nonlocal target
        target = _copy(target, source)
        return target

    return 2 * source.nbytes / best_s(once) / 1e9


# An argument without use would be dropped, and its memory not be written to.
@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copy(target: jax.Array, source: jax.Array) -> jax.Array:
    return source + 1


def read_gb_s() -> float:
    """Bytes of a float32 matrix read a second, to multiply it with a vector."""
    width = 2048
    matrix = jnp.ones((_ENOUGH_BYTES // 4 // width, width), jnp.float32)
    row, column = jnp.ones((1, matrix.shape[0])), jnp.ones((1, width))
    ways = (lambda: _read_rows(column, matrix), lambda: _read_columns(row, matrix))
    return matrix.nbytes / min(best_s(way) for way in ways) / 1e9


@jax.jit
def _read_rows(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, matrix, (((1,), (1,)), ((), ())))


@jax.jit
def _read_columns(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return x @ matrix


def best_s(once: Callable[[], jax.Array]) -> float:
    """The shortest of some calls after a first one, in seconds: what the machine can do."""
    jax.block_until_ready(once())
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(once())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def time_decode_steps(llm: LLM, num_rows: int, limit: int, num_tokens: int) -> dict[str, Any]:
    """How long a step takes in which every row decodes one token, as the host sees it.

    Args:
        llm: An engine without requests, whose programs are compiled.
        num_rows: Rows.
        limit: Most tokens of a request; a quarter of it, at most 64, is its prompt.
        num_tokens: Ids of prompts are below it.

    Returns:
        `decode_step_ms`, the median, and `decode_position`, that of the tokens in the median.
    """
    prompt_len = max(2, min(64, limit // 4))
    output_len = max(4, min(64, limit // 4))
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    for row in range(num_rows):
        # Different ones, so that rows share no pages.
        prompt = rng.integers(num_tokens, size=prompt_len).tolist()
        llm.add_request(f"decode-{row}", {"prompt_token_ids": prompt}, params)
    seconds, lengths, now = [], dict.fromkeys(range(num_rows), 0), time.perf_counter()
    while llm.has_unfinished_requests():
        before = dict(lengths)
        outputs = llm.step()
        start, now = now, time.perf_counter()
        for output in outputs:
            row = int(output.request_id.removeprefix("decode-"))
            lengths[row] = len(output.outputs[0].token_ids)
        gained = {lengths[row] - before[row] for row in lengths}
        # Of several tokens a call each has its part of the time.
        if min(before.values()) > 0 and len(gained) == 1 and (per_row := gained.pop()):
            seconds.append((now - start) / per_row)
    llm.reset_prefix_cache()
    step_ms = 1e3 * statistics.median(seconds) if seconds else None
    return {"decode_step_ms": step_ms, "decode_position": prompt_len + output_len // 2}


def compare(
    figures: Mapping[str, Any],
    ceilings: Mapping[str, Any],
    config: ModelConfig,
    workload: Workload,
) -> dict[str, Any]:
    """An engine's figures against the ceilings of the same run.

    Args:
        figures: The engine's, over all rounds.
        ceilings: What `Ceilings` has measured.
        config: The model.
        workload: What the engine ran.

    Returns:
        `useful_tflop` of the workload and `gemm_share`, its part of what products alone would have
        done in that time; `decode_bound_ms` and `decode_over_bound`, if steps were timed.
    """
    dtype = figures["dtype"]
    gflops = ceilings["gemm_gflops"][dtype]
    useful = workload_flops(config, workload)
    found = {
        "useful_tflop": useful / 1e12,
        "gemm_share": useful / figures["duration"] / (gflops * 1e9),
    }
    if figures.get("decode_step_ms") is None:
        return found
    rows, position = figures["decode_rows"], figures["decode_position"]
    itemsize = WEIGHT_BYTES[dtype]
    kv_bytes = figures["kv_bytes_per_token"]
    reading = decode_bytes(config, itemsize, kv_bytes, rows, position) / ceilings["read_gb_s"]
    computing = decode_flops(config, rows, position) / gflops
    bound_ms = max(reading, computing) / 1e6
    return found | {
        "decode_bound_ms": bound_ms,
        "decode_over_bound": figures["decode_step_ms"] / bound_ms,
    }
