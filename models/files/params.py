"""From a checkpoint's tensors to the parameter tree of a module."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from folojax.models.core.config import ModelConfig
from folojax.models.files.hf_names import Source, is_ignorable, parameter_sources
from folojax.models.files.safetensors_files import DTYPES, TensorFiles, open_tensors
from folojax.models.quantized.quantize import quantize, quantized_bytes

_SILENT_SECONDS = 2.0
_MOST_PROBLEMS = 50


def read_params(
    directory: Path, config: ModelConfig, dtype: Any, quantization: str | None = None
) -> dict[str, Any]:
    """Reads a directory's weights into the parameter tree of the config's module.

    Parameters are read one after the other, each in the layout that it keeps: beside those that
    are done, only one is in memory. A bar shows how far it is if that takes seconds and somebody
    sits at a terminal.

    Args:
        directory: In the Hugging Face layout.
        config: What the weights should look like.
        dtype: float32, bfloat16 or float16; weights of another float type are converted.
        quantization: Kernels are quantised one by one, as `quantize_params` does.

    Returns:
        Nested dict of JAX arrays on the default device.

    Raises:
        FileNotFoundError: weights or shards are absent.
        ValueError: a file is malformed, or the tensors are not those the config asks for; every
            missing, unexpected and misshapen tensor is listed.
    """
    tensors = open_tensors(directory)
    sources = parameter_sources(config)
    names = _find(tensors, config, sources, directory)
    with tqdm(
        total=params_bytes(config, dtype),
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        delay=_SILENT_SECONDS,
        disable=None,  # where there is no terminal
        leave=False,
    ) as bar:

        def read(source: Source, name: str) -> Any:
            array = _empty(source, np.dtype(dtype))
            for tensor, view in source.views(array):
                tensors.read_into(names[tensor], view)
            bar.update(array.nbytes)
            # Not `jnp.asarray`, which has NumPy transpose first, ten times slower. Waited for, or
            # several would be in memory twice.
            placed = jax.device_put(array).block_until_ready()
            return jax.block_until_ready(quantize(name, placed, quantization))

        leaves, tree = jax.tree.flatten(sources)
        names_of = _last_names(sources)
        # The largest first: what is in memory twice meanwhile is small when memory is fullest.
        order = sorted(range(len(leaves)), key=lambda i: -math.prod(leaves[i].shape))
        arrays = {i: read(leaves[i], names_of[i]) for i in order}
        return jax.tree.unflatten(tree, [arrays[i] for i in range(len(leaves))])


def _empty(source: Source, dtype: np.dtype) -> np.ndarray:
    """Room for a parameter, in which the tensors that it is the transpose of lie side by side."""
    if not source.is_transposed:
        return np.empty(source.shape, dtype)
    *stacked, width_in, width_out = source.shape
    return np.empty((*stacked, width_out, width_in), dtype).swapaxes(-1, -2)


def params_bytes(config: ModelConfig, dtype: Any, quantization: str | None = None) -> int:
    """Bytes of the tree that `read_params` gives for this config, known before it is read."""
    sources = parameter_sources(config)
    itemsize = np.dtype(dtype).itemsize
    return sum(
        quantized_bytes(name, source.shape, itemsize, quantization)
        for source, name in zip(jax.tree.leaves(sources), _last_names(sources), strict=True)
    )


def num_params(config: ModelConfig) -> int:
    """How many parameters the config's module has."""
    return sum(math.prod(source.shape) for source in jax.tree.leaves(parameter_sources(config)))


def _last_names(tree: Any) -> list[str]:
    """What each leaf of nested dicts is called in its own."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [path[-1].key for path, _ in flat]


def _find(
    tensors: TensorFiles, config: ModelConfig, sources: dict[str, Any], directory: Path
) -> dict[str, str]:
    """What the files call each wanted tensor.

    Mostly by its name; without the first part of it where the model was saved without its head,
    as the first GPT-2 was.

    Raises:
        ValueError: says at once all there is to say against the tensors.
    """
    wanted = dict(pair for source in jax.tree.leaves(sources) for pair in source.tensors)
    there = tensors.names()
    names = {}
    for name in wanted:
        short = name.partition(".")[2]
        names[name] = short if name not in there and short in there else name
    problems = [
        f"missing: {name} {shape}" for name, shape in wanted.items() if names[name] not in there
    ]
    problems += [
        f"unexpected: {name} {tensors.shape(name)}"
        for name in sorted(there - set(names.values()))
        if not is_ignorable(name, config)
    ]
    found = {names[name]: shape for name, shape in wanted.items() if names[name] in there}
    for name, shape in sorted(found.items()):
        if tensors.shape(name) != shape:
            problems.append(
                f"wrong shape: {name} is {tensors.shape(name)}, config.json asks for {shape}"
            )
        if tensors.dtype(name) not in DTYPES:
            problems.append(
                f"wrong dtype: {name} is {tensors.dtype(name)}, not one of "
                + ", ".join(sorted(DTYPES))
            )
    if problems:
        rest = len(problems) - _MOST_PROBLEMS
        shown = problems[:_MOST_PROBLEMS] + ([f"and {rest} more"] if rest > 0 else [])
        raise ValueError(
            f"the weights in {directory} do not fit its config.json:\n  " + "\n  ".join(shown)
        )
    return names
