"""GGUF files, converted to the Hugging Face layout and kept in the cache."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.files.gguf_config import hf_config
from folojax.models.files.gguf_families import gguf_family
from folojax.models.files.gguf_family import GgufFamily, Metadata
from folojax.models.files.gguf_joins import behind_each_other, in_out
from folojax.models.files.gguf_layout import in_hf_layout, is_tiled, role_of
from folojax.models.files.gguf_names import Places, places
from folojax.models.files.gguf_parts import parts_of, read_parts
from folojax.models.files.gguf_tokenizer import save_tokenizer
from folojax.models.files.hf_config import config_from_hf
from folojax.models.files.hf_names import Shape
from folojax.models.files.joined_experts import piece_name
from folojax.models.files.safetensors_files import ShardWriter
from folojax.models.files.save_quantized import code_tensors, quantization_config
from folojax.models.machine.artefacts import build_once, cache_root, file_digest
from folojax.models.quantized.codes import Codes
from folojax.models.quantized.group_kernels import GROUP

# Part of the artefact's name: raise it when what the conversion writes changes.
_CONVERTER_VERSION = 13

_CODE_BITS = {"Q4_0": 4, "Q8_0": 8, "Q4_K": 4}
"""Of quantisations whose weights are codes in groups of 32 times a scale, Q4_K's plus an offset."""

