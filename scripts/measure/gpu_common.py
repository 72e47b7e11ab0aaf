"""What the scripts for GPUs share: models of true shapes, requests, lines of figures."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama, init_params

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
