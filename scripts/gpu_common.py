"""What the parts of gpu_check.py share: models of true shapes, random batches, clocks, one line."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folojax.models.config import ModelConfig
from folojax.models.llama import Llama, init_params
from folojax.state import DecodeInputs

QWEN3: dict[str, Any] = {
    "architecture": "Qwen3ForCausalLM",
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_position": 40960,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_norm": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_layers": 28,
        "num_heads": 16,
        "tie_embeddings": True,
    },
    "qwen3-8b": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_layers": 36,
        "num_heads": 32,
        "tie_embeddings": False,
    },
}


def make_model(name: str, small: bool, **changes: Any) -> tuple[Llama, Any]:
    """A random model in bfloat16, made on the device; `changes` replace fields of the config."""
    shape = SHAPES[name]
    if small:
        shape = shape | {"num_layers": 2, "vocab_size": 512, "intermediate_size": 128}
    module = Llama(ModelConfig(**(shape | changes)), jnp.bfloat16)
    return module, jax.block_until_ready(random_params(module))


def random_params(module: Llama, scale: float = 0.02) -> Any:
    """Normal matrices and norms of one, array by array.

    The module's own initialiser in one program takes XLA most of a minute to compile for a GPU.
    """
    shapes = jax.eval_shape(functools.partial(init_params, module), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [
        jnp.ones(leaf.shape, leaf.dtype)
        if leaf.ndim == 1
        else _normal(key, scale, shape=leaf.shape, dtype=leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: Any, scale: float, *, shape: tuple[int, ...], dtype: Any) -> Any:
    return (scale * jax.random.normal(key, shape)).astype(dtype)


def seconds(call: Callable[[], Any], repeats: int = 5, inner: int = 10) -> float:
    """Median time of a call, several in a row so that dispatch overlaps."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            out = call()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / inner)
    return float(np.median(times))


def copy_bandwidth(small: bool) -> float:
    """Bytes per second of a device copy, read and written."""
    x = jnp.zeros((1 << (20 if small else 30)) // 2, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds(lambda: copy(x))


class Pages:
    """A random batch: lengths up to `longest`, pages dealt in a random order."""

    def __init__(self, rows: int, longest: int, page_size: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(longest // 16, longest, rows)
        self.counts = self.lengths // page_size + 1
        self.rows = np.repeat(np.arange(rows), self.counts)
        self.index = np.concatenate([np.arange(count) for count in self.counts])
        self.num_pages = len(self.rows)
        self.ids = rng.permutation(self.num_pages)
        self.table = np.full((rows, self.counts.max()), self.num_pages, np.int32)
        self.table[self.rows, self.index] = self.ids

    def inputs(self, capacity: int) -> DecodeInputs:
        """The inputs of a greedy step over a cache of `capacity` pages."""
        rows = len(self.lengths)
        table: Any = np.where(self.table < self.num_pages, self.table, capacity)
        slot: Any = np.arange(rows, dtype=np.int32)
        position: Any = self.lengths.astype(np.int32)
        token: Any = np.full(rows, -1, np.int32)
        return jax.device_put(DecodeInputs(slot, token, position, table))


def nano_requests(small: bool, vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    """256 prompts of 100-1024 tokens, each with an output length from the same range."""
    rng = np.random.default_rng(seed)
    count, low, high = (8, 10, 40) if small else (256, 100, 1024)
    lengths, outputs = rng.integers(low, high + 1, (2, count))
    prompts = [rng.integers(3, vocab_size, length).tolist() for length in lengths]
    return list(zip(prompts, outputs.tolist(), strict=True))


class Report:
    """Figures line by line, on the screen as they come and in a file at the end."""

    def __init__(self, **about: Any) -> None:
        self.about = about
        self.results: list[dict[str, Any]] = []

    def add(self, **result: Any) -> None:
        """Prints and keeps one line."""
        self.results.append(result)
        cells = (
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in result.items()
        )
        print("  ".join(cells), flush=True)

    def write(self, path: Path) -> None:
        """Writes all lines as JSON."""
        path.write_text(json.dumps(self.about | {"results": self.results}, indent=2) + "\n")
