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
from safetensors.torch import load_file

from tests import gguf_reordered

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
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "logit_scale": "logit_scale",
    "n_routed_experts": "expert_count",
    "moe_num_experts": "expert_count",
    "moe_k": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
    "moe_num_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "moe_layer_start_index": "leading_dense_block_count",
    "num_dense_layers": "leading_dense_block_count",
    "moe_layer_interval": "interleave_moe_layer_step",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "shared_intermediate_size": "expert_shared_feed_forward_length",
    "conv_L_cache": "shortconv.l_cache",
    "mamba_n_heads": "ssm.time_step_rank",
    "mamba_n_groups": "ssm.group_count",
    "mamba_d_state": "ssm.state_size",
    "mamba_d_conv": "ssm.conv_kernel",
}

_YARN_KEYS = {
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
    "llama_4_scaling_beta": "attention.temperature_scale",
}
PERMUTED = (
    *("llama", "mistral3", "granite", "granitemoe", "granitehybrid", "smollm3", "arcee"),
    *("nemotron_h", "nemotron_h_moe"),
)
"""Architectures whose rows of queries and keys are interleaved."""


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


def convert(model: Any, directory: Path, architecture: str, path: Path, variant: str = "") -> None:
    """Writes a model of transformers, saved in `directory`, as a GGUF file.

    `variant` says how a version of the converter does that is not the usual one.
    """
    config = json.loads((directory / "config.json").read_text())
    metadata = {
        f"{architecture}.{ours}": config[theirs]
        for theirs, ours in _KEYS.items()
        if config.get(theirs) is not None
    }
    if config.get("head_dim"):
        metadata[f"{architecture}.attention.value_length"] = config["head_dim"]
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
    if rope.get("rope_type") == "yarn":
        original = rope["original_max_position_embeddings"]
        metadata[f"{architecture}.rope.scaling.original_context_length"] = original
        for theirs, key in _YARN_KEYS.items():
            if theirs in rope:
                metadata[f"{architecture}.{key}"] = float(rope[theirs])
    if rope.get("rope_type") in ("linear", "yarn"):
        metadata[f"{architecture}.rope.scaling.type"] = rope["rope_type"]
        metadata[f"{architecture}.rope.scaling.factor"] = float(rope["factor"])
    metadata |= {
        f"{architecture}.{key}": one for key, one in _further(architecture, config).items()
    }
    for key, one in gguf_reordered.metadata(architecture, config, variant).items():
        metadata[f"{architecture}.{key}"] = one
    metadata = {key: one for key, one in metadata.items() if one is not None}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = metadata[f"{architecture}.block_count"]
    names = gguf.get_tensor_name_map(kinds[architecture], layers)
    tensors: dict[str, np.ndarray] = {}
    state = model.state_dict()
    if architecture in ("granitemoe", "granitehybrid"):  # in memory it has names of its own
        state = load_file(directory / "model.safetensors")
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings", True):
            continue
        array = tensor.float().numpy()
        rearranged = gguf_reordered.tensors(architecture, name, array, config, variant)
        if rearranged is not None:
            tensors |= rearranged
            continue
        if architecture.startswith("nemotron_h"):
            name = re.sub(r"^model\.", "backbone.", name)
        if ".act_fn." in name:
            metadata.setdefault(f"xielu.{name.rpartition('.')[2]}", []).append(float(array.item()))
            continue
        turned = re.search(r"(?<=\.experts)\.(gate_up|down)_proj(_bias)?$", name)
        if turned and architecture == "gpt-oss":
            rows = array if turned[2] else array.swapaxes(1, 2)
            kinds_of_rows = turned[1].split("_")
            for place, part in enumerate(kinds_of_rows):
                other = f"{name.removesuffix(turned[0])}.{part}_proj"
                suffix = "bias" if turned[2] else "weight"
                tensors[f"{names.get_name(other)}.{suffix}"] = rows[:, place :: len(kinds_of_rows)]
            continue
        if name.endswith("_linear.weight"):
            tensors |= _granite_parts(name, array, config)
            continue
        if name.endswith("experts.gate_up_proj"):
            prefix, half = name.removesuffix("gate_up_proj"), array.shape[1] // 2
            tensors[f"{names.get_name(prefix + 'gate_proj')}.weight"] = array[:, :half]
            tensors[f"{names.get_name(prefix + 'up_proj')}.weight"] = array[:, half:]
            continue
        if name.endswith("experts.down_proj"):
            tensors[f"{names.get_name(name)}.weight"] = array
            continue
        array = _multiplied(name, array, config) if architecture == "falcon-h1" else array
        name = re.sub(r"(e_score_correction)_bias$", r"\1.bias", name)
        name = name.replace("gate.moe_statics", "moe_statics").replace("sinks", "sinks.weight")
        name = name.replace("expert_bias", "expert_bias.bias").replace("dt_bias", "dt_proj.bias")
        joint = re.sub(r"(altup_\w*projections)\.\d+", r"\1", name)
        gguf_name = names.get_name(joint, try_suffixes=(".weight", ".bias"))
        assert gguf_name, name
        if joint != name:  # those of all streams are one
            before = tensors.get(gguf_name, np.zeros((0, *array.shape), np.float32))
            tensors[gguf_name] = np.concatenate((before, array[None]))
            continue
        tensors[gguf_name] = _llama_cpp_layout(gguf_name, array, architecture, config)
    tensors = gguf_reordered.further_tensors(architecture, config, tensors, variant)
    write(path, architecture, metadata | letters_metadata(config["vocab_size"]), tensors)


