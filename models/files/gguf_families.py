"""The architectures of GGUF files that are read, and what the metadata of each says."""

from collections.abc import Collection
from typing import Any

from folojax.models.files import gguf_experts as experts
from folojax.models.files import gguf_gemma as gemma
from folojax.models.files import gguf_states as states
from folojax.models.files.gguf_family import (
    FULL,
    GgufFamily,
    Metadata,
    Read,
    experts_alone,
    kinds_of,
    local_layers,
    num_layers,
    window,
)


def _command(read: Read) -> dict[str, Any]:
    return {
        "layer_norm_eps": read("attention.layer_norm_epsilon"),
        "logit_scale": read("logit_scale"),
    }


def _command2(read: Read) -> dict[str, Any]:
    """Every fourth layer is without a window, which few files say."""
    return _command(read) | {
        "sliding_window": read("attention.sliding_window"),
        "layer_types": kinds_of(local_layers(read, 4)),
    }


def _ministral3(read: Read) -> dict[str, Any]:
    """Its two factors of attention never differed, and the file has one."""
    factor = read("rope.scaling.yarn_log_multiplier", 1.0)
    further = {
        "mscale": factor,
        "mscale_all_dim": factor,
        "llama_4_scaling_beta": read("attention.temperature_scale"),
    }
    return window(read) | {"further_rope": further}


def _exaone4(read: Read) -> dict[str, Any]:
    """Without a window all layers are alike; else every fourth has none, or those that it says."""
    size = window(read)
    has_one = size["sliding_window"] is not None
    kinds = kinds_of(local_layers(read, 4)) if has_one else [FULL] * num_layers(read)
    return size | {"layer_types": kinds}


def _squared(read: Read) -> dict[str, Any]:
    return {"hidden_act": "relu2"}


def _nemotron(read: Read) -> dict[str, Any]:
    return _squared(read) | {"norm_eps": read("attention.layer_norm_epsilon")}


def _gpt2(read: Read) -> dict[str, Any]:
    return {"hidden_act": "gelu_new", "layer_norm_epsilon": read("attention.layer_norm_epsilon")}


def _glm4(read: Read) -> dict[str, Any]:
    """Of those that read pictures, rows of queries and keys are in another order."""
    if read("rope.dimension_sections", None) is not None:
        raise ValueError(
            "glm4 with rope.dimension_sections (GLM-4V) is not supported: use a model of a family "
            "that docs/gguf.md lists"
        )
    return {}


def _olmo3(read: Read) -> dict[str, Any]:
    """Every fourth layer is without a window, or as the file says; only its rates are scaled."""
    kinds, base = kinds_of(local_layers(read, 4)), read("rope.freq_base")
    local = read("rope.freq_base_swa", base)
    return window(read) | {"layer_types": kinds, "rope_local_base_freq": local}


_CONV_BIAS = {"conv_bias": "shortconv.conv.bias"}
_SPACE_BIAS = {"mamba_conv_bias": "ssm_conv1d.bias"}
_NEMOTRON_H = {"use_conv_bias": "ssm_conv1d.bias"}

GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("LlamaForCausalLM", is_permuted=True),
    "qwen2": GgufFamily("Qwen2ForCausalLM"),
    "qwen3": GgufFamily("Qwen3ForCausalLM"),
    "qwen3moe": GgufFamily("Qwen3MoeForCausalLM", experts.qwen3_moe),
    "gemma": GgufFamily(
        "GemmaForCausalLM", lambda read: {"hidden_act": "gelu_pytorch_tanh"}, norm_offset=1.0
    ),
    "gemma2": GgufFamily("Gemma2ForCausalLM", gemma.gemma2, norm_offset=1.0),
    "gemma3": GgufFamily("Gemma3ForCausalLM", gemma.gemma3, norm_offset=1.0),
    "gemma3n": GgufFamily("Gemma3nForCausalLM", gemma.gemma3n),
    "phi3": GgufFamily("Phi3ForCausalLM", window),
    "seed_oss": GgufFamily("SeedOssForCausalLM"),
    "ernie4_5": GgufFamily("Ernie4_5ForCausalLM"),
    "arcee": GgufFamily("ArceeForCausalLM", _squared, is_permuted=True),
    "nemotron": GgufFamily("NemotronForCausalLM", _nemotron, norm_offset=1.0),
    "olmoe": GgufFamily("OlmoeForCausalLM", experts_alone),
    # The rates of the file are stretched already.
    "hunyuan-dense": GgufFamily("HunYuanDenseV1ForCausalLM"),
    "granite": GgufFamily("GraniteForCausalLM", states.granite, is_permuted=True),
    "smollm3": GgufFamily("SmolLM3ForCausalLM", is_permuted=True),
    "olmo2": GgufFamily("Olmo2ForCausalLM"),
    "glm4": GgufFamily("Glm4ForCausalLM", _glm4),
    "gpt2": GgufFamily("GPT2LMHeadModel", _gpt2, is_conv1d=True),
    "lfm2": GgufFamily("Lfm2ForCausalLM", states.lfm2, _CONV_BIAS),
    "lfm2moe": GgufFamily("Lfm2MoeForCausalLM", states.lfm2_moe, _CONV_BIAS),
    "falcon-h1": GgufFamily(
        "FalconH1ForCausalLM",
        states.falcon_h1,
        {"mamba_conv_bias": "ssm_conv1d.bias", "mamba_rms_norm": "ssm_norm.weight"},
    ),
    "command-r": GgufFamily("CohereForCausalLM", _command, {"use_qk_norm": "attn_q_norm.weight"}),
    "cohere2": GgufFamily("Cohere2ForCausalLM", _command2),
    "granitemoe": GgufFamily("GraniteMoeSharedForCausalLM", states.granite_moe, is_permuted=True),
    "granitehybrid": GgufFamily(
        "GraniteMoeHybridForCausalLM",
        states.granite_hybrid,
        _SPACE_BIAS,
        is_permuted=True,
    ),
    "qwen2moe": GgufFamily("Qwen2MoeForCausalLM", experts.qwen2_moe),
    "ernie4_5-moe": GgufFamily("Ernie4_5_MoeForCausalLM", experts.ernie_moe),
    "glm4moe": GgufFamily(
        "Glm4MoeForCausalLM", experts.routed, {"use_qk_norm": "attn_q_norm.weight"}
    ),
    "dots1": GgufFamily("Dots1ForCausalLM", experts.routed),
    "minimax-m2": GgufFamily("MiniMaxM2ForCausalLM", experts.minimax),
    "gpt-oss": GgufFamily("GptOssForCausalLM", experts.gpt_oss),
    "mistral3": GgufFamily("Ministral3ForCausalLM", _ministral3, is_permuted=True),
    "exaone4": GgufFamily("Exaone4ForCausalLM", _exaone4),
    "apertus": GgufFamily("ApertusForCausalLM", lambda read: {"hidden_act": "xielu"}),
    "qwen2vl": GgufFamily("Qwen2ForCausalLM"),
    "qwen3vl": GgufFamily("Qwen3ForCausalLM"),
    "qwen3vlmoe": GgufFamily("Qwen3MoeForCausalLM", experts.qwen3_moe),
    "qwen3next": GgufFamily("Qwen3NextForCausalLM", states.qwen35_moe, norm_offset=1.0),
    "qwen35": GgufFamily("Qwen3_5ForCausalLM", states.qwen35, norm_offset=1.0),
    "qwen35moe": GgufFamily("Qwen3_5MoeForCausalLM", states.qwen35_moe, norm_offset=1.0),
    "gemma4": GgufFamily(
        "Gemma4ForCausalLM", gemma.gemma4, by_lack={"attention_k_eq_v": ("attn_k", "attn_v")}
    ),
    "deepseek2": GgufFamily("DeepseekV3ForCausalLM", experts.deepseek2),
    "mistral4": GgufFamily("Mistral4ForCausalLM", experts.mistral4),
    "llama4": GgufFamily("Llama4ForCausalLM", experts.llama4),
    "nemotron_h": GgufFamily(
        "NemotronHForCausalLM", states.nemotron_h, _NEMOTRON_H, is_permuted=True
    ),
    "nemotron_h_moe": GgufFamily(
        "NemotronHForCausalLM", states.nemotron_h_moe, _NEMOTRON_H, is_permuted=True
    ),
    "chatglm": GgufFamily("GlmForCausalLM"),
}
"""By `general.architecture`."""

# Mistral and Mixtral call themselves llama in GGUF, and others like those that they came from.
_MISTRAL = GgufFamily("MistralForCausalLM", window, is_permuted=True)
_MIXTRAL = GgufFamily("MixtralForCausalLM", experts.mixtral, is_permuted=True)
_OLMO3 = GgufFamily("Olmo3ForCausalLM", _olmo3)
_BAMBA = GgufFamily("BambaForCausalLM", states.bamba, _SPACE_BIAS, is_permuted=True)
_DEEPSEEK_V2 = GgufFamily("DeepseekV2ForCausalLM", experts.deepseek_v2)


def gguf_family(metadata: Metadata, names: Collection[str] = ()) -> GgufFamily:
    """The row for a file whose tensors have these names.

    Raises:
        ValueError: its architecture is not supported.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        raise ValueError(
            f"GGUF architecture {name!r} is not supported; supported: "
            + ", ".join(map(repr, GGUF_FAMILIES))
            + ". Use the model's safetensors version, if its family is one that is read so"
        )
    if name == "llama" and metadata.get("llama.expert_count", 0):
        return _MIXTRAL
    if name == "llama" and metadata.get("llama.attention.sliding_window", 0):
        return _MISTRAL
    # Mistral Small 3.1 and 3.2, whose queries do not grow.
    if name == "mistral3" and "mistral3.attention.temperature_scale" not in metadata:
        return _MISTRAL
    if name == "olmo2" and metadata.get("olmo2.attention.sliding_window", 0):
        return _OLMO3
    if name == "granitehybrid" and "granitehybrid.embedding_scale" not in metadata:
        return _BAMBA
    # Routers of V3 and all that came after it are corrected.
    if name == "deepseek2" and not any(one.endswith("exp_probs_b.bias") for one in names):
        return _DEEPSEEK_V2
    return GGUF_FAMILIES[name]
