"""One GGUF file in other types: what llama.cpp is fastest with differs from machine to machine.

A variant has the metadata of its source. Its matrices are dequantised and stored in one type,
norms and biases stay as they are (llama.cpp computes with those in float32).
"""

import logging
from pathlib import Path
from typing import Any

import gguf
from gguf.quants import dequantize, quantize

from folojax.models.machine.artefacts import build_once, cache_root, file_digest

# What `general.file_type` says of a file whose matrices are of that type.
_FILE_TYPES = {
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}

KINDS = tuple(_FILE_TYPES)

# Part of the artefact's name: raise it when what is written changes.
_VERSION = 1

# The writer adds the first two itself; of the last it has its own.
_NOT_COPIED = ("general.architecture", "general.file_type", "general.alignment")


def variant(source: Path, kind: str) -> Path:
    """A file with the weights of another one in the given type, written on first use.

    Args:
        source: A GGUF file.
        kind: One of KINDS.

    Returns:
        Its path, in folojax's cache.
    """
    name = f"{file_digest(source)[:32]}-{kind}-v{_VERSION}"
    directory = cache_root() / "bench-gguf" / name
    file = f"{source.stem.split('.')[0]}.{kind}.gguf"
    return build_once(directory, lambda new: write_variant(source, kind, new / file)) / file


def write_variant(source: Path, kind: str, path: Path) -> None:
    """Writes the variant.

    Raises:
        ValueError: the rows of a matrix do not divide into the type's blocks, or the type is none
            of KINDS.
    """
    if kind not in _FILE_TYPES:
        raise ValueError(f"GGUF type {kind!r} is not one of {', '.join(KINDS)}")
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    # The file's tensors wait on disk, so that the memory holds one at a time.
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    for name, field in reader.fields.items():
        if name not in _NOT_COPIED and not name.startswith("GGUF."):
            _copy_field(writer, name, field)
    writer.add_file_type(_FILE_TYPES[kind])
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            wanted = gguf.GGMLQuantizationType[kind]
            width, block = int(tensor.shape[0]), gguf.GGML_QUANT_SIZES[wanted][0]
            if width % block:
                raise ValueError(
                    f"{source}: {tensor.name} has rows of {width}; {kind} has blocks of {block}"
                )
            data = quantize(dequantize(tensor.data, tensor.tensor_type), wanted)
            writer.add_tensor(tensor.name, data, raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_field(writer: gguf.GGUFWriter, name: str, field: Any) -> None:
    kind, *element = field.types
    writer.add_key_value(name, field.contents(), kind, element[-1] if element else None)
