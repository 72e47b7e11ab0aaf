"""What the metadata of a GGUF file says, in the words of a Hugging Face `config.json`.

Keys of the metadata begin with the architecture's name: here they are asked for without it.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from folojax.models.core.rope import plain_rates, read_scaling
from folojax.models.families.families import FAMILIES
from folojax.models.files.gguf_tokenizer import CONTROL

_FULL, _LOCAL = "full_attention", "sliding_attention"

Metadata = Mapping[str, Any]
Read = Callable[..., Any]
Tables = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """How one GGUF architecture is read."""

    architecture: str  # of the Hugging Face config
    extra: Callable[[Read], dict[str, Any]] = lambda read: {}
    """Further entries of its config; `read(key, default)` gives metadata, and counts a key without
    a default as missing."""
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
    shares = [_shortest(normal.cdf(one)) for one in read("activation_sparsity_scale", ())]
    is_local = read("attention.sliding_window_pattern", None)
    kinds = is_local and [_LOCAL if one else _FULL for one in is_local]
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


def _olmo2(read: Read) -> dict[str, Any]:
    """OLMo 3 calls itself so too, and says nothing of the rates of its layers with a window."""
    if read("attention.sliding_window", None):
        raise ValueError("olmo2 with a sliding window: use the model's safetensors version")
    return {}


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
}
"""By `general.architecture`."""

# Of Llama 3, ChatML (Qwen, SmolLM), Phi and Gemma.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")

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
    return GGUF_FAMILIES[name]


def hf_config(
    metadata: Metadata, family: GgufFamily, tables: Tables, is_tied: bool, has_bias: bool = False
) -> dict[str, Any]:
    """The config.json that says what the metadata of a GGUF file of a family says.

    `tables` are its tensors that hold rotary factors; without an output projection it is tied, and
    `has_bias` says whether queries have one.

    Raises:
        ValueError: a key is missing, or a rotary scaling is not supported.
    """
    prefix = metadata["general.architecture"]
    missing: list[str] = []

    def read(key: str, *default: Any) -> Any:
        full = f"{prefix}.{key}"
        if full not in metadata and not default:
            missing.append(full)
            return 1
        value = metadata.get(full, *default)
        return _shortest(value) if isinstance(value, float) else value

    described = FAMILIES[family.architecture]
    config = {
        "hidden_size": read("embedding_length"),
        "intermediate_size": read("feed_forward_length"),
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": read("attention.head_count"),
        "max_position_embeddings": read("context_length"),
        **family.extra(read),
    }
    if not str(described.fixed.get("norm")).startswith("layer"):
        config["rms_norm_eps"] = read("attention.layer_norm_rms_epsilon")
    tokens: Any = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        missing.append("tokenizer.ggml.tokens")
    if missing:
        raise ValueError(f"the metadata lacks {', '.join(missing)}")
    if config.get("vocab_size_per_layer_input", 0) is None:
        config["vocab_size_per_layer_input"] = len(tokens)
    num_heads = config["num_attention_heads"]
    eos = _ends(metadata)
    head_dim = read("attention.key_length", config["hidden_size"] // num_heads)
    if not described.fixed.get("has_learned_positions"):
        config["rope_parameters"] = _rope(read, tables, head_dim)
    local = config.pop("rope_local_base_freq", None)
    if local is not None:
        config["rope_parameters"] = {
            _FULL: config["rope_parameters"],
            _LOCAL: {"rope_type": "default", "rope_theta": local},
        }
    defaults = {
        "architectures": [family.architecture],
        "model_type": described.model_type,
        "vocab_size": len(tokens),
        "num_key_value_heads": read("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": has_bias,
        "tie_word_embeddings": is_tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }
    return defaults | config


def _ends(metadata: Metadata) -> list[int]:
    """The tokens that end a text, a turn or a message.

    Files of before `eot_token_id` existed name the end of a text only, and have the end of a turn
    among their control tokens.
    """
    stated = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    known = [
        index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == CONTROL and token in _TURN_ENDS
    ]
    return list(dict.fromkeys([token for token in stated if token is not None] + known))


def _rope(read: Read, tables: Tables, head_dim: int) -> dict[str, Any]:
    """Rotary settings in the words of transformers 5."""
    rope: dict[str, Any] = {"rope_theta": read("rope.freq_base", 10_000.0)}
    turning = read("rope.dimension_count", head_dim)
    if turning != head_dim:
        rope["partial_rotary_factor"] = turning / head_dim
    if "rope_freqs.weight" in tables:
        return rope | _llama3(tables["rope_freqs.weight"], rope["rope_theta"])
    original = read("rope.scaling.original_context_length", None)
    stated = {} if original is None else {"original_max_position_embeddings": original}
    if "rope_factors_short.weight" in tables:
        rope["short_factor"] = list(map(_shortest, tables["rope_factors_short.weight"].tolist()))
        attention_factor = read("rope.scaling.attn_factor", None)
        if attention_factor is not None:
            stated["attention_factor"] = attention_factor
        return rope | stated | {"rope_type": "longrope"}
    kind, factor = read("rope.scaling.type", "none"), read("rope.scaling.factor", 1.0)
    match kind:
        case "none":
            return rope | {"rope_type": "default"}
        case "linear":
            return rope | {"rope_type": "linear", "factor": factor}
        case "yarn":
            return rope | stated | {"rope_type": "yarn", "factor": factor}
    raise ValueError(f"rope scaling {kind!r} is not supported; supported: 'none', 'linear', 'yarn'")


def _llama3(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, which the file has only as what every rate becomes.

    The factor is that of the slowest rate; the other settings never differed.
    """
    rope = {
        "rope_type": "llama3",
        "factor": _shortest(float(factors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    size = 2 * len(factors)
    scaling = read_scaling(rope, size, theta, 8192)
    assert scaling is not None
    if not np.allclose(plain_rates(size, theta) / scaling.rates, factors, rtol=1e-3):
        raise ValueError(
            "rope_freqs.weight is not the rotary scaling of Llama 3: use the model's safetensors "
            "version"
        )
    return rope


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for the 9.999999747e-06 of the file."""
    return float(str(np.float32(value)))
