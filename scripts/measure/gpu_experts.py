"""Experts over several devices: each has a part of every expert's width, or some experts whole.

    python scripts/measure/gpu_experts.py                      two GPUs, five models' experts
    python scripts/measure/gpu_experts.py --devices 4 --shapes qwen3-30b --rows 1 64
    python scripts/measure/gpu_experts.py --shapes tiny medium --dtype float32      forced devices

Microseconds of a layer: router, experts and the sum over devices, which is the same both ways.
Several layers with kernels of their own follow one another, so that none is found in a cache.
Routers are random, so experts have about as many rows each; `most` is the share of the busiest
device's bytes in those of all, where experts are whole. Engines have the first way
(docs/several_devices.md); the other one is written here alone.

Exit code: 0; 1 if both give different sums.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import QWEN3, Report
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folojax.compile.programs import IN_GRAPH
from folojax.models.core import peer_sum
from folojax.models.core.config import ModelConfig
from folojax.models.core.expert_product import by_expert
from folojax.models.core.linear import gated, project
from folojax.models.core.moe import Experts, choose_experts, mix_experts
from folojax.models.core.shards import AXIS, cut, part_of, sum_parts

# Experts, those of a token, width of the stream, inner width of an expert.
SHAPES = {
    "qwen3-30b": (128, 8, 2048, 768),
    "qwen3-next": (512, 10, 2048, 512),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "gpt-oss": (32, 4, 2880, 2880),
    "mixtral": (8, 2, 4096, 14336),
    "medium": (32, 4, 512, 256),
    "tiny": (8, 2, 64, 32),
}
_OF_GPUS = list(SHAPES)[:-2]
_LAYERS = 6


def config_of(name: str) -> ModelConfig:
    """A model of which only the experts matter."""
    count, per_token, width, inner = SHAPES[name]
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_layers": 1,
        "num_heads": 8,
        "tie_embeddings": True,
        "num_experts": count,
        "num_experts_per_token": per_token,
        "expert_size": inner,
    }
    return ModelConfig(**QWEN3 | sizes)


def mix_some(x: Any, experts: Experts, config: ModelConfig) -> Any:
    """What a device adds whose experts are some of all, whole: these are first in its order."""
    count, per_token = config.num_experts, config.num_experts_per_token
    own = experts.gate_up.shape[0]
    router: Any = experts.router
    weight, expert = choose_experts(project(x, router), x.dtype, config)
    place = (expert.reshape(-1) - jax.lax.axis_index(AXIS) * own) % count
    order = jnp.argsort(place)
    sizes = jnp.bincount(place, length=count)[:own]
    both = by_expert(x[order // per_token], experts.gate_up, sizes)
    inner = gated(both, config.activation).astype(x.dtype)
    out = by_expert(inner, experts.down, sizes)
    out = jnp.where((place[order] < own)[:, None], out, 0)
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
    return (out.reshape(*expert.shape, -1) * weight[:, :, None]).sum(1).astype(x.dtype)


def make_layers(config: ModelConfig, mesh: Mesh, dtype: Any, way: str) -> list[Experts]:
    """Random kernels, where they lie; the same both ways."""

    def make(key: Any) -> Experts:
        router, gate_up, down = jax.random.split(key, 3)
        count, width, inner = config.num_experts, config.hidden_size, config.expert_size

        def draw(key: Any, *shape: int) -> Any:
            return (0.05 * jax.random.normal(key, shape)).astype(dtype)

        whole = draw(gate_up, count, width, 2 * inner)
        if way == "width":
            whole = cut("experts_gate_up", whole, config, mesh.size)
        return Experts(draw(router, count, width), whole, draw(down, count, inner, width))

    of_down = PartitionSpec(None, AXIS) if way == "width" else PartitionSpec(AXIS)
    specs: Any = (PartitionSpec(), PartitionSpec(AXIS), of_down)
    shardings = Experts(*[cast(Any, NamedSharding(mesh, one)) for one in specs])
    made = jax.jit(make, out_shardings=shardings)
    return [
        jax.block_until_ready(made(key)) for key in jax.random.split(jax.random.key(0), _LAYERS)
    ]


def measure(
    config: ModelConfig, mesh: Mesh, layers: list[Experts], x: Any, way: str, repeats: int
) -> tuple[float, np.ndarray]:
    """Microseconds of a layer, and what the last one gives."""
    group = peer_sum.open_peers(tuple(mesh.devices.flat)) if jax.default_backend() == "gpu" else 0
    part = part_of(config, mesh.size, group)

    def run(x: Any, layers: list[Experts]) -> Any:
        for experts in layers:
            if way == "width":
                one = experts._replace(gate_up=experts.gate_up[0])
                out, _ = mix_experts(x, one, part)
            else:
                out = mix_some(x, experts, part)
            out = sum_parts(out, part).astype(jnp.float32)
            x = (out / jnp.sqrt((out * out).mean(axis=1, keepdims=True) + 1e-6)).astype(x.dtype)
        return x

    specs = jax.tree.map(lambda one: one.sharding.spec, layers)
    call = jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(PartitionSpec(), specs),
            out_specs=PartitionSpec(),
            check_vma=False,
        ),
        compiler_options=IN_GRAPH,
    )
    found = jax.block_until_ready(call(x, layers))
    best = float("inf")
    for _ in range(4):
        start, out = time.perf_counter(), x
        for _ in range(repeats):
            out = call(out, layers)
        jax.block_until_ready(out)
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / repeats / len(layers), np.asarray(found, np.float32)


def busiest(config: ModelConfig, rows: int, count: int) -> float:
    """The share of bytes that the busiest of so many devices reads, where experts are whole."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(200):
        size = config.num_experts_per_token
        chosen = {
            one for _ in range(rows) for one in rng.permutation(config.num_experts)[:size].tolist()
        }
        by_device = np.bincount([one * count // config.num_experts for one in chosen])
        shares.append(by_device.max() / len(chosen))
    return float(np.mean(shares))


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="2 if not given")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=_OF_GPUS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="a file for the lines")
    args = parser.parse_args()
    report = Report(device=str(jax.devices()[0]), jax=jax.__version__, devices=args.devices)
    mesh = Mesh(np.array(jax.devices()[: args.devices]), (AXIS,))
    dtype, is_right = jnp.dtype(args.dtype), True
    for name in args.shapes:
        config = config_of(name)
        known: dict[int, tuple[float, np.ndarray]] = {}
        for way in ("width", "expert"):
            layers = make_layers(config, mesh, dtype, way)
            for rows in args.rows:
                x = jax.random.normal(jax.random.key(rows), (rows, config.hidden_size), dtype)
                x = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
                us, found = measure(config, mesh, layers, x, way, args.repeats)
                first = known.setdefault(rows, (us, found))
                gap = float(np.abs(found - first[1]).max())
                report.add(
                    shape=name,
                    rows=rows,
                    way=way,
                    us=us,
                    ratio=first[0] / us,
                    most=busiest(config, rows, args.devices),
                    gap=gap,
                )
                is_right &= args.dtype == "bfloat16" or gap < 1e-2
            del layers
    if args.out:
        report.write(args.out)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
