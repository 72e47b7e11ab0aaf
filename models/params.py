"""From a checkpoint's tensors to the parameter tree of a module."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folojax.models.config import ModelConfig
from folojax.models.hf_names import Source, is_ignorable, parameter_sources
from folojax.models.safetensors_files import TensorFiles, open_tensors

_READABLE_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


def read_params(directory: Path, config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Reads a directory's weights into the parameter tree of the config's module.

    Tensors are read one at a time, so beside the parameters only one of them is in memory.

    Args:
        directory: In the Hugging Face layout.
        config: What the weights should look like.
        dtype: float32, bfloat16 or float16; weights of another float type are converted.

    Returns:
        Nested dict of JAX arrays on the default device.

    Raises:
        FileNotFoundError: weights or shards are absent.
        ValueError: a file is malformed, or the tensors are not those the config asks for; every
            missing, unexpected and misshapen tensor is listed.
    """
    sources = parameter_sources(config)
    with open_tensors(directory) as tensors:
        _check(tensors, config, sources, directory)
        return jax.tree.map(lambda source: _read(tensors, source, np.dtype(dtype)), sources)


def params_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes of the tree that `read_params` gives for this config, known before it is read."""
    sources = jax.tree.leaves(parameter_sources(config))
    num_values = sum(math.prod(shape) for source in sources for _, shape in source.tensors)
    return num_values * np.dtype(dtype).itemsize


def _check(
    tensors: TensorFiles, config: ModelConfig, sources: dict[str, Any], directory: Path
) -> None:
    """Raises one ValueError that lists all there is to say against the tensors."""
    wanted = dict(pair for source in jax.tree.leaves(sources) for pair in source.tensors)
    names = tensors.names()
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in names]
    problems += [
        f"unexpected: {name} {tensors.shape(name)}"
        for name in sorted(names - wanted.keys())
        if not is_ignorable(name, config)
    ]
    for name in sorted(names & wanted.keys()):
        if tensors.shape(name) != wanted[name]:
            problems.append(
                f"wrong shape: {name} is {tensors.shape(name)}, config.json asks for {wanted[name]}"
            )
        if tensors.dtype(name) not in _READABLE_DTYPES:
            problems.append(
                f"wrong dtype: {name} is {tensors.dtype(name)}, not one of "
                + ", ".join(sorted(_READABLE_DTYPES))
            )
    if problems:
        raise ValueError(
            f"the weights in {directory} do not fit its config.json:\n  " + "\n  ".join(problems)
        )


def _read(tensors: TensorFiles, source: Source, dtype: np.dtype) -> jax.Array:
    """Joins, transposes and converts one parameter."""
    rows = sum(shape[0] for _, shape in source.tensors)
    joined = np.empty((rows, *source.tensors[0][1][1:]), dtype)
    start = 0
    for name, shape in source.tensors:
        joined[start : start + shape[0]] = tensors.read(name)
        start += shape[0]
    return jnp.asarray(joined.T if source.is_transposed else joined)
