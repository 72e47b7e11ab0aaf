"""The architectures of GGUF files that are read, and what the metadata of each says."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from folojax.models.families.falcon_h1 import ONES
from folojax.models.families.mamba import RECURRENT

FULL, LOCAL = "full_attention", "sliding_attention"

_MOST_LAYERS = 2**10

Metadata = Mapping[str, Any]
Read = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """How one GGUF architecture is read."""

    architecture: str  # of the Hugging Face config
    extra: Callable[[Read], dict[str, Any]] = lambda read: {}
    """Further entries of its config; `read(key, default)` gives metadata, and counts a key without
    a default as missing. `further_rope` goes into `rope_parameters`."""
    by_tensor: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Entries of its config that are true if some layer has a tensor of this name."""
    is_permuted: bool = False
    """Rows of queries and keys are in llama.cpp's order (see `gguf_conversion`)."""
    norm_offset: float = 0.0  # was added to every norm's weight
    is_conv1d: bool = False  # kernels were transposed from [in, out]


def _window(read: Read) -> dict[str, Any]:
    return {"sliding_window": read("attention.sliding_window", None) or None}


def _experts(read: Read) -> dict[str, Any]:
    experts = {
        "num_local_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
    }
    return experts | _window(read)


def _qwen3_moe(read: Read) -> dict[str, Any]:
    return _experts_alone(read) | {
        "moe_intermediate_size": read("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _gemma(read: Read, num_layers_of_27b: int, final_cap: float | None) -> dict[str, Any]:
    """The file does not say by what queries are scaled: by head_dim, but for the largest model."""
    scalar = read("attention.key_length", 256)
    if read("block_count") == num_layers_of_27b:
        scalar = read("embedding_length") // read("attention.head_count")
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": read("attention.sliding_window", 4096),
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": read("final_logit_softcapping", final_cap),
    }


def _gemma2(read: Read) -> dict[str, Any]:
    cap = {"attn_logit_softcapping": read("attn_logit_softcapping", 50.0)}
    return cap | _gemma(read, num_layers_of_27b=46, final_cap=30.0)


def _gemma3(read: Read) -> dict[str, Any]:
    local = {"rope_local_base_freq": read("rope.freq_base_swa", 10_000.0)}
    return local | _gemma(read, num_layers_of_27b=62, final_cap=None)


def _gemma3n(read: Read) -> dict[str, Any]:
    """Shares of gates that are 0 are there as what follows from them; ranks never differed."""
    normal = statistics.NormalDist()
    shares = [shortest(normal.cdf(one)) for one in read("activation_sparsity_scale", ())]
    is_local = read("attention.sliding_window_pattern", None)
    kinds = is_local and [LOCAL if one else FULL for one in is_local]
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


def _experts_alone(read: Read) -> dict[str, Any]:
    return {
        "num_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
    }


def _expert_sizes(read: Read) -> dict[str, Any]:
    return _experts_alone(read) | {"moe_intermediate_size": read("expert_feed_forward_length")}


def _qwen2_moe(read: Read) -> dict[str, Any]:
    shared = read("expert_shared_feed_forward_length")
    return _expert_sizes(read) | {"shared_expert_intermediate_size": shared}


def _routed(read: Read) -> dict[str, Any]:
    """Of GLM-4.5 and dots.llm1; groups are stated by newer files alone."""
    return {
        "n_routed_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "moe_intermediate_size": read("expert_feed_forward_length"),
        "n_shared_experts": read("expert_shared_count"),
        "first_k_dense_replace": read("leading_dense_block_count", 0),
        "routed_scaling_factor": read("expert_weights_scale", 1.0),
        "norm_topk_prob": read("expert_weights_norm"),
        "n_group": read("expert_group_count", 1),
        "topk_group": read("expert_group_used_count", 1),
        "sliding_window": None,
    }


def _ernie_moe(read: Read) -> dict[str, Any]:
    return {
        "moe_num_experts": read("expert_count"),
        "moe_k": read("expert_used_count"),
        "moe_intermediate_size": read("expert_feed_forward_length"),
        "moe_num_shared_experts": read("expert_shared_count", 0),
        "moe_layer_start_index": read("leading_dense_block_count"),
        "moe_layer_end_index": -1,
        "moe_layer_interval": read("interleave_moe_layer_step"),
    }


def _minimax(read: Read) -> dict[str, Any]:
    return {
        "num_local_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "intermediate_size": read("expert_feed_forward_length"),
    }


def _command(read: Read) -> dict[str, Any]:
    return {
        "layer_norm_eps": read("attention.layer_norm_epsilon"),
        "logit_scale": read("logit_scale"),
    }


def _command2(read: Read) -> dict[str, Any]:
    """Every fourth layer is without a window, and the file does not say so."""
    return _command(read) | {"sliding_window": read("attention.sliding_window")}


def _gpt_oss(read: Read) -> dict[str, Any]:
    window = read("attention.sliding_window")
    return _minimax(read) | {"sliding_window": window, "further_rope": {"truncate": False}}


def _ministral3(read: Read) -> dict[str, Any]:
    """Its two factors of attention never differed, and the file has one."""
    factor = read("rope.scaling.yarn_log_multiplier", 1.0)
    further = {
        "mscale": factor,
        "mscale_all_dim": factor,
        "llama_4_scaling_beta": read("attention.temperature_scale"),
    }
    return _window(read) | {"further_rope": further}


def _in_all_layers(value: Any, read: Read) -> list[Any]:
    count = read("block_count")
    if count > _MOST_LAYERS:
        raise ValueError(f"block_count is {count}: no model has so many layers")
    return [value] * count


def _exaone4(read: Read) -> dict[str, Any]:
    """Without a window all layers are alike; else every fourth has none, unless a list says so."""
    window, is_local = _window(read), read("attention.sliding_window_pattern", None)
    if window["sliding_window"] is None:
        is_local = _in_all_layers(False, read)
    if isinstance(is_local, list):
        window["layer_types"] = [LOCAL if one else FULL for one in is_local]
    return window


def _by_heads(read: Read, other: str) -> dict[str, Any]:
    """Kinds of layers: those without keys are of the other kind."""
    heads = read("attention.head_count_kv")
    heads = heads if isinstance(heads, list) else _in_all_layers(heads, read)
    return {
        "num_key_value_heads": max(heads),
        "layer_types": [FULL if one else other for one in heads],
    }


def _lfm2(read: Read) -> dict[str, Any]:
    return _by_heads(read, "conv") | {
        "norm_eps": read("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": read("shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,  # the file states the adjusted width
    }


def _lfm2_moe(read: Read) -> dict[str, Any]:
    return (
        _lfm2(read)
        | _expert_sizes(read)
        | {
            "num_dense_layers": read("leading_dense_block_count"),
            "routed_scaling_factor": read("expert_weights_scale", 1.0),
            "norm_topk_prob": True,
            "use_expert_bias": True,
        }
    )


def _state_space(read: Read) -> dict[str, Any]:
    heads = read("ssm.time_step_rank")
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": read("ssm.inner_size") // heads,
        "mamba_n_groups": read("ssm.group_count"),
        "mamba_d_state": read("ssm.state_size"),
        "mamba_d_conv": read("ssm.conv_kernel"),
    }


def _falcon_h1(read: Read) -> dict[str, Any]:
    """All multipliers have gone into the kernels."""
    return _state_space(read) | {
        "mamba_d_ssm": read("ssm.inner_size"),
        "mamba_norm_before_gate": False,
        "mlp_multipliers": [1.0, 1.0],
        "ssm_multipliers": [1.0] * 5,
        **{f"{name}_multiplier": 1.0 for name in ONES},
    }


def _squared(read: Read) -> dict[str, Any]:
    return {"hidden_act": "relu2"}


def _nemotron(read: Read) -> dict[str, Any]:
    return _squared(read) | {"norm_eps": read("attention.layer_norm_epsilon")}


def _gpt2(read: Read) -> dict[str, Any]:
    return {"hidden_act": "gelu_new", "layer_norm_epsilon": read("attention.layer_norm_epsilon")}


def _granite(read: Read) -> dict[str, Any]:
    return {
        "embedding_multiplier": read("embedding_scale"),
        "attention_multiplier": read("attention.scale"),
        "residual_multiplier": read("residual_scale"),
        "logits_scaling": read("logit_scale"),
    }


def _granite_moe(read: Read) -> dict[str, Any]:
    return _granite(read) | {
        "num_local_experts": read("expert_count", 0),
        "num_experts_per_tok": read("expert_used_count", 0),
        "shared_intermediate_size": read("expert_shared_feed_forward_length", 0),
    }


def _granite_hybrid(read: Read) -> dict[str, Any]:
    """Whether there is rotary embedding is said by a word for something else."""
    has_rope = read("rope.scaling.finetuned", True)
    fields = {"position_embedding_type": "rope" if has_rope else "nope"}
    kinds = _by_heads(read, RECURRENT)
    inner = read("ssm.inner_size")
    expand = inner // read("embedding_length")
    return _granite_moe(read) | _state_space(read) | kinds | fields | {"mamba_expand": expand}


def _olmo2(read: Read) -> dict[str, Any]:
    """OLMo 3 calls itself so too, and says nothing of the rates of its layers with a window."""
    if read("attention.sliding_window", None):
        raise ValueError("olmo2 with a sliding window: use the model's safetensors version")
    return {}


_CONV_BIAS = {"conv_bias": "shortconv.conv.bias"}

GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("LlamaForCausalLM", is_permuted=True),
    "qwen2": GgufFamily("Qwen2ForCausalLM"),
    "qwen3": GgufFamily("Qwen3ForCausalLM"),
    "qwen3moe": GgufFamily("Qwen3MoeForCausalLM", _qwen3_moe),
    "gemma": GgufFamily(
        "GemmaForCausalLM", lambda read: {"hidden_act": "gelu_pytorch_tanh"}, norm_offset=1.0
    ),
    "gemma2": GgufFamily("Gemma2ForCausalLM", _gemma2, norm_offset=1.0),
    "gemma3": GgufFamily("Gemma3ForCausalLM", _gemma3, norm_offset=1.0),
    "gemma3n": GgufFamily("Gemma3nForCausalLM", _gemma3n),
    "phi3": GgufFamily("Phi3ForCausalLM", _window),
    "seed_oss": GgufFamily("SeedOssForCausalLM"),
    "ernie4_5": GgufFamily("Ernie4_5ForCausalLM"),
    "arcee": GgufFamily("ArceeForCausalLM", _squared, is_permuted=True),
    "nemotron": GgufFamily("NemotronForCausalLM", _nemotron, norm_offset=1.0),
    "olmoe": GgufFamily("OlmoeForCausalLM", _experts_alone),
    # The rates of the file are stretched already.
    "hunyuan-dense": GgufFamily("HunYuanDenseV1ForCausalLM"),
    "granite": GgufFamily("GraniteForCausalLM", _granite, is_permuted=True),
    "smollm3": GgufFamily("SmolLM3ForCausalLM", is_permuted=True),
    "olmo2": GgufFamily("Olmo2ForCausalLM", _olmo2),
    "glm4": GgufFamily("Glm4ForCausalLM"),
    "gpt2": GgufFamily("GPT2LMHeadModel", _gpt2, is_conv1d=True),
    "lfm2": GgufFamily("Lfm2ForCausalLM", _lfm2, _CONV_BIAS),
    "lfm2moe": GgufFamily("Lfm2MoeForCausalLM", _lfm2_moe, _CONV_BIAS),
    "falcon-h1": GgufFamily(
        "FalconH1ForCausalLM",
        _falcon_h1,
        {"mamba_conv_bias": "ssm_conv1d.bias", "mamba_rms_norm": "ssm_norm.weight"},
    ),
    "command-r": GgufFamily("CohereForCausalLM", _command, {"use_qk_norm": "attn_q_norm.weight"}),
    "cohere2": GgufFamily("Cohere2ForCausalLM", _command2),
    "granitemoe": GgufFamily("GraniteMoeSharedForCausalLM", _granite_moe, is_permuted=True),
    "granitehybrid": GgufFamily(
        "GraniteMoeHybridForCausalLM",
        _granite_hybrid,
        {"mamba_conv_bias": "ssm_conv1d.bias"},
        is_permuted=True,
    ),
    "qwen2moe": GgufFamily("Qwen2MoeForCausalLM", _qwen2_moe),
    "ernie4_5-moe": GgufFamily("Ernie4_5_MoeForCausalLM", _ernie_moe),
    "glm4moe": GgufFamily("Glm4MoeForCausalLM", _routed, {"use_qk_norm": "attn_q_norm.weight"}),
    "dots1": GgufFamily("Dots1ForCausalLM", _routed),
    "minimax-m2": GgufFamily("MiniMaxM2ForCausalLM", _minimax),
    "gpt-oss": GgufFamily("GptOssForCausalLM", _gpt_oss),
    "mistral3": GgufFamily("Ministral3ForCausalLM", _ministral3, is_permuted=True),
    "exaone4": GgufFamily("Exaone4ForCausalLM", _exaone4),
    "apertus": GgufFamily("ApertusForCausalLM", lambda read: {"hidden_act": "xielu"}),
}
"""By `general.architecture`."""

# Mistral and Mixtral call themselves llama in GGUF.
_MISTRAL = GgufFamily("MistralForCausalLM", _window, is_permuted=True)
_MIXTRAL = GgufFamily("MixtralForCausalLM", _experts, is_permuted=True)


def gguf_family(metadata: Metadata) -> GgufFamily:
    """The row for a file.

    Raises:
        ValueError: its architecture is not supported, or it is a part of a split file.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        raise ValueError(
            f"GGUF architecture {name!r} is not supported; supported: "
            + ", ".join(map(repr, GGUF_FAMILIES))
        )
    if metadata.get("split.count", 1) > 1:
        raise ValueError("split GGUF files are not supported: join them with llama-gguf-split")
    if name == "llama" and metadata.get("llama.expert_count", 0):
        return _MIXTRAL
    if name == "llama" and metadata.get("llama.attention.sliding_window", 0):
        return _MISTRAL
    # Mistral Small 3.1 and 3.2, whose queries do not grow.
    if name == "mistral3" and "mistral3.attention.temperature_scale" not in metadata:
        return _MISTRAL
    return GGUF_FAMILIES[name]


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for the 9.999999747e-06 of the file."""
    return float(str(np.float32(value)))
