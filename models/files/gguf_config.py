"""What the metadata of a GGUF file says, in the words of a Hugging Face `config.json`.

Keys of the metadata begin with the architecture's name: here they are asked for without it.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from folojax.models.core.rope import plain_rates, read_scaling
from folojax.models.families.families import FAMILIES
from folojax.models.files.gguf_family import (
    FULL,
    LOCAL,
    GgufFamily,
    Metadata,
    Read,
    num_layers,
    shortest,
)
from folojax.models.files.gguf_tokenizer import CONTROL

Tables = Mapping[str, np.ndarray]

_HARMONY_ENDS = {"<|return|>", "<|call|>"}
"""Of gpt-oss, in which `<|end|>` ends no more than a message."""

_TURN_ENDS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"),
    *("<|eot|>", "<|eom|>", "<turn|>"),
    *sorted(_HARMONY_ENDS),
)
"""Of Llama 3, ChatML (Qwen, SmolLM), Phi, Gemma, Llama 4, Gemma 4 and gpt-oss."""

_RAMP = ("beta_fast", "beta_slow")
_STILL = 1e20
"""A rate that is divided by more than it is none."""


def hf_config(
    metadata: Metadata, family: GgufFamily, tables: Tables, names: Collection[str]
) -> dict[str, Any]:
    """The config.json that says what a GGUF file of a family says.

    `tables` are its tensors that hold rotary factors, `names` are those of all others: without an
    output projection it is tied, and `GgufFamily.by_tensor` has more that they alone say.

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
        return shortest(value) if isinstance(value, float) else value

    described = FAMILIES[family.architecture]
    config = {
        "hidden_size": read("embedding_length"),
        "num_hidden_layers": num_layers(read),
        "num_attention_heads": read("attention.head_count"),
        "max_position_embeddings": read("context_length"),
        **family.extra(read),
    }
    if "intermediate_size" not in config:
        config["intermediate_size"] = read("feed_forward_length")
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
    head_dim = config.get("head_dim") or read(
        "attention.key_length", config["hidden_size"] // num_heads
    )
    of_rope = config.pop("rope_head_dim", head_dim)
    if not described.fixed.get("has_learned_positions") and "rope_parameters" not in config:
        config["rope_parameters"] = _rope(read, tables, of_rope)
    if "further_rope" in config:
        config["rope_parameters"] |= config.pop("further_rope")
    local = config.pop("rope_local_base_freq", None)
    if local is not None:
        config["rope_parameters"] = {
            FULL: config["rope_parameters"],
            LOCAL: {"rope_type": "default", "rope_theta": local},
        }
    roles = {name.split(".", 2)[-1] for name in names if name.startswith("blk.")}
    defaults = {
        "architectures": [family.architecture],
        "model_type": described.model_type,
        "vocab_size": len(tokens),
        "num_key_value_heads": read("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": bool(roles & {"attn_q.bias", "attn_qkv.bias"}),
        **{key: role in roles for key, role in family.by_tensor.items()},
        **{key: _lacks(names, *pair) for key, pair in family.by_lack.items()},
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }
    return defaults | config


def _lacks(names: Collection[str], one: str, other: str) -> bool:
    """Whether some layer has a weight and not another."""
    suffix = f".{one}.weight"
    layers = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    return any(f"{layer}.{other}.weight" not in names for layer in layers)


def _ends(metadata: Metadata) -> list[int]:
    """The tokens that end a text, a turn or a message.

    Files of before `eot_token_id` existed name the end of a text only, and have the end of a turn
    among their control tokens.
    """
    stated = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    known = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == CONTROL and token in _TURN_ENDS
    }
    if known.keys() >= _HARMONY_ENDS:
        known.pop("<|end|>", None)
    return list(dict.fromkeys([token for token in stated if token is not None] + [*known.values()]))


