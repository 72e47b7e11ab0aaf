"""Kernels in few bits as compressed-tensors keeps them, so that they need not become floats.

What an `Int8Kernel` computes is its "int-quantized" with inputs rounded token by token; a
`GroupKernel` of four bits is "pack-quantized" in groups of 32, if its offsets are products of
scales and zeros, as those of a checkpoint in few bits are. Other kernels, embeddings and the output
projection are written as the floats that they mean: elsewhere, these are read as floats alone.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from folojax.models.files.hf_names import Source
from folojax.models.quantized.codes import Codes, codes_of, dequantize
from folojax.models.quantized.group_kernels import GROUP
from folojax.models.quantized.int8_kernels import Int8Kernel
from folojax.models.quantized.quantize import VOCABULARY, QuantizedKernel

_INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
_INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": False}
_GROUPS: dict[str, dict[str, Any]] = {
    "weight": {
        "format": "int-quantized",
        "weights": _INT8 | {"strategy": "channel"},
        "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
    },
    "weight_packed": {
        "format": "pack-quantized",
        "weights": _INT4 | {"strategy": "group", "group_size": GROUP},
    },
}
"""By the tensor that holds the codes of such a kernel."""


def quantized_tensors(
    name: str, kernel: QuantizedKernel, source: Source
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a parameter, in Hugging Face's layout."""
    codes = None if name in VOCABULARY or source.is_transposed else codes_of(kernel)
    if codes is None or (codes.bits == 8 and not isinstance(kernel, Int8Kernel)):
        yield from source.views(dequantize(kernel))
        return
    start = 0
    for tensor, shape in source.tensors:
        rows, module = slice(start, start := start + shape[0]), tensor.removesuffix("weight")
        part = Codes(codes.values[rows], codes.scale[rows], codes.zero[rows], *codes[3:])
        for role, array in _roles(part).items():
            yield module + role, array


def quantization_config(tensors: Iterable[str]) -> dict[str, Any] | None:
    """What config.json says of tensors with these names; None: all are floats."""
    names = set(tensors)
    modules = sorted(
        name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")
    )
    groups = []
    for role, group in _GROUPS.items():
        targets = [module for module in modules if f"{module}.{role}" in names]
        groups += [group | {"targets": targets}] if targets else []
    if not groups:
        return None
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ["lm_head"],
    }


def _roles(codes: Codes) -> dict[str, np.ndarray]:
    if codes.bits == 8:
        return {"weight": (codes.values ^ 128).view(np.int8), "weight_scale": codes.scale}
    return {
        "weight_packed": _packed(codes.values),
        "weight_scale": codes.scale.astype(np.float16),
        "weight_zero_point": _packed(codes.zero.T.astype(np.uint8)).T,
        "weight_shape": np.array(codes.values.shape),
    }


def _packed(codes: np.ndarray) -> np.ndarray:
    """int32 of eight neighbours along the last axis each, from the lowest bits up."""
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
    return np.ascontiguousarray(codes[:, ::2] | codes[:, 1::2] << 4).view("<i4")
