"""From a checkpoint's tensors to the parameter tree of a module."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from folojax.models.core.config import ModelConfig
from folojax.models.files.hf_names import Source, is_ignorable, parameter_sources
from folojax.models.files.safetensors_files import DTYPES, StoredTensor, open_tensors
from folojax.models.quantized.quantize import quantize, quantized_bytes

_SILENT_SECONDS = 2.0
_MOST_PROBLEMS = 50


def read_params(
    directory: Path, config: ModelConfig, dtype: Any, quantization: str | None = None
) -> dict[str, Any]:
    """Reads a directory's weights as the parameters of the config's module, on the default device.

    Parameters are read one after the other, each in the layout that it keeps: beside those that
    are done, only one is in memory, twice while it is placed. A bar shows how far it is if that
    takes seconds and somebody sits at a terminal.

    Args:
        directory: In the Hugging Face layout.
        config: What the weights should look like.
        dtype: float32, bfloat16 or float16; weights of another float type are converted.
        quantization: Kernels are quantised one by one, as `quantize_params` does.

    Raises:
        FileNotFoundError: weights or shards are absent.
        ValueError: a file is malformed, or the tensors are not those the config asks for; every
            missing, unexpected and misshapen tensor is listed.
    """
    sources = parameter_sources(config)
    tensors = _find(config, sources, directory)
    named, tree = _named(sources), jax.tree.structure(sources)
    arrays: list[Any] = [None] * len(named)
    with tqdm(
        total=params_bytes(config, dtype),
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        delay=_SILENT_SECONDS,
        disable=None,  # where there is no terminal
        leave=False,
    ) as bar:
        # The largest first: what is in memory twice meanwhile is small when memory is fullest.
        for i in sorted(range(len(named)), key=lambda i: -math.prod(named[i][1].shape)):
            name, source = named[i]
            array = _empty(source, np.dtype(dtype))
            for tensor, view in source.views(array):
                tensors[tensor].read_into(view)
            bar.update(array.nbytes)
            # Not `jnp.asarray`, which has NumPy transpose first, ten times slower. Waited for, or
            # several would be in memory twice.
            placed = jax.device_put(array).block_until_ready()
            arrays[i] = jax.block_until_ready(quantize(name, placed, quantization))
    return jax.tree.unflatten(tree, arrays)


def _empty(source: Source, dtype: np.dtype) -> np.ndarray:
    """Room for a parameter, in which the tensors that it is the transpose of lie side by side."""
    if not source.is_transposed:
        return np.empty(source.shape, dtype)
    *stacked, width_in, width_out = source.shape
    return np.empty((*stacked, width_out, width_in), dtype).swapaxes(-1, -2)


def params_bytes(config: ModelConfig, dtype: Any, quantization: str | None = None) -> int:
    """Bytes of the tree that `read_params` gives for this config, known before it is read."""
    itemsize = np.dtype(dtype).itemsize
    return sum(
        quantized_bytes(name, source.shape, itemsize, quantization)
        for name, source in _named(parameter_sources(config))
    )


def num_params(config: ModelConfig) -> int:
    """How many parameters the config's module has."""
    return sum(math.prod(source.shape) for _, source in _named(parameter_sources(config)))


def _named(sources: dict[str, Any]) -> list[tuple[str, Source]]:
    """Every source with what it is called in its block, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(sources)
    return [(path[-1].key, source) for path, source in leaves]


def _find(config: ModelConfig, sources: dict[str, Any], directory: Path) -> dict[str, StoredTensor]:
    """The wanted tensors, by the names that the sources have for them.

    Where a model was saved without its head, as the first GPT-2 was, the files leave out the first
    part of every name.

    Raises:
        ValueError: says at once all there is to say against the tensors.
    """
    tensors = open_tensors(directory)
    wanted = dict(pair for source in jax.tree.leaves(sources) for pair in source.tensors)
    missing, found = [], {}
    for name, shape in wanted.items():
        short = name.partition(".")[2]
        tensor = tensors.get(name) or tensors.get(short)
        if tensor is None:
            missing.append(f"missing: {name} {shape}")
        else:
            found[name] = tensor
    used = {tensor.name for tensor in found.values()}
    problems = missing + [
        f"unexpected: {name} {tensors[name].shape}"
        for name in sorted(tensors.keys() - used)
        if not is_ignorable(name, config)
    ]
    for name, tensor in sorted(found.items()):
        if tensor.shape != wanted[name]:
            problems.append(
                f"wrong shape: {tensor.name} is {tensor.shape}, config.json asks for {wanted[name]}"
            )
        if tensor.dtype not in DTYPES:
            problems.append(
                f"wrong dtype: {tensor.name} is {tensor.dtype}, not one of "
                + ", ".join(sorted(DTYPES))
            )
    if problems:
        rest = len(problems) - _MOST_PROBLEMS
        shown = problems[:_MOST_PROBLEMS] + ([f"and {rest} more"] if rest > 0 else [])
        raise ValueError(
            f"the weights in {directory} do not fit its config.json:\n  " + "\n  ".join(shown)
        )
    return found
