"""What llama.cpp's converter does to families that it rearranges, for `tests.gguf_writer`."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

_DELTA = ("qwen3next", "qwen35", "qwen35moe")
_LATENT = ("deepseek2", "mistral4")
_SIGMOID = ("dots1", "minimax-m2", "lfm2moe", "glm4moe")
_WITH_PICTURES = {
    "qwen2vl": [2, 3, 3, 0],
    "qwen3vl": [6, 5, 5, 0],
    "qwen3vlmoe": [6, 5, 5, 0],
    "qwen35": [2, 1, 1, 0],
    "qwen35moe": [2, 1, 1, 0],
}
_SHARED_KV = ("gemma3n", "gemma4")


def metadata(architecture: str, config: Any, variant: str) -> dict[str, Any]:
    """Keys of the architecture; None takes one away that is called alike in config.json."""
    if architecture in _DELTA:
        return _of_delta(config) | _of_pictures(architecture)
    if architecture in _LATENT:
        return _of_latent(architecture, config, variant)
    if architecture == "gemma4":
        return _of_gemma4(config)
    if architecture.startswith("nemotron_h"):
        return _of_nemotron(config)
    if architecture in _WITH_PICTURES:
        return _of_pictures(architecture)
    if architecture in _SIGMOID:
        return {"expert_gating_func": 2}
    if architecture == "llama4":
        return {
            "feed_forward_length": config["intermediate_size_mlp"],
            "expert_feed_forward_length": config["intermediate_size"],
            "interleave_moe_layer_step": config["interleave_moe_layer_step"],
        }
    if architecture == "granitehybrid" and config["model_type"] == "bamba":
        full, heads = config["attn_layer_indices"], config["num_key_value_heads"]
        kv_heads = [heads * (i in full) for i in range(config["num_hidden_layers"])]
        return {"attention.head_count_kv": kv_heads, "rope.scaling.finetuned": True}
    if architecture == "olmo2" and config.get("sliding_window"):
        is_local = [kind == "sliding_attention" for kind in config["layer_types"]]
        size = {"attention.sliding_window": config["sliding_window"]}
        local = config["rope_parameters"]["sliding_attention"]["rope_theta"]
        if variant == "olmo3-old":
            return size
        return size | {
            "attention.sliding_window_pattern": is_local,
            "rope.freq_base_swa": local,
        }
    return {}


def _of_pictures(architecture: str) -> dict[str, Any]:
    """How many rates are of time, height and width: of texts they are alike."""
    parts = _WITH_PICTURES.get(architecture)
    return {"rope.dimension_sections": parts} if parts else {}


def _of_delta(config: Any) -> dict[str, Any]:
    heads = config["linear_num_value_heads"]
    return {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * config["linear_value_head_dim"],
        "full_attention_interval": 1 + config["layer_types"].index("full_attention"),
    }


def _of_latent(architecture: str, config: Any, variant: str) -> dict[str, Any]:
    turning, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
    of_key = config["qk_nope_head_dim"] + turning
    rope = config["rope_parameters"]
    found: dict[str, Any] = {
        "attention.kv_lora_rank": rank,
        "attention.q_lora_rank": config["q_lora_rank"],
        "rope.dimension_count": turning,
        "expert_weights_norm": config["norm_topk_prob"] or None,
        "expert_gating_func": {"deepseek_v2": 1, "deepseek_v3": 2}.get(config["model_type"]),
    }
    if config.get("mlp_layer_types"):
        found["leading_dense_block_count"] = config["mlp_layer_types"].count("dense")
    if rope.get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if architecture == "mistral4":
        found["attention.temperature_scale"] = None
    if variant == "before-mla":
        sizes = {"attention.key_length": of_key, "attention.value_length": config["v_head_dim"]}
        return found | sizes
    return found | {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + turning,
        "attention.value_length": rank,
        "attention.key_length_mla": of_key,
        "attention.value_length_mla": config["v_head_dim"],
    }


def _of_gemma4(config: Any) -> dict[str, Any]:
    is_local = [kind == "sliding_attention" for kind in config["layer_types"]]
    of_full = next(iter(config["per_layer_config"].values()))
    rope, width, shared = (
        config["rope_parameters"],
        config["intermediate_size"],
        config["num_kv_shared_layers"],
    )
    found = {
        "attention.key_length": of_full["head_dim"],
        "attention.value_length": of_full["head_dim"],
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "attention.sliding_window_pattern": is_local,
        "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        "rope.dimension_count": of_full["head_dim"],
        "rope.dimension_count_swa": config["head_dim"],
        "expert_used_count": config["top_k_experts"],
    }
    if config["use_double_wide_mlp"]:
        first = len(is_local) - shared
        widths = [width if layer < first else 2 * width for layer in range(len(is_local))]
        found["feed_forward_length"] = widths
    if "num_key_value_heads" in of_full:
        heads = config["num_key_value_heads"], of_full["num_key_value_heads"]
        found["attention.head_count_kv"] = [heads[0] if one else heads[1] for one in is_local]
    return found


def _of_nemotron(config: Any) -> dict[str, Any]:
    kinds = config["layers_block_type"]
    heads, inner = config["num_key_value_heads"], config["mamba_num_heads"]
    has_experts = "moe" in kinds
    width = config["moe_intermediate_size" if has_experts else "intermediate_size"]
    found = {
        "attention.head_count_kv": [heads * (kind == "full_attention") for kind in kinds],
        "feed_forward_length": [width * (kind in ("moe", "mlp")) for kind in kinds],
        "attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
        "expert_group_count": config["n_group"] if has_experts else None,
        "expert_group_used_count": config["topk_group"] if has_experts else None,
        "block_count": len(kinds),
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.inner_size": inner * config["mamba_head_dim"],
        "ssm.time_step_rank": inner,
    }
    if has_experts:
        shared = config["moe_shared_expert_intermediate_size"]
        found["expert_shared_feed_forward_length"] = shared
        found["moe_latent_size"] = config["moe_latent_size"]
        return found
    return found | {f"expert_{one}": None for one in ("count", "used_count", "shared_count")}


def tensors(
    architecture: str, name: str, array: np.ndarray, config: Any, variant: str
) -> Tensors | None:
    """What a tensor becomes; None: what those of other families do."""
    layer = re.search(r"layers\.(\d+)\.(.*)", name)
    prefix, role = (f"blk.{layer[1]}.", layer[2]) if layer else ("", name)
    if architecture in _DELTA:
        return _delta_tensors(architecture, prefix, role, array, config, variant)
    if architecture in _LATENT and role.endswith("kv_b_proj.weight") and variant != "before-mla":
        heads, values = config["num_attention_heads"], config["v_head_dim"]
        joint = array.reshape(heads, -1, array.shape[1])
        return {
            f"{prefix}attn_k_b.weight": joint[:, :-values].transpose(0, 2, 1),
            f"{prefix}attn_v_b.weight": joint[:, -values:],
        }
    if role.endswith("experts.gate_up_proj") and architecture != "gpt-oss":
        if architecture in ("gemma4", "mistral4") and variant != "apart":
            return {f"{prefix}ffn_gate_up_exps.weight": array}
        turned = array.transpose(0, 2, 1) if architecture == "llama4" else array
        gate, up = np.split(turned, 2, axis=1)
        return {f"{prefix}ffn_gate_exps.weight": gate, f"{prefix}ffn_up_exps.weight": up}
    if architecture == "llama4" and role.endswith("experts.down_proj"):
        return {f"{prefix}ffn_down_exps.weight": array.transpose(0, 2, 1)}
    if role == "router.scale":
        return {f"{prefix}ffn_gate_inp.scale": array}
    if role == "router.per_expert_scale":
        return {f"{prefix}ffn_down_exps.scale": array}
    if role == "layer_scalar":
        return {f"{prefix}layer_output_scale.weight": array}
    if architecture.startswith("nemotron_h"):
        experts = re.fullmatch(r"mixer\.experts\.(up|down)_proj", role)
        return {f"{prefix}ffn_{experts[1]}_exps.weight": array} if experts else None
    return None


def _delta_tensors(
    architecture: str, prefix: str, role: str, array: np.ndarray, config: Any, variant: str
) -> Tensors | None:
    heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    of_key, of_value = config["linear_key_head_dim"], config["linear_value_head_dim"]
    copies, keys = value_heads // heads, heads * of_key
    if role.endswith("norm.weight") and role != "linear_attn.norm.weight":
        return {_NORMS[role].format(prefix): array + 1}
    if role == "linear_attn.in_proj_qkvz.weight" and variant == "fused":  # the first version
        return {f"{prefix}ssm_in.weight": array}
    if role == "linear_attn.in_proj_qkvz.weight":
        sizes = np.cumsum([of_key, of_key, copies * of_value])
        by_head = np.split(array.reshape(heads, -1, array.shape[1]), sizes, axis=1)
        *qkv, gate = [one.reshape(-1, array.shape[1]) for one in by_head]
        return {f"{prefix}attn_qkv.weight": np.concatenate(qkv), f"{prefix}attn_gate.weight": gate}
    if not role.startswith("linear_attn."):
        return None
    role = role.removeprefix("linear_attn.")
    tiles = (lambda one: one) if architecture == "qwen3next" else _tiled(heads, copies)
    match role:
        case "A_log":
            return {f"{prefix}ssm_a": -np.exp(tiles(array))}
        case "dt_bias":
            return {f"{prefix}ssm_dt.bias": tiles(array)}
        case "conv1d.weight":
            values = tiles(array[2 * keys :, 0])
            return {f"{prefix}ssm_conv1d.weight": np.concatenate((array[: 2 * keys, 0], values))}
        case "in_proj_qkv.weight":
            values = tiles(array[2 * keys :])
            return {f"{prefix}attn_qkv.weight": np.concatenate((array[: 2 * keys], values))}
        case "in_proj_z.weight":
            return {f"{prefix}attn_gate.weight": tiles(array)}
        case "in_proj_b.weight":
            return {f"{prefix}ssm_beta.weight": tiles(array)}
        case "in_proj_a.weight":
            return {f"{prefix}ssm_alpha.weight": tiles(array)}
        case "norm.weight":
            return {f"{prefix}ssm_norm.weight": array}
        case "out_proj.weight":
            return {f"{prefix}ssm_out.weight": tiles(array.T).T}
    return None


_NORMS = {
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "{}attn_norm.weight",
    "post_attention_layernorm.weight": "{}post_attention_norm.weight",
    "self_attn.q_norm.weight": "{}attn_q_norm.weight",
    "self_attn.k_norm.weight": "{}attn_k_norm.weight",
}


def _tiled(heads: int, copies: int) -> Any:
    """Rows of heads of values: the first of every head of keys, then the second of every one."""

    def tile(rows: np.ndarray) -> np.ndarray:
        by_head = np.split(rows, heads * copies)
        return np.concatenate(
            [by_head[h * copies + i] for i in range(copies) for h in range(heads)]
        )

    return tile


def further_tensors(architecture: str, config: Any, found: Tensors, variant: str) -> Tensors:
    """All tensors, with what the converter makes up and in the layout that other versions have."""
    added: Tensors = {}
    rope = config.get("rope_parameters") or {}
    if architecture == "gemma4":
        width = next(iter(config["per_layer_config"].values()))["head_dim"] // 2
        turning = int(width * rope["full_attention"]["partial_rotary_factor"])
        table = [1.0] * turning + [1e30] * (width - turning)
        added["rope_freqs.weight"] = np.array(table, np.float32)
    if architecture == "llama4" and rope.get("rope_type") == "llama3":
        half = config["head_dim"] // 2
        rates = rope["rope_theta"] ** (-np.arange(half) / half)
        is_fast = 2 * math.pi / rates < rope["original_max_position_embeddings"]
        added["rope_freqs.weight"] = np.where(is_fast, 1, rope["factor"]).astype(np.float32)
    shared = config.get("num_kv_shared_layers") or 0
    if architecture in _SHARED_KV and shared:  # published checkpoints have these too
        count = config["num_hidden_layers"]
        kinds = config["layer_types"]
        for layer in range(count - shared, count):
            lender = max(i for i in range(count - shared) if kinds[i] == kinds[layer])
            for role in ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight"):
                lent = found[f"blk.{lender}.{role}"]
                added[f"blk.{layer}.{role}"] = np.full_like(lent, 7)
    if variant in ("joined", "fused"):
        return _whole(found | added)
    return found | added


def _whole(found: Tensors) -> Tensors:
    """The same with queries, keys and values in one, and gates and ups of experts."""
    kept: Tensors = {}
    for name, array in found.items():
        whole = re.sub(r"\.attn_[qkv]\.", ".attn_qkv.", name)
        whole = re.sub(r"\.ffn_(gate|up)_exps\.", ".ffn_gate_up_exps.", whole)
        is_recurrent = whole.replace("attn_qkv", "attn_gate") in found
        axis = 1 if "_exps" in name else 0
        if whole != name and whole in kept and not is_recurrent:
            kept[whole] = np.concatenate((kept[whole], array), axis=axis)
        else:
            kept[whole] = array
    return kept