_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that say how frequencies are scaled."""


def convert_gguf(path: Path) -> Path:
    """Converts a GGUF file once, and finds the conversion again by the file's content.

    Of a model in several files, any of them stands for all, which have to lie beside it.

    Returns:
        A directory under `cache_root()` with config.json, generation_config.json, safetensors
        and the tokenizer's files. Kernels of Q4_0, Q4_K and Q8_0 keep their codes, in the form of
        compressed-tensors, of Q4_K with offsets beside it; others are float32.

    Raises:
        ValueError: the file is malformed, or of an architecture, quantisation, rotary scaling or
            tokenizer that is not supported; which one is said.
    """
    parts = parts_of(path)
    digests = [file_digest(part) for part in parts]
    whole = digests[0] if len(parts) == 1 else sha256("".join(digests).encode()).hexdigest()
    name = f"{whole[:32]}-v{_CONVERTER_VERSION}"
    return build_once(cache_root() / "gguf" / name, lambda directory: _convert(parts, directory))


def _convert(parts: list[Path], directory: Path) -> None:
    path = parts[0]
    metadata, tensors = read_parts(parts)
    try:
        family = gguf_family(metadata, tensors.keys())
        tables = {name: _dequantised(tensors.pop(name)) for name in _TABLES if name in tensors}
        config = hf_config(metadata, family, tables, tensors.keys())
        save_tokenizer(metadata, directory)
        quantized = _save_tensors(tensors, metadata, family, config, directory)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # A word where a number should be fails somewhere, in some way.
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{path}: the metadata is malformed: {error!r}") from error
    config |= {} if quantized is None else {"quantization_config": quantized}
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save_tensors(
    tensors: dict[str, Any],
    metadata: Metadata,
    family: GgufFamily,
    hf_mapping: dict[str, Any],
    directory: Path,
) -> dict[str, Any] | None:
    """Writes every tensor in transformers' layout, under its Hugging Face name.

    Returns:
        What config.json says of those that are codes.
    """
    config, architecture = config_from_hf(hf_mapping), metadata["general.architecture"]
    if metadata.get(f"{architecture}.nextn_predict_layers"):
        tensors = {name: one for name, one in tensors.items() if _layer(name) < config.num_layers}
    tensors = {name: one for name, one in tensors.items() if not _is_unread(name, config)}
    found = places(architecture, config, tensors.keys())
    uses = found.uses
    problems = [f"missing: {name}" for name in uses.keys() - tensors.keys()]
    problems += [f"of no known use: {name}" for name in tensors.keys() - uses.keys()]
    if problems:
        raise ValueError("the tensors do not fit the metadata: " + ", ".join(sorted(problems)))
    writer = ShardWriter(directory)
    parts: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        whole, first = uses[name][0]
        if _is_in_pieces(whole, name, found, tensors):
            _add_pieces(writer, whole, name, found, tensor)
            continue
        # Codes, their scales and perhaps offsets, or floats.
        is_float = family.is_conv1d or whole in found.joined or len(first) > 2
        is_float |= role_of(name) == "ssm_out.weight" and not _has_whole_groups(config)
        stored = (None if is_float else _codes(tensor)) or (_floats(tensor),)
        arrays = [in_hf_layout(name, array, family, config) for array in stored]
        by_use = _parted(name, arrays, [shape for _, shape in uses[name]])
        for (hf_name, _), (part, *scales) in zip(uses[name], by_use, strict=True):
            if hf_name in found.joined:
                parts[name] = part
                continue
            if not scales:
                writer.add(hf_name, part)
                continue
            _add_codes(writer, hf_name, tensor, part, *scales)
        join = found.joined.get(whole)
        if join is not None and parts.keys() >= set(join.parts):
            writer.add(whole, join.make([parts.pop(one) for one in join.parts]))
    for hf_name, (key, layer, shape) in found.scalars.items():
        if key not in metadata:
            raise ValueError(f"the metadata lacks {key}")
        writer.add(hf_name, np.full(shape, metadata[key][layer], np.float32))
    writer.close()
    return quantization_config(writer.shapes)


def _add_codes(
    writer: ShardWriter, name: str, tensor: Any, values: np.ndarray, *scales: np.ndarray
) -> None:
    """Writes a kernel of the codes of a GGUF tensor."""
    scale, *offset = scales
    bits = _CODE_BITS[tensor.tensor_type.name]
    zero = np.full_like(scale, 0 if offset else 2 ** (bits - 1))
    for full_name, array in code_tensors(name, Codes(values, scale, zero, GROUP, bits, *offset)):
        writer.add(full_name, array)


def _is_in_pieces(whole: str, name: str, found: Places, tensors: dict[str, Any]) -> bool:
    """Whether a tensor of all experts is kept in parts, because all of them are codes."""
    join = found.joined.get(whole)
    parts = (name,) if join is None else join.parts
    is_plain = join is None or join.make in (behind_each_other, in_out)
    has_experts = all(len(found.uses[part][0][1]) == 3 for part in parts)
    return is_plain and has_experts and all(_has_codes(tensors[part]) for part in parts)


def _add_pieces(writer: ShardWriter, whole: str, name: str, found: Places, tensor: Any) -> None:
    """Writes codes of every expert, of which this is one of perhaps several parts."""
    join, stored = found.joined.get(whole), _codes(tensor)
    assert stored is not None, "they are codes"
    shape = found.uses[name][0][1]
    if stored[0].shape != shape:
        raise ValueError(f"{name} has {stored[0].shape}, the metadata asks for {shape}")
    place = 0 if join is None else join.parts.index(name)
    for expert, (values, *scales) in enumerate(zip(*stored, strict=True)):
        _add_codes(writer, piece_name(whole, expert, place), tensor, values, *scales)


def _layer(name: str) -> int:
    """The number of a tensor's layer; -1 outside of them."""
    number = re.match(r"blk\.(\d+)\.", name)
    return -1 if number is None else int(number[1])


def _no_units(shape: Shape) -> Shape:
    """A shape without axes of one, of which files have more or fewer than checkpoints."""
    return tuple(size for size in shape if size != 1)


def _is_unread(name: str, config: ModelConfig) -> bool:
    """Keys and values of layers that read those of others, which some files have."""
    layer = _layer(name)
    is_own = not 0 <= layer < config.num_layers or config.kv_layer(layer) == layer
    return not is_own and role_of(name).startswith(("attn_k", "attn_v"))


def _has_whole_groups(config: ModelConfig) -> bool:
    """Whether heads of values can change places with all groups of their codes."""
    sizes = config.recurrent
    return sizes is None or not is_tiled(config) or sizes.value_dim % GROUP == 0


