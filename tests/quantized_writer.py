"""Quantised checkpoints as their own libraries write them: bit by bit, from loops.

Every writer takes a kernel [O, I] and returns its tensors by role, and the floats that they mean.
It shares nothing with the readers: packing is AutoGPTQ's, AutoAWQ's and compressed-tensors' own
loops in plain Python's words.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

GROUP = 32
Written = tuple[dict[str, np.ndarray], np.ndarray]
Writer = Callable[[np.ndarray], Written]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_rows(numbers: np.ndarray, bits: int) -> np.ndarray:
    """AutoGPTQ's `pack`: neighbours along the first axis share an int32."""
    per = 32 // bits
    words = np.zeros((-(-len(numbers) // per), numbers.shape[1]), np.uint32)
    for row, line in enumerate(numbers.astype(np.uint32)):
        words[row // per] |= line << np.uint32(bits * (row % per))
    return words.view(np.int32)


def pack_columns(numbers: np.ndarray, bits: int) -> np.ndarray:
    return np.ascontiguousarray(pack_rows(numbers.T, bits).T)


def pack_awq(numbers: np.ndarray) -> np.ndarray:
    """AutoAWQ's: of eight neighbours along the last axis, those of `_AWQ_ORDER` one by one."""
    words = np.zeros((len(numbers), numbers.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for place, neighbour in enumerate(_AWQ_ORDER):
            number = numbers[:, 8 * column + neighbour].astype(np.uint32)
            words[:, column] |= number << np.uint32(4 * place)
    return words.view(np.int32)


def rounded(
    weight: np.ndarray, group_of: np.ndarray, bits: int, is_symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes [O, I], scales (float16) and zeros [O, G], and the floats they mean."""
    count, most = group_of.max() + 1, 2**bits - 1
    scale, zero = np.zeros((2, len(weight), count))
    for group in range(count):
        part = weight[:, group_of == group]
        if is_symmetric:
            scale[:, group] = abs(part).max(axis=1) / (most / 2)
            zero[:, group] = (most + 1) // 2
        else:
            low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
            scale[:, group] = (high - low) / most
            zero[:, group] = np.round(-low / scale[:, group])
    scale = scale.astype(np.float16).astype(np.float64)
    codes = np.round(weight / scale[:, group_of] + zero[:, group_of]).clip(0, most)
    meant = (codes - zero[:, group_of]) * scale[:, group_of]
    return codes.astype(int), scale, zero.astype(int), meant


def gptq(
    bits: int = 4,
    *,
    is_symmetric: bool = True,
    group: int = GROUP,
    version: int = 1,
    is_ordered: bool = False,
    has_index: bool = True,
) -> Writer:
    def write(weight: np.ndarray) -> Written:
        inputs = weight.shape[1]
        group_of = np.arange(inputs) // (inputs if group == -1 else group)
        if is_ordered:
            group_of = np.random.default_rng(7).permutation(group_of)
        codes, scale, zero, meant = rounded(weight, group_of, bits, is_symmetric)
        stored = (zero - (version == 1)) % 2**bits
        tensors = {
            "qweight": pack_rows(codes.T, bits),
            "qzeros": pack_columns(stored.T, bits),
            "scales": np.ascontiguousarray(scale.T).astype(np.float16),
        }
        return tensors | ({"g_idx": group_of.astype(np.int32)} if has_index else {}), meant

    return write


def awq(weight: np.ndarray) -> Written:
    codes, scale, zero, meant = rounded(weight, np.arange(weight.shape[1]) // GROUP, 4, False)
    tensors = {
        "qweight": pack_awq(codes.T),
        "qzeros": pack_awq(zero.T),
        "scales": np.ascontiguousarray(scale.T).astype(np.float16),
    }
    return tensors, meant


def float8(block: tuple[int | None, int | None], name: str, is_short: bool = False) -> Writer:
    """Scales of blocks of outputs and inputs, None for all of them; `is_short`: with fewer axes."""

    def write(weight: np.ndarray) -> Written:
        size = [one or whole for one, whole in zip(block, weight.shape, strict=True)]
        rows, columns = (np.arange(n) // one for n, one in zip(weight.shape, size, strict=True))
        scale = np.zeros((rows[-1] + 1, columns[-1] + 1), np.float32)
        for row, column in np.ndindex(*scale.shape):
            part = weight[np.ix_(rows == row, columns == column)]
            scale[row, column] = abs(part).max() / 448
        spread = scale[np.ix_(rows, columns)]
        codes = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
        stored = scale.squeeze() if is_short else scale
        return {"weight": codes, name: stored}, codes.astype(np.float64) * spread

    return write


def packed(bits: int, *, is_symmetric: bool, group: int = GROUP) -> Writer:
    """compressed-tensors' pack-quantized; its zeros lie packed along the outputs."""

    def write(weight: np.ndarray) -> Written:
        group_of = np.arange(weight.shape[1]) // (weight.shape[1] if group == -1 else group)
        codes, scale, zero, meant = rounded(weight, group_of, bits, is_symmetric)
        tensors = {
            "weight_packed": pack_columns(codes, bits),
            "weight_scale": scale.astype(np.float16),
            "weight_shape": np.array(weight.shape),
        }
        return tensors | (
            {} if is_symmetric else {"weight_zero_point": pack_rows(zero, bits)}
        ), meant

    return write


def int8(is_symmetric: bool = True, group: int = -1) -> Writer:
    def write(weight: np.ndarray) -> Written:
        group_of = np.arange(weight.shape[1]) // (weight.shape[1] if group == -1 else group)
        codes, scale, zero, meant = rounded(weight, group_of, 8, is_symmetric)
        tensors = {"weight": (codes - 128).astype(np.int8), "weight_scale": scale.astype("float32")}
        return tensors | (
            {} if is_symmetric else {"weight_zero_point": (zero - 128).astype("int8")}
        ), meant

    return write


def scheme(bits: int, strategy: str, kind: str = "int", **fields: Any) -> dict[str, Any]:
    """A group of compressed-tensors' config_groups."""
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, **fields}
    return {"targets": ["Linear"], "weights": weights}


def compressed(format: str, *schemes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    groups = {f"group_{number}": one for number, one in enumerate(schemes)}
    said: dict[str, Any] = {"format": format, "config_groups": groups, "ignore": ["lm_head"]}
    said |= {"quantization_status": "compressed"}
    return {"quant_method": "compressed-tensors", **said, **fields}


@dataclasses.dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    writer: Writer
    other: Writer | None = None  # of every other kernel, where a checkpoint has two kinds
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # beside every kernel


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
_SCALE = np.ones(1, np.float32)

CASES = {
    "gptq": Case({**_GPTQ}, gptq()),
    "gptq-order": Case(
        {**_GPTQ, "desc_act": True, "sym": False, "checkpoint_format": "gptq"},
        gptq(is_symmetric=False, is_ordered=True),
    ),
    "gptq-v2": Case(
        {**_GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
        gptq(is_symmetric=False, version=2, has_index=False),
    ),
    "gptq-8": Case({**_GPTQ, "bits": 8, "group_size": -1}, gptq(8, group=-1)),
    "awq": Case(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "version": "GEMM",
            "zero_point": True,
        },
        awq,
    ),
    "fp8-blocks": Case(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]},
        float8((16, 32), "weight_scale_inv"),
    ),
    "fp8-ragged-blocks": Case(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 40]},
        float8((128, 40), "weight_scale_inv"),
    ),
    "fp8-tensor": Case(
        {"quant_method": "fp8", "activation_scheme": "static"},
        float8((None, None), "weight_scale", is_short=True),
        extra={"input_scale": _SCALE},
    ),
    "fbgemm-fp8": Case(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        float8((1, None), "weight_scale"),
    ),
    "ct-packed": Case(
        compressed("pack-quantized", scheme(4, "group", group_size=GROUP)),
        packed(4, is_symmetric=True),
    ),
    "ct-packed-zeros": Case(
        compressed("pack-quantized", scheme(4, "group", group_size=GROUP, symmetric=False)),
        packed(4, is_symmetric=False),
    ),
    "ct-packed-8": Case(
        compressed("pack-quantized", scheme(8, "channel")), packed(8, is_symmetric=True, group=-1)
    ),
    "ct-int8": Case(
        compressed("int-quantized", scheme(8, "channel")), int8(), extra={"input_scale": _SCALE}
    ),
    "ct-int8-zeros": Case(
        compressed("naive-quantized", scheme(8, "group", group_size=GROUP, symmetric=False)),
        int8(is_symmetric=False, group=GROUP),
    ),
    "ct-float8": Case(
        compressed("float-quantized", scheme(8, "channel", "float")),
        float8((1, None), "weight_scale"),
    ),
    "ct-mixed": Case(
        compressed(
            "mixed-precision",
            scheme(4, "channel"),
            scheme(8, "block", "float", block_structure=[64, 64]),
        ),
        packed(4, is_symmetric=True, group=-1),
        float8((64, 64), "weight_scale"),
    ),
}


def write(case: Case, base: Path, directory: Path) -> dict[str, np.ndarray]:
    """The base model with the kernels of its layers as a case has them; returns what they mean."""
    shutil.copytree(base, directory)
    stored, meant = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            stored[name] = meant[name] = tensor
            continue
        is_other = case.other is not None and len(stored) % 2
        writer = case.other if is_other and case.other else case.writer
        parts, floats = writer(tensor.astype(np.float64))
        meant[name] = floats.astype(np.float32)
        module = name.removesuffix("weight")
        stored |= {module + role: part for role, part in (parts | case.extra).items()}
    save_file(stored, directory / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"quantization_config": case.config})
    )
    return meant
