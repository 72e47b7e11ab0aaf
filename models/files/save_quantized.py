"""Kernels in few bits as compressed-tensors keeps them, so that they need not become floats.

What an `Int8Kernel` computes is its "int-quantized" with inputs rounded token by token, what a
`Float8Kernel` computes its "float-quantized"; a `GroupKernel` of four bits or a `TiledKernel` is
"pack-quantized" in groups of 32, if its offsets are products of scales and zeros, as those of a
checkpoint in few bits are. Other kernels, embeddings and the output projection are written as the
floats that they mean: elsewhere, these are read as floats alone.
"""

from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np

from folojax.models.files.hf_names import Source
from folojax.models.quantized.codes import Codes, codes_of, dequantize
from folojax.models.quantized.float8_kernels import Float8Kernel
from folojax.models.quantized.group_kernels import GROUP
from folojax.models.quantized.int8_kernels import Int8Kernel
from folojax.models.quantized.quantize import VOCABULARY, QuantizedKernel

_INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
_FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
_INT4: dict[str, Any] = {"num_bits": 4, "type": "int"}
_IN_GROUPS = {"strategy": "group", "group_size": GROUP}
_SCHEMES: dict[str, dict[str, Any]] = {
    "outputs": {
        "format": "int-quantized",
        "weights": _INT8 | {"strategy": "channel"},
        "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
    },
    "groups": {"format": "int-quantized", "weights": _INT8 | _IN_GROUPS},
    "packed": {"format": "pack-quantized", "weights": _INT4 | {"symmetric": True} | _IN_GROUPS},
    "zeros": {"format": "pack-quantized", "weights": _INT4 | {"symmetric": False} | _IN_GROUPS},
    # Not compressed-tensors' own: of conversions of GGUF files, in the cache.
    "offsets": {
        "format": "pack-quantized",
        "weights": _INT4 | {"symmetric": True, "offset": True} | _IN_GROUPS,
    },
    "float8": {
        "format": "float-quantized",
        "weights": _FLOAT8 | {"strategy": "channel"},
        "input_activations": _FLOAT8 | {"strategy": "token", "dynamic": True},
    },
}
"""By what a kernel is: eight bits and a scale for each output, or for each group; four bits in
groups without or with zeros, or with offsets; float8."""


def quantized_tensors(
    name: str, kernel: QuantizedKernel, source: Source
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a parameter, in Hugging Face's layout."""
    if isinstance(kernel, Float8Kernel) and not source.is_transposed:
        yield from _float8_tensors(kernel, source)
        return
    codes = None if name in VOCABULARY or source.is_transposed else codes_of(kernel)
    if codes is None or (codes.bits == 8 and not isinstance(kernel, Int8Kernel)):
        yield from source.views(dequantize(kernel))
        return
    start = 0
    for tensor, shape in source.tensors:
        rows = slice(start, start := start + shape[0])
        part = Codes(codes.values[rows], codes.scale[rows], codes.zero[rows], *codes[3:])
        yield from code_tensors(tensor, part)


def _float8_tensors(kernel: Float8Kernel, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    start = 0
    for tensor, shape in source.tensors:
        rows = slice(start, start := start + shape[0])
        yield tensor, np.asarray(kernel.values[rows])
        yield f"{tensor}_scale", np.asarray(kernel.scale[rows])[:, None]


def code_tensors(name: str, codes: Codes) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors in place of one of floats with that name."""
    if codes.bits == 8:
        yield name, (codes.values ^ 128).view(np.int8)
        yield f"{name}_scale", codes.scale
    else:
        yield f"{name}_packed", _packed(codes.values)
        yield f"{name}_shape", np.array(codes.values.shape)
        if codes.offset is not None:
            yield f"{name}_scale", codes.scale
            yield f"{name}_offset", codes.offset
            return
        yield f"{name}_scale", codes.scale.astype(np.float16)
        if (codes.zero != 8).any():
            yield f"{name}_zero_point", _packed(codes.zero.T.astype(np.uint8)).T


def quantization_config(
    shapes: Mapping[str, tuple[int, ...]], float8: Container[str] = ()
) -> dict[str, Any] | None:
    """What config.json says of tensors with these names and shapes; None: all are floats.

    Those that `float8` names are in float8.
    """
    modules: dict[str, list[str]] = {kind: [] for kind in _SCHEMES}
    for name, shape in shapes.items():
        module, _, role = name.rpartition(".")
        if role == "weight_scale":
            is_float8 = f"{module}.weight" in float8
            kind = "float8" if is_float8 else _kind(module, shape, shapes)
            modules[kind].append(module)
    groups = [_SCHEMES[kind] | {"targets": sorted(one)} for kind, one in modules.items() if one]
    if not groups:
        return None
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ["lm_head"],
    }


def _kind(module: str, scale: tuple[int, ...], names: Container[str]) -> str:
    if f"{module}.weight_offset" in names:
        return "offsets"
    if f"{module}.weight_packed" in names:
        return "zeros" if f"{module}.weight_zero_point" in names else "packed"
    return "outputs" if scale[1] == 1 else "groups"


def _packed(codes: np.ndarray) -> np.ndarray:
    """int32 of eight neighbours along the last axis each, from the lowest bits up."""
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
    return np.ascontiguousarray(codes[:, ::2] | codes[:, 1::2] << 4).view("<i4")
