"""Our own modules over whole sequences: no cache, no engine, and a program for many lengths."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folojax import log_likelihood, read_residuals
from folojax.models.core.dense_attend import dense_attend
from folojax.models.files.checkpoint import build_module, load_params, open_checkpoint
from folojax.steps.layers import StepExtras, run_layers

likelihood = jax.jit(log_likelihood, static_argnames="model")
residuals = jax.jit(read_residuals, static_argnames=("layers", "model"))


def layers(
    params: Any, tokens: Any, extras: StepExtras, is_edited: Any, *, model: Any
) -> tuple[Any, Any, Any]:
    """`run_layers` on one sequence, without a cache."""
    nothing, attend = [None] * model.config.num_layers, dense_attend
    options = {"model": model, "extras": extras, "is_edited": is_edited}
    return run_layers(params, tokens, jnp.arange(len(tokens)), nothing, attend, **options)


def load(path: Path | None, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """The module of a directory or file, the packaged one if None, and its parameters."""
    checkpoint = open_checkpoint(path)
    return build_module(checkpoint.config, dtype), load_params(checkpoint, dtype)


def logits(module: Any, params: Any, tokens: Sequence[int]) -> np.ndarray:
    """Logits after every token of one sequence: float32 [N, V]; what is behind it changes none."""
    padded = np.zeros(-(-len(tokens) // 64) * 64, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_logits(module, params, padded))[: len(tokens)]


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: Any, params: Any, tokens: Any) -> Any:
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    hidden, _ = module.apply({"params": params}, tokens, positions, None, dense_attend)
    return module.apply({"params": params}, hidden, method="logits")