def _rope(read: Read, tables: Tables, head_dim: int) -> dict[str, Any]:
    """Rotary settings in the words of transformers 5.

    Raises:
        ValueError: more turns than there is, or nothing, or the scaling is not supported.
    """
    rope: dict[str, Any] = {"rope_theta": read("rope.freq_base", 10_000.0)}
    turning = read("rope.dimension_count", head_dim)
    if turning != head_dim:
        if not 0 < turning < head_dim:
            raise ValueError(f"rope.dimension_count is {turning}; heads have {head_dim} dimensions")
        rope["partial_rotary_factor"] = turning / head_dim
    if "rope_freqs.weight" in tables:
        return rope | _by_table(tables["rope_freqs.weight"], rope["rope_theta"])
    original = read("rope.scaling.original_context_length", None)
    stated = {} if original is None else {"original_max_position_embeddings": original}
    if "rope_factors_short.weight" in tables:
        rope["short_factor"] = list(map(shortest, tables["rope_factors_short.weight"].tolist()))
        attention_factor = read("rope.scaling.attn_factor", None)
        if attention_factor is not None:
            stated["attention_factor"] = attention_factor
        return rope | stated | {"rope_type": "longrope"}
    # As llama.cpp has it, a factor alone is one of linear scaling; the oldest files call it so.
    kind = read("rope.scaling.type", "linear")
    factor = read("rope.scaling.factor", None) or read("rope.scale_linear", None) or 1.0
    match kind:
        case "linear" if factor != 1.0:
            return rope | {"rope_type": "linear", "factor": factor}
        case "none" | "linear":
            return rope | {"rope_type": "default"}
        case "yarn":
            return rope | stated | _yarn(read) | {"rope_type": "yarn", "factor": factor}
    raise ValueError(
        f"rope scaling {kind!r} is not supported; supported: 'none', 'linear', 'yarn'. Use the "
        "model's safetensors version"
    )


def _yarn(read: Read) -> dict[str, Any]:
    """What YaRN has beside its factor, as far as it is stated.

    The factor of attention is what config.json calls so: converters copy it under either name, of
    which llama.cpp takes the second for 1 where nobody states it.

    Raises:
        ValueError: rates are mixed otherwise than YaRN does.
    """
    ramp = read("rope.scaling.yarn_ext_factor", 1.0)
    if ramp not in (1.0, -1.0):  # the latter: what is usual
        raise ValueError(
            f"rope.scaling.yarn_ext_factor is {ramp}; only 1 is supported: use the model's "
            "safetensors version"
        )
    stated = {key: read(f"rope.scaling.yarn_{key}", None) for key in _RAMP}
    copied = read("rope.scaling.attn_factor", None)
    other = None if copied == 1.0 else copied
    stated["attention_factor"] = read("rope.scaling.yarn_attn_factor", other)
    return {key: value for key, value in stated.items() if value is not None}


def _by_table(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """What a table says that every rate is divided by.

    Of Gemma 4: some rates are kept, and the others are so small that nothing turns. Else it is the
    scaling of Llama 3.1 and later: the factor is that of the slowest rate, and the other settings
    never differed but for Llama 4, which has no ramp between what is kept and what is divided.
    """
    if factors.max() > _STILL:
        share = float((factors < _STILL).mean())
        return {"rope_type": "proportional", "partial_rotary_factor": share}
    size = 2 * len(factors)
    for fast in (4.0, 1.0):
        rope = {
            "rope_type": "llama3",
            "factor": shortest(float(factors.max())),
            "low_freq_factor": 1.0,
            "high_freq_factor": fast,
            "original_max_position_embeddings": 8192,
        }
        scaling = read_scaling(rope, size, theta, 8192)
        assert scaling is not None
        if np.allclose(plain_rates(size, theta) / scaling.rates, factors, rtol=1e-3):
            return rope
    raise ValueError(
        "rope_freqs.weight is not the rotary scaling of Llama 3, Llama 4 or Gemma 4: use the "
        "model's safetensors version"
    )
