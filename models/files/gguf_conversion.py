"""GGUF files, converted to the Hugging Face layout and kept in the cache."""

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.files.gguf_config import hf_config
from folojax.models.files.gguf_families import GgufFamily, Metadata, gguf_family
from folojax.models.files.gguf_names import joined_parts, places
from folojax.models.files.gguf_tokenizer import save_tokenizer
from folojax.models.files.hf_config import config_from_hf
from folojax.models.files.safetensors_files import ShardWriter
from folojax.models.files.save_quantized import code_tensors, quantization_config
from folojax.models.machine.artefacts import build_once, cache_root, file_digest
from folojax.models.quantized.codes import Codes
from folojax.models.quantized.group_kernels import GROUP

# Part of the artefact's name: raise it when what the conversion writes changes.
_CONVERTER_VERSION = 8

_CODE_BITS = {"Q4_0": 4, "Q8_0": 8, "Q4_K": 4}
"""Of quantisations whose weights are codes in groups of 32 times a scale, Q4_K's plus an offset."""

_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that say how frequencies are scaled."""


def convert_gguf(path: Path) -> Path:
    """Converts a GGUF file once, and finds the conversion again by the file's content.

    Returns:
        A directory under `cache_root()` with config.json, generation_config.json, safetensors
        and the tokenizer's files. Kernels of Q4_0, Q4_K and Q8_0 keep their codes, in the form of
        compressed-tensors, of Q4_K with offsets beside it; others are float32.

    Raises:
        ValueError: the file is malformed, or of an architecture, quantisation, rotary scaling or
            tokenizer that is not supported; which one is said.
    """
    name = f"{file_digest(path)[:32]}-v{_CONVERTER_VERSION}"
    return build_once(cache_root() / "gguf" / name, lambda directory: _convert(path, directory))


def _convert(path: Path, directory: Path) -> None:
    # Here, because a conversion that is in the cache already has no use for it.
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    # The reader has no errors of its own: a truncated file ends in whatever NumPy says.
    except (ValueError, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or no GGUF file: {error}") from error
    try:
        family = gguf_family(metadata)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
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
    found = places(architecture, config)
    uses = found.uses
    if metadata.get(f"{architecture}.nextn_predict_layers"):
        tensors = {name: one for name, one in tensors.items() if _layer(name) < config.num_layers}
    problems = [f"missing: {name}" for name in uses.keys() - tensors.keys()]
    problems += [f"of no known use: {name}" for name in tensors.keys() - uses.keys()]
    if problems:
        raise ValueError("the tensors do not fit the metadata: " + ", ".join(sorted(problems)))
    writer = ShardWriter(directory)
    parts: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        whole = uses[name][0][0]
        # Codes, their scales and perhaps offsets, or floats.
        is_float = family.is_conv1d or whole in found.joined
        stored = (None if is_float else _codes(tensor)) or (_floats(tensor),)
        arrays = [_in_hf_layout(name, array, family, config) for array in stored]
        by_use = arrays if len(uses[name]) > 1 else [array[None] for array in arrays]
        for (hf_name, shape), part, *scales in zip(uses[name], *by_use, strict=True):
            if _no_units(part.shape) != _no_units(shape):
                raise ValueError(f"{name} has {part.shape}, the metadata asks for {shape}")
            if hf_name in found.joined:
                parts[name] = part
                continue
            if not scales:
                writer.add(hf_name, part.reshape(shape))
                continue
            scale, *offset = scales
            bits = _CODE_BITS[tensor.tensor_type.name]
            zero = np.full_like(scale, 0 if offset else 2 ** (bits - 1))
            codes = Codes(part, scale, zero, GROUP, bits, *offset)
            for full_name, array in code_tensors(hf_name, codes):
                writer.add(full_name, array)
        joined = found.joined.get(whole, ())
        if joined and parts.keys() >= set(joined):
            writer.add(whole, joined_parts(whole, [parts.pop(one) for one in joined]))
    for hf_name, (key, layer, shape) in found.scalars.items():
        if key not in metadata:
            raise ValueError(f"the metadata lacks {key}")
        writer.add(hf_name, np.full(shape, metadata[key][layer], np.float32))
    writer.close()
    return quantization_config(writer.shapes)


def _layer(name: str) -> int:
    """The number of a tensor's layer; -1 outside of them."""
    number = re.match(r"blk\.(\d+)\.", name)
    return -1 if number is None else int(number[1])


def _no_units(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without axes of one, of which files have more or fewer than checkpoints."""
    return tuple(size for size in shape if size != 1)


def _in_hf_layout(
    name: str, array: np.ndarray, family: GgufFamily, config: ModelConfig
) -> np.ndarray:
    """One tensor, or its codes or scales, with what llama.cpp's converter did to it undone."""
    role = re.sub(r"^blk\.\d+\.", "", name)
    if family.norm_offset and role.endswith("norm.weight"):
        return array - np.float32(family.norm_offset)
    if family.is_permuted and role in ("attn_q.weight", "attn_k.weight"):
        heads = config.num_heads if role == "attn_q.weight" else config.num_kv_heads
        array = _half_rotation_rows(array, heads)
    if role == "ssm_a":  # -exp(A_log)
        array = np.log(-array)
    if role == "ssm_norm.weight" and config.recurrent and config.recurrent.kind == "space":
        array = array.reshape(-1)  # a row for each group
    if family.is_conv1d and name.startswith("blk.") and array.ndim == 2:
        array = array.T
    return array


def _codes(tensor: Any) -> tuple[np.ndarray, ...] | None:
    """Codes, scales and perhaps offsets along the last axis, of quantisations that are no more."""
    bits = _CODE_BITS.get(tensor.tensor_type.name)
    if bits is None or tensor.data.ndim < 2:
        return None
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


def _half_rotation_rows(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of query and key rows.

    llama.cpp rotates neighbours, Hugging Face dimension d with d + D/2, so its converter
    interleaves the two halves of every head (`LlamaModel.permute` in convert_hf_to_gguf.py):
        Hugging Face   a0 a1 .. b0 b1 ..        GGUF   a0 b0 a1 b1 ..
    """
    rows, width = array.shape
    pairs = array.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)
