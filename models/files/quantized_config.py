"""What a config.json says of kernels that are stored in few bits; what is not read is refused."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from folojax.models.core.config import ModelConfig

# Transformers, and older files of compressed-tensors; MLX, which is not read.
_KEYS = ("quantization_config", "compression_config", "quantization")

_ELSE = (
    'use the model\'s unquantised version, on CPU with quantization="int8" or "int4" if it is '
    "to be small, or its GGUF file"
)

_COMPRESSED_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
)

Block = tuple[int | None, int | None]
"""Outputs and inputs that share a scale; None: all of them."""

_WHOLE: Block = (None, None)
_OUTPUT: Block = (1, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedFormat:
    """How the quantised kernels of a checkpoint are stored."""

    method: str  # "gptq", "awq", "mxfp4" or, where a kernel's tensors say the rest, "scaled"
    bits: tuple[int, ...]  # what packed codes may have
    blocks: tuple[Block, ...]  # what may share a scale
    zero_step: int = 0  # added to the zeros as they are stored
    has_zeros: bool = False  # every kernel of integers has them
    has_offsets: bool = False  # kernels may have them, in place of zeros


def quantized_format(mapping: Mapping[str, Any]) -> QuantizedFormat | None:
    """The format that the dict of a config.json states; None: its weights are floats.

    Raises:
        ValueError: it is none that is read, or malformed; says what to do instead.
    """
    key = next((key for key in _KEYS if mapping.get(key)), None)
    if key is None:
        return None
    stated = mapping[key]
    named = stated.get("quant_method") if isinstance(stated, Mapping) else stated
    read = _READERS.get(named) if isinstance(named, str) else None
    if read is None or mapping.get("quantization"):
        raise ValueError(
            f"{key} ({stated if named is None else named!s:.60}): of quantised safetensors only "
            f"{', '.join(_READERS)} are read; {_ELSE}"
        )
    try:
        if not isinstance(stated, Mapping):
            raise ValueError("it does not say how the weights are stored")
        return read(stated)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        said = error if isinstance(error, ValueError) else f"it is malformed: {error!r}"
        if isinstance(error, KeyError):
            said = f"it has no {error}"
        raise ValueError(f"{key} ({named}): {said}; {_ELSE}") from error


def format_of(config: ModelConfig) -> QuantizedFormat | None:
    """The format of the checkpoint that a model's config came from."""
    return quantized_format(json.loads(config.hf_config or "{}"))


def _gptq(stated: Mapping[str, Any]) -> QuantizedFormat:
    _only(stated, "checkpoint_format", "gptq", "gptq_v2", "", None)
    _only(stated, "pack_dtype", "int32", None)
    for key in ("dynamic", "is_marlin_format"):
        if stated.get(key):
            raise ValueError(f"{key} {stated[key]!r:.60} is not supported")
    is_first = stated.get("checkpoint_format") != "gptq_v2"
    return QuantizedFormat(
        method="gptq",
        bits=(_only(stated, "bits", 4, 8),),
        blocks=(_group(stated["group_size"]),),
        zero_step=int(is_first),
        has_zeros=True,
    )


def _awq(stated: Mapping[str, Any]) -> QuantizedFormat:
    # AutoAWQ's own names, where transformers has not renamed them.
    names = {"w_bit": "bits", "q_group_size": "group_size"}
    stated = {names.get(name, name): value for name, value in stated.items()}
    version = stated.get("version") or "gemm"
    _only({"version": str(version).lower()}, "version", "gemm")
    _only(stated, "zero_point", True, None)
    return QuantizedFormat(
        method="awq",
        bits=(_only(stated, "bits", 4),),
        blocks=(_group(stated["group_size"]),),
        has_zeros=True,
    )


def _fp8(stated: Mapping[str, Any]) -> QuantizedFormat:
    _only(stated, "fmt", "e4m3", "float8_e4m3fn", None)
    size = stated.get("weight_block_size")
    blocks = (_WHOLE, _OUTPUT) if size is None else (_two(size),)
    return QuantizedFormat(method="scaled", bits=(), blocks=blocks)


def _compressed(stated: Mapping[str, Any]) -> QuantizedFormat:
    _only(stated, "format", *_COMPRESSED_FORMATS, None)
    _only(stated.get("sparsity_config") or {}, "format", "dense", None)
    if stated.get("transform_config"):
        raise ValueError("transform_config, rotations of what goes through a layer, is not read")
    groups = list(stated["config_groups"].values())
    for group in groups:
        _only(group, "format", *_COMPRESSED_FORMATS, None)
    schemes = [group["weights"] for group in groups if group.get("weights")]
    if not schemes:
        raise ValueError("config_groups quantise no weights")
    integers = [scheme for scheme in schemes if _only(scheme, "type", "int", "float") == "int"]
    for scheme in schemes:
        _only(scheme, "num_bits", *((4, 8) if scheme["type"] == "int" else (8,)))
    return QuantizedFormat(
        method="scaled",
        bits=tuple({scheme["num_bits"] for scheme in integers}),
        blocks=tuple({_block(scheme): None for scheme in schemes}),
        # False is said; a scheme that says nothing has none.
        has_zeros=bool(integers) and all(one.get("symmetric") is False for one in integers),
        # Not compressed-tensors' own word, which refuses it: conversions of GGUF files have it.
        has_offsets=any(one.get("offset") is True for one in integers),
    )


_READERS = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm_fp8": lambda stated: QuantizedFormat(method="scaled", bits=(), blocks=(_OUTPUT,)),
    "compressed-tensors": _compressed,
    "mxfp4": lambda stated: QuantizedFormat(method="mxfp4", bits=(), blocks=()),
}


def _block(scheme: Mapping[str, Any]) -> Block:
    """What shares a scale in a scheme of compressed-tensors."""
    size = scheme.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = scheme.get("strategy") or implied
    _only({"strategy": strategy}, "strategy", "tensor", "channel", "group", "block")
    if strategy == "block":
        return _two(scheme["block_structure"])
    return {"tensor": _WHOLE, "channel": _OUTPUT}.get(strategy) or _group(size)


def _only(stated: Mapping[str, Any], key: str, *known: Any) -> Any:
    """The value of a key, if it is one of the known ones; None where that may be missing."""
    value = stated.get(key)
    # True is no 1.
    if not any(value == one and type(value) is type(one) for one in known):
        shown = ", ".join(repr(one) for one in known if one not in ("", None))
        raise ValueError(f"{key} is {value!r:.60}; supported: {shown}")
    return value


def _group(size: Any) -> Block:
    """Of GPTQ's `group_size`: -1 is all inputs."""
    return _OUTPUT if size == -1 else (1, _size(size, "group_size"))


def _two(sizes: Any) -> Block:
    if not isinstance(sizes, list) or len(sizes) != 2:
        raise ValueError(f"a block is {sizes!r:.60}, not two sizes")
    return _size(sizes[0], "a block"), _size(sizes[1], "a block")


def _size(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is {value!r:.60}, not a size")
    return value
