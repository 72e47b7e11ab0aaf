"""Writes GGUF files of tiny models, as llama.cpp's converter would."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# The metadata of each architecture, by what config.json calls it.
_KEYS = {
    "hidden_size": "embedding_length",
    "n_embd": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "n_layer": "block_count",
    "num_attention_heads": "attention.head_count",
    "n_head": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "n_positions": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_experts_per_tok": "expert_used_count",
    "num_local_experts": "expert_count",
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "norm_eps": "attention.layer_norm_epsilon",
    "num_kv_shared_layers": "attention.shared_kv_layers",
    "hidden_size_per_layer_input": "embedding_length_per_layer_input",
    "altup_num_inputs": "altup.num_inputs",
    "altup_active_idx": "altup.active_idx",
}


def letters_metadata(vocab_size: int) -> dict[str, Any]:
    """A byte-level tokenizer of which only the size matters."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [chr(0x100 + i) for i in range(vocab_size - 1)] + ["ĀĄ"],
        "tokenizer.ggml.token_type": [1] * vocab_size,
        "tokenizer.ggml.merges": ["Ā Ą"],
        "tokenizer.ggml.eos_token_id": 2,
    }


def convert(model: Any, directory: Path, architecture: str, path: Path) -> None:
    """Writes a model of transformers, saved in `directory`, as a GGUF file."""
    config = json.loads((directory / "config.json").read_text())
    metadata = {
        f"{architecture}.{ours}": config[theirs]
        for theirs, ours in _KEYS.items()
        if config.get(theirs) is not None
    }
    shares = config.get("activation_sparsity_pattern")
    if shares:
        normal = statistics.NormalDist()
        scales = [normal.inv_cdf(one) if one else -math.inf for one in shares]
        metadata[f"{architecture}.activation_sparsity_scale"] = scales
        is_local = [kind == "sliding_attention" for kind in config["layer_types"]]
        metadata[f"{architecture}.attention.sliding_window_pattern"] = is_local
    if config.get("n_embd"):
        metadata["gpt2.feed_forward_length"] = 4 * config["n_embd"]
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if rope:
        metadata[f"{architecture}.rope.freq_base"] = float(rope["rope_theta"])
    if rope.get("partial_rotary_factor"):
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        turning = int(head_dim * rope["partial_rotary_factor"])
        metadata[f"{architecture}.rope.dimension_count"] = turning
    if rope.get("rope_type") == "linear":
        metadata[f"{architecture}.rope.scaling.type"] = "linear"
        metadata[f"{architecture}.rope.scaling.factor"] = float(rope["factor"])
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(kinds[architecture], layers)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings", True):
            continue
        array = tensor.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            prefix, half = name.removesuffix("gate_up_proj"), array.shape[1] // 2
            tensors[f"{names.get_name(prefix + 'gate_proj')}.weight"] = array[:, :half]
            tensors[f"{names.get_name(prefix + 'up_proj')}.weight"] = array[:, half:]
            continue
        if name.endswith("experts.down_proj"):
            tensors[f"{names.get_name(name)}.weight"] = array
            continue
        joint = re.sub(r"(altup_\w*projections)\.\d+", r"\1", name)
        gguf_name = names.get_name(joint, try_suffixes=(".weight", ".bias"))
        assert gguf_name, name
        if joint != name:  # those of all streams are one
            before = tensors.get(gguf_name, np.zeros((0, *array.shape), np.float32))
            tensors[gguf_name] = np.concatenate((before, array[None]))
            continue
        tensors[gguf_name] = _llama_cpp_layout(gguf_name, array, architecture, config)
    write(path, architecture, metadata | letters_metadata(config["vocab_size"]), tensors)


def _llama_cpp_layout(name: str, array: np.ndarray, architecture: str, config: Any) -> np.ndarray:
    role = re.sub(r"^blk\.\d+\.", "", name)
    if architecture in ("llama", "granite", "smollm3", "arcee") and role in (
        "attn_q.weight",
        "attn_k.weight",
    ):
        heads = config["num_attention_heads" if "_q" in role else "num_key_value_heads"]
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
        return halves.swapaxes(1, 2).reshape(array.shape)
    if architecture in ("gemma", "gemma2", "gemma3", "nemotron") and role.endswith("norm.weight"):
        return array + 1
    if architecture == "gpt2" and name.startswith("blk.") and array.ndim == 2:
        return array.T
    return array


def write(path: Path, architecture: str, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Writes key-value pairs and tensors; a tensor may be a pair (bytes, quantisation type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(name, value)
            case str():
                writer.add_string(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case _:
                writer.add_array(name, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pack_q4_k(weights: np.ndarray) -> np.ndarray:
    """Rows of weights as blocks of Q4_K, byte by byte as ggml's `block_q4_K` says it.

    Codes go from 0 to 13 or so: whoever rounds the weights to sixteen steps again has others.
    """
    rows, width = weights.shape
    groups = weights.reshape(rows, width // 256, 8, 32).astype(np.float64)
    least = np.minimum(groups.min(axis=-1), 0)
    step = np.maximum((groups.max(axis=-1) - least) / 13, 1e-8)
    d = (step.max(axis=-1, keepdims=True) / 63).astype(np.float16)
    dmin = (-least.min(axis=-1, keepdims=True) / 63).astype(np.float16)
    scales = np.clip(np.round(step / d), 1, 63).astype(np.uint8)
    mins = np.clip(np.round(-least / np.maximum(dmin, np.float64(1e-8))), 0, 63).astype(np.uint8)
    unit = (d.astype(np.float64) * scales)[..., None]
    bottom = (dmin.astype(np.float64) * mins)[..., None]
    codes = np.clip(np.round((groups + bottom) / unit), 0, 15).astype(np.uint8)
    block = np.zeros((rows, width // 256, 144), np.uint8)
    block[..., 0:2], block[..., 2:4] = d.view(np.uint8), dmin.view(np.uint8)
    for group in range(4):
        later = group + 4
        block[..., 4 + group] = scales[..., group] | (scales[..., later] >> 4) << 6
        block[..., 8 + group] = mins[..., group] | (mins[..., later] >> 4) << 6
        block[..., 12 + group] = scales[..., later] & 15 | (mins[..., later] & 15) << 4
        packed = codes[..., 2 * group, :] | codes[..., 2 * group + 1, :] << 4
        block[..., 16 + 32 * group : 48 + 32 * group] = packed
    return block.reshape(rows, -1)
