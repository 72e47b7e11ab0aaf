"""What llama.cpp's converter did to values of tensors, undone."""

import re

import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.core.recurrent import Recurrent
from folojax.models.files.gguf_family import GgufFamily

_BY_VALUE_HEAD = (
    *("attn_qkv.weight", "ssm_conv1d.weight"),
    *("attn_gate.weight", "ssm_beta.weight", "ssm_alpha.weight", "ssm_a", "ssm_dt.bias"),
)
"""Tensors of Qwen3.5 whose last rows, or all, are those of heads of values."""

_PERMUTED = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")

_WITH_KEYS = _BY_VALUE_HEAD[:2]


def role_of(name: str) -> str:
    """A tensor's name in its layer."""
    return re.sub(r"^blk\.\d+\.", "", name)


def in_hf_layout(
    name: str, array: np.ndarray, family: GgufFamily, config: ModelConfig
) -> np.ndarray:
    """One tensor, or its codes or scales, as the checkpoint has it."""
    role, sizes = role_of(name), config.recurrent
    if family.norm_offset and role.endswith("norm.weight") and role != "ssm_norm.weight":
        return array - np.float32(family.norm_offset)
    if family.is_permuted and role in _PERMUTED:
        heads = config.num_heads if role.startswith("attn_q") else config.num_kv_heads
        array = _half_rotation_rows(array, heads)
    if role == "ssm_a":  # -exp(A_log)
        array = np.log(-array)
    if role == "ssm_norm.weight" and sizes and sizes.kind == "space":
        array = array.reshape(-1)  # a row for each group
    if is_tiled(config):
        assert sizes is not None, "the model is recurrent"
        if role in _BY_VALUE_HEAD:
            array = _grouped_rows(array, sizes, 2 * sizes.num_keys * (role in _WITH_KEYS))
        if role == "ssm_out.weight":
            array = _grouped_rows(array.T, sizes, 0).T
    if family.is_conv1d and name.startswith("blk.") and array.ndim == 2:
        array = array.T
    return array


def is_tiled(config: ModelConfig) -> bool:
    """Whether heads of values lie in llama.cpp's order."""
    sizes = config.recurrent
    return sizes is not None and sizes.kind == "delta" and not sizes.is_by_key_head


def _grouped_rows(array: np.ndarray, sizes: Recurrent, start: int) -> np.ndarray:
    """Undoes llama.cpp's order of heads of values, from a row on.

    llama.cpp repeats all heads of keys, Hugging Face each: of two heads of keys a and b with three
    of values each (`_reorder_v_heads` in llama.cpp's conversion/qwen.py):
        Hugging Face   a0 a1 a2 b0 b1 b2        GGUF   a0 b0 a1 b1 a2 b2
    """
    rows = array[start:]
    copies = sizes.num_value_heads // sizes.num_key_heads
    by_head = rows.reshape(copies, sizes.num_key_heads, -1, *array.shape[1:])
    return np.concatenate((array[:start], by_head.swapaxes(0, 1).reshape(rows.shape)))


def _half_rotation_rows(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of query and key rows, and of their biases.

    llama.cpp rotates neighbours, Hugging Face dimension d with d + D/2, so its converter
    interleaves the two halves of every head (`LlamaModel.permute` in convert_hf_to_gguf.py):
        Hugging Face   a0 a1 .. b0 b1 ..        GGUF   a0 b0 a1 b1 ..
    """
    rows, *width = array.shape
    pairs = array.reshape(num_heads, rows // num_heads // 2, 2, *width)
    return pairs.swapaxes(1, 2).reshape(array.shape)
