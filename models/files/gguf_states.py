"""What the metadata of GGUF files of recurrent layers says, in the words of a `config.json`."""

from typing import Any

from folojax.models.families.falcon_h1 import ONES
from folojax.models.families.mamba import RECURRENT
from folojax.models.files.gguf_experts import qwen2_moe
from folojax.models.files.gguf_family import FULL, Read, by_layer, expert_sizes, num_layers


def by_heads(read: Read, other: str) -> dict[str, Any]:
    """Kinds of layers: those without keys are of the other kind."""
    heads = by_layer(read, "attention.head_count_kv")
    return {
        "num_key_value_heads": max(heads),
        "layer_types": [FULL if one else other for one in heads],
    }


def lfm2(read: Read) -> dict[str, Any]:
    """Of LFM2, whose layers without keys have a short convolution."""
    return by_heads(read, "conv") | {
        "norm_eps": read("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": read("shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,  # the file states the adjusted width
    }


def lfm2_moe(read: Read) -> dict[str, Any]:
    """The same with experts."""
    return (
        lfm2(read)
        | expert_sizes(read)
        | {
            "num_dense_layers": read("leading_dense_block_count"),
            "routed_scaling_factor": read("expert_weights_scale", 1.0),
            "norm_topk_prob": True,
            "use_expert_bias": True,
        }
    )


def state_space(read: Read) -> dict[str, Any]:
    """Sizes of Mamba-2."""
    heads = read("ssm.time_step_rank")
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": read("ssm.inner_size") // heads,
        "mamba_n_groups": read("ssm.group_count"),
        "mamba_d_state": read("ssm.state_size"),
        "mamba_d_conv": read("ssm.conv_kernel"),
    }


def falcon_h1(read: Read) -> dict[str, Any]:
    """All multipliers have gone into the kernels."""
    return state_space(read) | {
        "mamba_d_ssm": read("ssm.inner_size"),
        "mamba_norm_before_gate": False,
        "mlp_multipliers": [1.0, 1.0],
        "ssm_multipliers": [1.0] * 5,
        **{f"{name}_multiplier": 1.0 for name in ONES},
    }


def granite(read: Read) -> dict[str, Any]:
    """Of Granite 3: its multipliers."""
    return {
        "embedding_multiplier": read("embedding_scale"),
        "attention_multiplier": read("attention.scale"),
        "residual_multiplier": read("residual_scale"),
        "logits_scaling": read("logit_scale"),
    }


def granite_moe(read: Read) -> dict[str, Any]:
    """The same with experts, of which there may be none."""
    return granite(read) | {
        "num_local_experts": read("expert_count", 0),
        "num_experts_per_tok": read("expert_used_count", 0),
        "shared_intermediate_size": read("expert_shared_feed_forward_length", 0),
    }


def granite_hybrid(read: Read) -> dict[str, Any]:
    """Whether there is rotary embedding is said by a word for something else."""
    has_rope = read("rope.scaling.finetuned", True)
    fields = {"position_embedding_type": "rope" if has_rope else "nope"}
    kinds = by_heads(read, RECURRENT)
    inner = read("ssm.inner_size")
    expand = inner // read("embedding_length")
    return granite_moe(read) | state_space(read) | kinds | fields | {"mamba_expand": expand}


def bamba(read: Read) -> dict[str, Any]:
    """A Granite 4 without multipliers and with rotary embedding."""
    heads = by_layer(read, "attention.head_count_kv")
    return state_space(read) | {
        "num_key_value_heads": max(heads),
        "attn_layer_indices": [layer for layer, one in enumerate(heads) if one],
        "mamba_expand": read("ssm.inner_size") // read("embedding_length"),
    }


def nemotron_h(read: Read, inner: str = "mlp") -> dict[str, Any]:
    """A layer with keys is attention, one with a width an MLP or experts; others are recurrent."""
    heads, widths = by_layer(read, "attention.head_count_kv"), by_layer(read, "feed_forward_length")
    sizes = state_space(read)
    return {
        "layers_block_type": [
            FULL if kv_heads else inner if width else RECURRENT
            for kv_heads, width in zip(heads, widths, strict=True)
        ],
        "num_key_value_heads": max(heads),
        "intermediate_size": max(widths),
        "mamba_num_heads": sizes["mamba_n_heads"],
        "mamba_head_dim": sizes["mamba_d_head"],
        "n_groups": sizes["mamba_n_groups"],
        "ssm_state_size": sizes["mamba_d_state"],
        "conv_kernel": sizes["mamba_d_conv"],
        "layer_norm_epsilon": read("attention.layer_norm_rms_epsilon"),
        "hidden_act": "relu2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},  # of no layer
    }


def nemotron_h_moe(read: Read) -> dict[str, Any]:
    """The same with experts in the place of MLPs."""
    return nemotron_h(read, "moe") | {
        "n_routed_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "moe_intermediate_size": read("expert_feed_forward_length"),
        "n_shared_experts": read("expert_shared_count"),
        "moe_shared_expert_intermediate_size": read("expert_shared_feed_forward_length"),
        "moe_latent_size": read("moe_latent_size", None),
        "norm_topk_prob": read("expert_weights_norm"),
        "routed_scaling_factor": read("expert_weights_scale"),
        "n_group": read("expert_group_count", 1),
        "topk_group": read("expert_group_used_count", 1),
    }


def qwen35(read: Read) -> dict[str, Any]:
    """Every fourth layer has attention, unless another step is stated."""
    step = read("full_attention_interval", 4)
    kinds = [FULL if (layer + 1) % step == 0 else RECURRENT for layer in range(num_layers(read))]
    heads = read("ssm.time_step_rank")
    return {
        "layer_types": kinds,
        "linear_conv_kernel_dim": read("ssm.conv_kernel"),
        "linear_key_head_dim": read("ssm.state_size"),
        "linear_num_key_heads": read("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": read("ssm.inner_size") // heads,
    }


def qwen35_moe(read: Read) -> dict[str, Any]:
    """Dense MLPs have no layer, and not all files their width."""
    width = read("feed_forward_length", None) or read("expert_feed_forward_length")
    return qwen35(read) | qwen2_moe(read) | {"norm_topk_prob": True, "intermediate_size": width}
