"""GGUF files of the Llama family, converted to the Hugging Face layout and kept in the cache."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from folojax.models.artefacts import build_once, cache_root, file_digest
from folojax.models.gguf_tokenizer import save_tokenizer

# Part of the artefact's name: raise it when what the conversion writes changes.
_CONVERTER_VERSION = 1

_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_TENSOR_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def convert_gguf(path: Path) -> Path:
    """Converts a GGUF file once, and finds the conversion again by the file's content.

    The result holds config.json, generation_config.json, model.safetensors in float32 and the
    tokenizer's files.

    Returns:
        A directory under `cache_root()`.

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
        config = _hf_config(metadata, {tensor.name for tensor in reader.tensors})
        save_tokenizer(metadata, directory)
        _save_tensors(reader.tensors, config, directory)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    generation_config = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation_config)


def _hf_config(metadata: dict[str, Any], tensor_names: set[str]) -> dict[str, Any]:
    """The config.json that says what the metadata of a GGUF file says."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"GGUF architecture {architecture!r} is not supported; supported: 'llama'")
    if metadata.get("split.count", 1) > 1:
        raise ValueError("split GGUF files are not supported: join them with llama-gguf-split")
    if metadata.get("llama.expert_count", 0):
        raise ValueError("mixtures of experts are not supported")
    if metadata.get("llama.attention.sliding_window", 0):
        raise ValueError("sliding-window attention is not supported")
    required = {
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "max_position_embeddings": "llama.context_length",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    }
    missing = [key for key in (*required.values(), "tokenizer.ggml.tokens") if key not in metadata]
    if missing:
        raise ValueError(f"the metadata lacks {', '.join(missing)}")
    config = {name: metadata[key] for name, key in required.items()}
    config["rms_norm_eps"] = _shortest(config["rms_norm_eps"])
    num_heads = config["num_attention_heads"]
    head_dim = metadata.get("llama.attention.key_length", config["hidden_size"] // num_heads)
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError("rotary embeddings over part of the head are not supported")
    eos = [
        metadata[f"tokenizer.ggml.{name}_token_id"]
        for name in ("eos", "eot")
        if f"tokenizer.ggml.{name}_token_id" in metadata
    ]
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rope_parameters": _rope_parameters(metadata, tensor_names),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def _rope_parameters(metadata: dict[str, Any], tensor_names: set[str]) -> dict[str, Any]:
    """Rotary settings in the words of transformers 5."""
    theta = _shortest(metadata.get("llama.rope.freq_base", 10_000.0))
    kind = metadata.get("llama.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensor_names:
        raise ValueError(
            "rotary scaling by a table of factors (rope_freqs.weight, Llama 3.1 and later) is not "
            "supported in GGUF files: use the model's safetensors version"
        )
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        factor = _shortest(metadata.get("llama.rope.scaling.factor", 1.0))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise ValueError(f"rope scaling {kind!r} is not supported; supported: 'none', 'linear'")


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for the 9.999999747e-06 of the file."""
    return float(str(np.float32(value)))


def _save_tensors(tensors: list[Any], config: dict[str, Any], directory: Path) -> None:
    """Writes model.safetensors: every tensor dequantised to float32 under its Hugging Face name."""
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    names = {tensor.name: _hf_name(tensor.name) for tensor in tensors}
    unknown = sorted(name for name, hf_name in names.items() if hf_name is None)
    if unknown:
        raise ValueError(f"tensors of no known use: {', '.join(unknown)}")
    heads = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"],
    }
    arrays: dict[str, np.ndarray] = {}
    for tensor in tensors:
        try:
            array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise ValueError(f"{tensor.name} is quantised as {kind}: not supported") from error
        role = re.sub(r"^blk\.\d+\.", "", tensor.name)
        if role in heads:
            array = _half_rotation_rows(array, heads[role])
        arrays[str(names[tensor.name])] = np.ascontiguousarray(array)
    save_file(arrays, directory / "model.safetensors", metadata={"format": "np"})


def _hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, None if it has none."""
    if name in _TENSOR_NAMES:
        return _TENSOR_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _BLOCK_TENSOR_NAMES:
        return None
    return f"model.layers.{match[1]}.{_BLOCK_TENSOR_NAMES[match[2]]}"


def _half_rotation_rows(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of query and key rows.

    llama.cpp rotates neighbours, Hugging Face dimension d with d + D/2, so its converter
    interleaves the two halves of every head (`LlamaModel.permute` in convert_hf_to_gguf.py):
        Hugging Face   a0 a1 .. b0 b1 ..        GGUF   a0 b0 a1 b1 ..
    """
    rows, width = array.shape
    pairs = array.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
