"""From tensors of Hugging Face's names to the parameter tree of a module."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from folojax.models.core.config import ModelConfig
from folojax.models.core.param_tree import listed
from folojax.models.families.families import family_of
from folojax.models.files.hf_names import Source, is_ignorable, parameter_sources
from folojax.models.files.joined_experts import join_pieces, part_experts
from folojax.models.files.quantized_formats import open_weights
from folojax.models.files.quantized_tensor import QuantizedTensor
from folojax.models.files.safetensors_files import DTYPES, HeldTensor, Tensor
from folojax.models.files.tied_head import parted_head
from folojax.models.quantized.codes import kernel_of_codes
from folojax.models.quantized.float8_kernels import Float8Kernel
from folojax.models.quantized.quantize import QuantizedKernel, kernel_kind, quantize

_SILENT_SECONDS = 2.0


def on_default_device(name: str, array: Any) -> Any:
    """Places a parameter where JAX puts what nobody places."""
    # Not `jnp.asarray`, which has NumPy transpose first, ten times slower.
    return jax.device_put(array)


def read_params(
    directory: Path,
    config: ModelConfig,
    dtype: Any,
    quantization: str | None = None,
    place: Callable[[str, Any], Any] = on_default_device,
) -> dict[str, Any]:
    """Reads a directory's weights as the parameters of the config's module.

    Args:
        directory: In the Hugging Face layout.
        config: What the weights should look like.
        dtype: float32, bfloat16 or float16; weights of another float type are converted.
        quantization: Kernels are quantised one by one, as `quantize_params` does. Of a checkpoint
            that has them in few bits, those are kept that it has as they are wanted.
        place: From the name of a parameter in its layer or model, and a parameter, to where it is
            kept; one that is quantised is a tuple of arrays.

    Raises:
        FileNotFoundError: weights or shards are absent.
        ValueError: a file is malformed, or the tensors are not those the config asks for; every
            missing, unexpected and misshapen tensor is listed.
    """
    what = f"the weights in {directory} do not fit its config.json"
    return _assemble(open_weights(directory, config), config, dtype, quantization, what, place)


def params_from_hf(
    tensors: Mapping[str, Any], config: ModelConfig, dtype: Any = np.float32
) -> dict[str, Any]:
    """The parameters of `build_module(config, dtype)`, of arrays that Hugging Face names.

    Args:
        tensors: By name, such as "model.layers.0.self_attn.q_proj.weight", in Hugging Face's
            layout: arrays of NumPy or JAX, or what NumPy makes an array of, as of a tensor of
            PyTorch on CPU.
        config: Of the model; `config_from_hf` makes it of the dict of a config.json.
        dtype: float32, bfloat16 or float16; arrays of another float type are converted.

    Raises:
        ValueError: the tensors are not those the config asks for; every missing, unexpected and
            misshapen one is listed, fifty at most.
    """
    held: dict[str, Tensor] = {name: HeldTensor(name, given) for name, given in tensors.items()}
    parted = parted_head(held, config) if config.tie_embeddings else None
    if parted is not None:
        raise ValueError(
            f"the config ties the output projection to the embedding, but {parted[0]} is there and "
            f"is not {parted[1]}: leave it out, or state tie_word_embeddings false"
        )
    return _assemble(held, config, dtype, None, "the tensors do not fit the config")


def _assemble(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    dtype: Any,
    quantization: str | None,
    what: str,
    place: Callable[[str, Any], Any] = on_default_device,
) -> dict[str, Any]:
    """Reads tensors as parameters; `what` says how an error begins.

    Parameters are read one after the other, each in the layout that it keeps: beside those that
    are done, only one is in memory, twice while it is placed. A bar shows how far it is if that
    takes seconds and somebody sits at a terminal.
    """
    sources = parameter_sources(config)
    wanted = dict(pair for source in jax.tree.leaves(sources) for pair in source.tensors)
    is_out_in = family_of(config.architecture)[1].is_expert_out_in
    joined = join_pieces(tensors, wanted, is_out_in)
    found = _find(config, sources, part_experts(joined, wanted.keys()), what)
    named, tree, shapes = _named(sources), jax.tree.structure(sources), param_shapes(config, dtype)
    arrays: list[Any] = [None] * len(named)
    with tqdm(
        total=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)),
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
            parts = [found[tensor] for tensor, _ in source.tensors]
            kernel: Any = _stored_kernel(name, source, parts, quantization)
            if kernel is None:
                array = _empty(source, source.dtype(dtype))
                for tensor, view in source.views(array):
                    found[tensor].read_into(view)
                kernel = array
            # Waited for, or several would be in memory twice.
            if isinstance(kernel, QuantizedKernel):
                kernel = quantize(name, kernel, quantization)
            placed = jax.block_until_ready(place(name, kernel))
            arrays[i] = jax.block_until_ready(quantize(name, placed, quantization))
            bar.update(math.prod(source.shape) * np.dtype(dtype).itemsize)
    return jax.tree.unflatten(tree, arrays)


def _stored_kernel(
    name: str, source: Source, parts: Sequence[Tensor], quantization: str | None
) -> QuantizedKernel | None:
    """A kernel that the checkpoint has in as few bits as it is wanted in, none of which changes.

    Where it has some of the joined parts in these bits, the others are rounded to them.
    """
    packed = [one for one in parts if isinstance(one, QuantizedTensor)]
    is_plain = source.num_stacked is not None or source.is_transposed
    if quantization is None or not packed or is_plain:
        return None
    if kernel_kind(name, source.shape, quantization) == "float8":
        narrow = [found for one in packed if (found := one.read_float8()) is not None]
        if len(narrow) < len(parts):
            return None
        values, scale = (np.concatenate(some) for some in zip(*narrow, strict=True))
        return Float8Kernel(jnp.asarray(values), jnp.asarray(scale))
    codes = {one.name: some for one in packed if (some := one.read_codes()) is not None}
    if not codes:
        return None
    joined = [codes[one.name] if one.name in codes else _floats(one) for one in parts]
    return kernel_of_codes(name, joined, quantization)


def _floats(tensor: Tensor) -> np.ndarray:
    array = np.empty(tensor.shape, np.float32)
    tensor.read_into(array)
    return array


def _empty(source: Source, dtype: np.dtype) -> np.ndarray:
    """Room for a parameter, in which the tensors that it is the transpose of lie side by side."""
    if not source.is_transposed:
        return np.empty(source.shape, dtype)
    *stacked, width_in, width_out = source.shape
    return np.empty((*stacked, width_out, width_in), dtype).swapaxes(-1, -2)


def param_shapes(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Shapes of the tree that `read_params` gives for this config, known before it is read."""
    shapes: dict[str, Any] = jax.tree.map(
        lambda source: jax.ShapeDtypeStruct(source.shape, source.dtype(dtype)),
        parameter_sources(config),
    )
    return shapes


