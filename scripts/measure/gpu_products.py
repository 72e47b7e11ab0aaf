"""Products alone, of a model's shapes: bfloat16, XLA's and ours, and kernels of fewer bits.

    python scripts/measure/gpu_products.py                     Qwen3-8B, 1 to 2,048 rows
    python scripts/measure/gpu_products.py --rows 8 --group 128 --kinds bfloat16 int4

Microseconds a product, scales and rounding of inputs included, and the first kind's time over it. A
program multiplies with sixteen kernels one after the other, many times over, so that no kernel is
found in a cache and the host has no part in it. Before it is timed each product is compared with
one in float32 of what its codes mean: `error` is the mean difference over the mean size, of
rounding to bfloat16 0.0014, of inputs in float8 some 0.03. Columns of `layer` add up the others'.
Kinds are `xla` (bfloat16 by XLA alone), and as a layer multiplies `bfloat16`, `int4` and `fp8`;
with `+gate`, the first product of an MLP and its gate.

Exit code: 0; 1 if a product in four bits is wrong.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from gpu_common import SHAPES, Report

from folojax.models.core.linear import gated, project, project_gated
from folojax.models.quantized.codes import dequantize
from folojax.models.quantized.float8_kernels import quantize_float8
from folojax.models.quantized.tiled_kernels import quantize_tiles

_KERNELS, _SECONDS, _MOST_ERROR = 16, 0.01, 0.004
_DIMS = (((1,), (1,)), ((), ()))
_GATE = "+gate"


def products(name: str, small: bool) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's products."""
    shape = SHAPES[name]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads = shape["num_heads"] * shape["head_dim"]
    if small:
        hidden, inner, heads = 256, 512, 256
    return {
        "qkv": (heads + 2 * (heads if small else shape["num_kv_heads"] * 128), hidden),
        "o": (hidden, heads),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def make_kernels(kind: str, outputs: int, inputs: int, group: int) -> list[Any]:
    """Random ones, all different."""

    def make(key: Any) -> Any:
        weights = (0.02 * jax.random.normal(key, (outputs, inputs))).astype(jnp.bfloat16)
        if kind == "int4":
            return quantize_tiles(weights, group)
        return quantize_float8(weights) if kind == "fp8" else weights

    made = jax.jit(make)
    return [
        jax.block_until_ready(made(key)) for key in jax.random.split(jax.random.key(0), _KERNELS)
    ]


def multiply(x: Any, kernel: Any, kind: str) -> Any:
    """As a layer does it, or XLA."""
    if kind == "xla":
        return jax.lax.dot_general(x, kernel, _DIMS, preferred_element_type=x.dtype)
    if kind.endswith(_GATE):
        return project_gated(x, kernel, "silu", x.dtype, is_ordered=False)
    return project(x, kernel, is_rounded=True)


def measure(x: Any, kernels: list[Any], times: int, kind: str) -> tuple[float, float]:
    """Microseconds of a product, and its error."""

    def many(x: Any, kernels: list[Any]) -> Any:
        def once(_: Any, x: Any) -> Any:
            # What is multiplied next depends on all of these, so none can be left out.
            found = [jax.lax.optimization_barrier(multiply(x, one, kind)) for one in kernels]
            return x + 1e-30 * sum(one[0, 0] for one in found)

        return jax.lax.fori_loop(0, times, once, x), multiply(x, kernels[0], kind)

    compiled = jax.jit(many).lower(x, kernels).compile()
    wide = kernels[0] if isinstance(kernels[0], jax.Array) else dequantize(kernels[0])
    meant = jax.lax.dot_general(
        x, wide.astype(jnp.bfloat16), _DIMS, preferred_element_type=jnp.float32
    )
    if kind.endswith(_GATE):
        meant = gated(meant.astype(x.dtype), dtype=jnp.float32)
    found = compiled(x, kernels)[1].astype(jnp.float32)
    error = jnp.abs(found - meant).mean() / jnp.abs(meant).mean()
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, kernels))
        best = min(best, time.perf_counter() - start)
    return best / (times * len(kernels)) * 1e6, float(error)


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 128, 256, 512, 2048])
    parser.add_argument("--kinds", nargs="+", default=["xla", "bfloat16", "int4", "fp8"])
    parser.add_argument("--group", type=int, default=32, help="inputs that share a scale, of int4")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--out", type=Path, help="a file for the lines")
    args = parser.parse_args()
    report = Report(device=str(jax.devices()[0]), jax=jax.__version__, group=args.group)
    is_right = True
    layers: dict[tuple[int, str], float] = {}
    for product, (outputs, inputs) in products(args.model, args.small).items():
        times: dict[int, float] = {}
        for kind in args.kinds:
            if kind.endswith(_GATE) and product != "gate_up":
                continue
            kernels = make_kernels(kind.removesuffix(_GATE), outputs, inputs, args.group)
            for rows in args.rows:
                x = jax.random.normal(jax.random.key(rows), (rows, inputs)).astype(jnp.bfloat16)
                expected = 5e-6 + max(2 * rows / 6e14, 1 / 2e12) * outputs * inputs
                count = 1 if args.small else max(2, int(_SECONDS / _KERNELS / expected))
                taken, error = measure(x, kernels, count, kind)
                times.setdefault(rows, taken)
                layers[rows, kind] = layers.get((rows, kind), 0.0) + taken
                ratio = times[rows] / taken
                report.add(
                    product=product, rows=rows, kind=kind, us=taken, ratio=ratio, error=error
                )
                is_right &= not kind.startswith("int4") or error < _MOST_ERROR
    for (rows, kind), taken in sorted(layers.items()):
        ratio = layers[rows, args.kinds[0]] / taken
        report.add(product="layer", rows=rows, kind=kind, us=taken, ratio=ratio)
    if args.out:
        report.write(args.out)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