def _further(architecture: str, config: Any) -> dict[str, Any]:
    """What is no more than another word for a key of config.json."""
    found: dict[str, Any] = {}
    kinds = config.get("layer_types") or []
    if architecture in ("lfm2", "lfm2moe", "granitehybrid"):
        heads = config["num_key_value_heads"]
        found["attention.head_count_kv"] = [heads * (kind == "full_attention") for kind in kinds]
    if architecture in ("lfm2", "lfm2moe"):
        found["attention.layer_norm_rms_epsilon"] = config["norm_eps"]
    if architecture == "lfm2":  # as the model has adjusted it
        step = config["block_multiple_of"]
        found["feed_forward_length"] = -(-int(2 * config["intermediate_size"] / 3) // step) * step
    if architecture == "granitehybrid":
        found["rope.scaling.finetuned"] = config.get("position_embedding_type") == "rope"
    if architecture == "exaone4" and config.get("sliding_window"):
        is_local = [kind == "sliding_attention" for kind in kinds]
        found["attention.sliding_window_pattern"] = is_local
    if architecture in ("minimax-m2", "gpt-oss"):
        found["expert_feed_forward_length"] = config["intermediate_size"]
    if "mamba_n_heads" in config:
        found["ssm.inner_size"] = config["mamba_n_heads"] * config["mamba_d_head"]
    return found


def _granite_parts(name: str, array: np.ndarray, config: Any) -> dict[str, np.ndarray]:
    """Gates and ups of Granite, apart."""
    layer = name.split(".")[2]
    suffix = (
        "_exps" if "sparse_moe" in name else "_shexp" if config.get("num_local_experts") else ""
    )
    if "output" in name:
        return {f"blk.{layer}.ffn_down{suffix}.weight": array}
    gate, up = np.split(array, 2, axis=-2)
    return {
        f"blk.{layer}.ffn_gate{suffix}.weight": gate,
        f"blk.{layer}.ffn_up{suffix}.weight": up,
    }


def _multiplied(name: str, array: np.ndarray, config: Any) -> np.ndarray:
    """A kernel of Falcon-H1 times its multipliers."""
    into = config["attention_in_multiplier"]
    gate, down = config["mlp_multipliers"]
    if name.endswith("mamba.in_proj.weight"):
        inner = config["mamba_n_heads"] * config["mamba_d_head"]
        states = config["mamba_n_groups"] * config["mamba_d_state"]
        rows = [inner, inner, states, states, config["mamba_n_heads"]]
        scales = np.repeat(np.float32(config["ssm_multipliers"]), rows)
        return array * scales[:, None] * np.float32(config["ssm_in_multiplier"])
    factors = {
        "embed_tokens": config["embedding_multiplier"],
        "lm_head": config["lm_head_multiplier"],
        "q_proj": into,
        "k_proj": into * config["key_multiplier"],
        "v_proj": into,
        "o_proj": config["attention_out_multiplier"],
        "gate_proj": gate,
        "down_proj": down,
        "out_proj": config["ssm_out_multiplier"],
    }
    return array * np.float32(factors.get(name.split(".")[-2], 1.0))


def _llama_cpp_layout(name: str, array: np.ndarray, architecture: str, config: Any) -> np.ndarray:
    role = re.sub(r"^blk\.\d+\.", "", name)
    if architecture in PERMUTED and re.fullmatch(r"attn_[qk]\.(weight|bias)", role):
        heads = config["num_attention_heads" if "_q" in role else "num_key_value_heads"]
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)
    if architecture in ("gemma", "gemma2", "gemma3", "nemotron") and role.endswith("norm.weight"):
        return array + 1
    if role == "ssm_a":
        return -np.exp(array)[:, None]
    if role == "ssm_d":
        return array[:, None]
    if role == "ssm_norm.weight":
        return array.reshape(config.get("mamba_n_groups") or config["n_groups"], -1)
    if role in ("ssm_conv1d.weight", "shortconv.conv.weight") or "ffn_gate_inp_shexp" in role:
        return array.squeeze()
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