def _named(sources: dict[str, Any]) -> list[tuple[str, Source]]:
    """Every source with what it is called in its block, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(sources)
    return [(path[-1].key, source) for path, source in leaves]


def _find(
    config: ModelConfig, sources: dict[str, Any], tensors: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    """The wanted tensors, by the names that the sources have for them.

    Where a model was saved without its head, as the first GPT-2 was, the files leave out the first
    part of every name; in those of some families it is another.

    Raises:
        ValueError: says at once all there is to say against the tensors.
    """
    wanted = dict(pair for source in jax.tree.leaves(sources) for pair in source.tensors)
    missing: list[str] = []
    found: dict[str, Tensor] = {}
    other = family_of(config.architecture)[1].other_prefix
    for name, shape in wanted.items():
        short = name.partition(".")[2]
        tensor = tensors.get(name) or tensors.get(short) or tensors.get(other + short)
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
                f"wrong shape: {tensor.name} is {tensor.shape}, the config asks for {wanted[name]}"
            )
        if tensor.dtype not in DTYPES:
            problems.append(
                f"wrong dtype: {tensor.name} is {tensor.dtype}, not one of "
                + ", ".join(sorted(DTYPES))
            )
    if problems:
        raise ValueError(f"{what}:\n  " + listed(problems, "\n  "))
    return found