def _parted(name: str, arrays: list[np.ndarray], shapes: list[Shape]) -> list[list[np.ndarray]]:
    """Values, or codes and what belongs to them, of each of the tensors that lie in one.

    Rows of one lie behind those of the other; those of all experts may have an axis of their own.

    Raises:
        ValueError: there are others than the tensors have.
    """
    held, first = arrays[0].shape, shapes[0]
    if len(shapes) == 1:
        if _no_units(held) != _no_units(first):
            raise ValueError(f"{name} has {held}, the metadata asks for {first}")
        return [[arrays[0].reshape(first), *arrays[1:]]]
    rows = [shape[0] for shape in shapes]
    count = held[0] if len(held) > len(first) else 1
    wanted = (sum(rows) // count, *first[1:])
    if held[-len(first) :] != wanted or len(shapes) % count or len(held) > len(first) + 1:
        raise ValueError(
            f"{name} has {held}, the metadata asks for {(count, *wanted)[count == 1 :]}"
        )
    ends = np.cumsum(rows)[:-1]
    flat = [one.reshape(-1, *one.shape[len(held) - len(first) + 1 :]) for one in arrays]
    return [list(one) for one in zip(*(np.split(one, ends) for one in flat), strict=True)]


def _has_codes(tensor: Any) -> bool:
    return tensor.tensor_type.name in _CODE_BITS and tensor.data.ndim > 1


def _codes(tensor: Any) -> tuple[np.ndarray, ...] | None:
    """Codes, scales and perhaps offsets along the last axis, of quantisations that are no more."""
    if not _has_codes(tensor):
        return None
    bits = _CODE_BITS[tensor.tensor_type.name]
    if tensor.tensor_type.name == "Q4_K":
        return _k_codes(tensor.data)
    # A block: a float16, then 32 codes; of four bits, 0 to 15 in the lower halves.
    blocks = tensor.data.reshape(*tensor.data.shape[:-1], -1, 2 + GROUP * bits // 8)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    data = blocks[..., 2:]
    codes = np.concatenate((data & 15, data >> 4), axis=-1) if bits == 4 else data ^ 128
    return codes.reshape(*scale.shape[:-1], -1), scale


def _k_codes(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and offsets of Q4_K: blocks of 256 weights, which are eight groups.

    A block: two float16, of which a group's scale and its negated offset are multiples; these
    multiples, of six bits, in twelve bytes; then the codes, 32 bytes for two groups each, those of
    the first one in the lower halves.
    """
    blocks = data.reshape(*data.shape[:-1], -1, 144)
    steps = np.ascontiguousarray(blocks[..., :4]).view("<f2").astype(np.float32)
    first, second, last = (blocks[..., start : start + 4] for start in (4, 8, 12))
    # Groups 0 to 3 have six bits in a byte; 4 to 7 four of a byte and the two that these leave.
    scale = np.concatenate((first & 63, last & 15 | first >> 2 & 48), axis=-1)
    offset = np.concatenate((second & 63, last >> 4 | second >> 2 & 48), axis=-1)
    pairs = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)
    codes = np.stack((pairs & 15, pairs >> 4), axis=-2)
    rows = data.shape[:-1]
    return (
        codes.reshape(*rows, -1),
        (steps[..., :1] * scale).reshape(*rows, -1),
        (-steps[..., 1:] * offset).reshape(*rows, -1),
    )


def _floats(tensor: Any) -> np.ndarray:
    """A tensor in the dtype of the file, if that is one of floats, else in one that is exact."""
    bfloat16 = ml_dtypes.bfloat16
    exact = {"F16": np.float16, "BF16": bfloat16, "MXFP4": bfloat16}
    stored = exact.get(tensor.tensor_type.name)
    return _dequantised(tensor).astype(stored or np.float32, copy=False)


def _dequantised(tensor: Any) -> np.ndarray:
    """A tensor in float32."""
    from gguf.quants import dequantize

    try:
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ValueError(f"{tensor.name} is quantised as {kind}: not supported") from error
