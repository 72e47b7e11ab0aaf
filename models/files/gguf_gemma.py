"""What the metadata of Gemma's GGUF files says, in the words of a `config.json`."""

import statistics
from typing import Any

from folojax.models.files.gguf_family import Read, by_layer, kinds_of, local_layers, shortest


def gemma(
    read: Read, num_layers_of_27b: int, period: int, final_cap: float | None
) -> dict[str, Any]:
    """The file does not say by what queries are scaled: by head_dim, but for the largest model."""
    scalar = read("attention.key_length", 256)
    if read("block_count") == num_layers_of_27b:
        scalar = read("embedding_length") // read("attention.head_count")
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": read("attention.sliding_window", 4096),
        "layer_types": kinds_of(local_layers(read, period)),
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": read("final_logit_softcapping", final_cap),
    }


def gemma2(read: Read) -> dict[str, Any]:
    """Of Gemma 2."""
    cap = {"attn_logit_softcapping": read("attn_logit_softcapping", 50.0)}
    return cap | gemma(read, num_layers_of_27b=46, period=2, final_cap=30.0)


def gemma3(read: Read) -> dict[str, Any]:
    """Of Gemma 3."""
    local = {"rope_local_base_freq": read("rope.freq_base_swa", 10_000.0)}
    return local | gemma(read, num_layers_of_27b=62, period=6, final_cap=None)


def gemma3n(read: Read) -> dict[str, Any]:
    """Shares of gates that are 0 are there as what follows from them; ranks never differed."""
    normal = statistics.NormalDist()
    shares = [shortest(normal.cdf(one)) for one in read("activation_sparsity_scale", ())]
    is_local = read("attention.sliding_window_pattern", None)
    kinds = is_local and kinds_of(is_local)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": read("attention.sliding_window", 512),
        "layer_types": kinds,
        "rope_local_base_freq": read("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": read("final_logit_softcapping", 30.0),
        "num_kv_shared_layers": read("attention.shared_kv_layers"),
        "hidden_size_per_layer_input": read("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": None,  # all tokens
        "altup_num_inputs": read("altup.num_inputs"),
        "altup_active_idx": read("altup.active_idx"),
        "laurel_rank": 64,
        "activation_sparsity_pattern": shares or None,
    }


def gemma4(read: Read) -> dict[str, Any]:
    """Its `key_length` is of layers without a window; the model calls that the global one."""
    is_local = local_layers(read)
    kv_heads = dict(zip(is_local, by_layer(read, "attention.head_count_kv"), strict=True))
    widths, shared = by_layer(read, "feed_forward_length"), read("attention.shared_kv_layers", 0)
    return {
        "layer_types": kinds_of(is_local),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": read("attention.sliding_window"),
        "head_dim": read("attention.key_length_swa"),
        "rope_head_dim": read("attention.key_length"),
        "global_head_dim": read("attention.key_length"),
        "num_key_value_heads": kv_heads.get(True, kv_heads.get(False)),
        "num_global_key_value_heads": kv_heads.get(False),
        "rope_local_base_freq": read("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": read("final_logit_softcapping", None),
        "num_kv_shared_layers": shared,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] != widths[0],
        "hidden_size_per_layer_input": read("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": None,  # all tokens
        **(_gemma4_experts(read) if read("expert_count", 0) else {}),
    }


def _gemma4_experts(read: Read) -> dict[str, Any]:
    return {
        "enable_moe_block": True,
        "num_experts": read("expert_count"),
        "top_k_experts": read("expert_used_count"),
        "moe_intermediate_size": read("expert_feed_forward_length"),
    }
