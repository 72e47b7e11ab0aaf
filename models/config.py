"""What a decoder looks like: the numbers of a `config.json`, checked and hashable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from folojax.models.registry import FAMILIES, Family, family_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Rotary frequencies divided by one factor (position interpolation)."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Rotary frequencies as Llama 3.1 scales them: low ones divided, high ones kept.

    Source: `_compute_llama3_parameters` in transformers' modeling_rope_utils.py.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearRope | Llama3Rope

_ROPE_SCALINGS: dict[str, type[LinearRope] | type[Llama3Rope]] = {
    "linear": LinearRope,
    "llama3": Llama3Rope,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one model; hashable, so it is static under `jax.jit`.

    Raises:
        ValueError: a number is out of range, or two of them cannot go together; all are listed.
    """

    architecture: str = "LlamaForCausalLM"
    """Row of the registry that builds the module."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """Longest sequence the model was made for, in tokens (`max_position_embeddings`)."""
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_embeddings: bool
    """The output projection is the embedding; no `lm_head` exists."""
    qkv_bias: bool
    qk_norm: bool
    """Queries and keys pass an RMS norm over head_dim before the rotary embedding."""

    def __post_init__(self) -> None:
        positive = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        )
        problems = []
        if self.architecture not in FAMILIES:
            problems.append(f"architecture is {self.architecture!r}, not one of {list(FAMILIES)}")
        for name in positive:
            value = getattr(self, name)
            # bool is an int to Python, but `num_layers: true` in a config is a mistake.
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{name} is {value!r}; it must be an integer of at least 1")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                problems.append(f"{name} is {value!r}; it must be a number above 0")
        if not problems and self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_heads is {self.num_heads}, not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if not problems and self.head_dim % 2:
            problems.append(f"head_dim is {self.head_dim}; rotary embeddings need it even")
        if problems:
            raise ValueError("model config: " + "; ".join(problems))


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def config_from_hf(mapping: Mapping[str, Any]) -> ModelConfig:
    """Reads the dict of a Hugging Face `config.json`.

    Both spellings of the rotary settings are read: `rope_parameters` (transformers 5) and
    `rope_theta` with `rope_scaling` (older files).

    Raises:
        ValueError: the architecture is not in the registry, a key is missing, or the model uses a
            feature that is not implemented; every such feature is named.
    """
    architecture, family = family_of(mapping.get("architectures"))
    missing = [key for key in _REQUIRED if mapping.get(key) is None]
    if missing:
        raise ValueError(f"config.json of {architecture} lacks {', '.join(missing)}")
    unsupported = _unsupported_features(mapping)
    if unsupported:
        raise ValueError(f"{architecture} with {'; '.join(unsupported)}")
    rope_theta, rope_scaling = _rope_from_hf(mapping)
    num_heads = mapping["num_attention_heads"]
    num_kv_heads = mapping.get("num_key_value_heads")
    return ModelConfig(
        architecture=architecture,
        vocab_size=mapping["vocab_size"],
        hidden_size=mapping["hidden_size"],
        intermediate_size=mapping["intermediate_size"],
        num_layers=mapping["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=_head_dim(mapping, family),
        max_position=mapping["max_position_embeddings"],
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=mapping["rms_norm_eps"],
        # transformers writes the key unless it is False.
        tie_embeddings=bool(mapping.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )


def _head_dim(mapping: Mapping[str, Any], family: Family) -> int:
    """The stated head_dim, else the family's own default, else hidden size over heads."""
    stated = mapping.get("head_dim") or family.default_head_dim
    if stated is not None:
        return stated
    hidden_size, num_heads = mapping["hidden_size"], mapping["num_attention_heads"]
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, "
            "and config.json states no head_dim"
        )
    return hidden_size // num_heads


def _unsupported_features(mapping: Mapping[str, Any]) -> list[str]:
    """What the config switches on that the decoder does not have, in words."""
    found = []
    activation = mapping.get("hidden_act", "silu")
    if activation != "silu":
        found.append(f"hidden_act {activation!r}: only 'silu' is supported")
    if mapping.get("mlp_bias"):
        found.append("mlp_bias true: only MLPs without bias are supported")
    if mapping.get("attention_bias"):
        # In Llama and Qwen3 the flag also puts a bias on the output projection.
        found.append("attention_bias true: an output projection with bias is not supported")
    if mapping.get("rope_interleaved"):
        found.append("rope_interleaved true: only the half-rotation layout is supported")
    layer_types = set(mapping.get("layer_types") or ()) - {"full_attention"}
    if layer_types:
        found.append(f"layer_types {sorted(layer_types)}: only 'full_attention' is supported")
    elif mapping.get("use_sliding_window") and mapping.get("sliding_window") is not None:
        found.append(
            f"sliding_window {mapping['sliding_window']}: only full attention is supported"
        )
    quantization = mapping.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", quantization)
        found.append(
            f"quantization_config ({method}): only unquantised safetensors and GGUF are supported"
        )
    return found


def _rope_from_hf(mapping: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns (theta, scaling) from either generation of config."""
    rope = dict(mapping.get("rope_scaling") or {}) | dict(mapping.get("rope_parameters") or {})
    theta = rope.get("rope_theta") or mapping.get("rope_theta") or 10_000.0
    partial = rope.get("partial_rotary_factor") or mapping.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor {partial}: only 1.0 is supported")
    # Files of 2023 spell the key "type".
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind not in _ROPE_SCALINGS:
        supported = ", ".join(["default", *_ROPE_SCALINGS])
        raise ValueError(f"rope type {kind!r} is not supported; supported: {supported}")
    scaling = _ROPE_SCALINGS[kind]
    names = [field.name for field in dataclasses.fields(scaling)]
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)} beside it")
    return float(theta), scaling(**{name: rope[name] for name in names})
