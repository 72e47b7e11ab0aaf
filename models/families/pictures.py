"""Models that read pictures, as the text model in each: what is around it is left out.

The positions of tokens, of which some have one for each axis of a picture, are then those of text.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class _Text:
    architecture: str
    model_type: str
    is_tied: bool
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_QWEN2 = _Text("Qwen2ForCausalLM", "qwen2", False, {"rope_theta": 1e6})

_KIMI = {
    kind: _Text("DeepseekV3ForCausalLM", "deepseek_v3", False)
    for kind in ("kimi_k2", "deepseek_v3")
}

_PARTS = {
    "Gemma3ForConditionalGeneration": {
        "gemma3_text": _Text(
            "Gemma3ForCausalLM",
            "gemma3_text",
            True,
            {"vocab_size": 262_208, "num_attention_heads": 8},
        )
    },
    "Gemma3nForConditionalGeneration": {
        "gemma3n_text": _Text("Gemma3nForCausalLM", "gemma3n_text", True)
    },
    "Gemma4ForConditionalGeneration": {
        "gemma4_text": _Text("Gemma4ForCausalLM", "gemma4_text", True)
    },
    # Kimi K2.5, of which transformers writes the second name.
    "KimiK25ForConditionalGeneration": _KIMI,
    "Kimi_K25ForConditionalGeneration": _KIMI,
    "Llama4ForConditionalGeneration": {
        "llama4_text": _Text("Llama4ForCausalLM", "llama4_text", False)
    },
    "Mistral3ForConditionalGeneration": {
        "mistral": _Text("MistralForCausalLM", "mistral", True),
        "ministral3": _Text("Ministral3ForCausalLM", "ministral3", True),
        "mistral4": _Text("Mistral4ForCausalLM", "mistral4", True),
    },
    # The first files have the text model's settings beside those of the whole.
    "Qwen2VLForConditionalGeneration": {"qwen2_vl_text": _QWEN2, "qwen2_vl": _QWEN2},
    "Qwen2_5_VLForConditionalGeneration": {"qwen2_5_vl_text": _QWEN2, "qwen2_5_vl": _QWEN2},
    "Qwen3VLForConditionalGeneration": {
        "qwen3_vl_text": _Text("Qwen3ForCausalLM", "qwen3", False, {"rope_theta": 5e5})
    },
    "Qwen3_5ForConditionalGeneration": {
        "qwen3_5_text": _Text("Qwen3_5ForCausalLM", "qwen3_5_text", False)
    },
    "Qwen3_5MoeForConditionalGeneration": {
        "qwen3_5_moe_text": _Text("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", False)
    },
}

PICTURES = tuple(_PARTS)
"""Names in `architectures` of config.json."""

# What the whole says, and transformers reads of the whole.
_OF_THE_WHOLE = ("quantization_config", "dtype", "torch_dtype", "eos_token_id", "bos_token_id")

_PARTS_OF_THE_WHOLE = ("text_config", "vision_config", "audio_config")

_TOWERS = re.compile(
    r"(model\.)?"
    r"(visual|vision_tower|vision_model|multi_modal_projector|mm_projector|audio_tower|embed_vision|embed_audio)\."
)
_TEXT = re.compile(r"(model\.language_model\.(model\.)?|language_model\.model\.)")


def text_config(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the text model in the one of a model that reads pictures; of others, it.

    Raises:
        ValueError: the text model is of a kind that is not supported.
    """
    names = mapping.get("architectures")
    name = next((one for one in names if one in _PARTS), None) if isinstance(names, list) else None
    if name is None:
        return mapping
    inner = mapping.get("text_config") or mapping
    kinds = _PARTS[name]
    kind = inner.get("model_type") or next(iter(kinds))
    if kind not in kinds:
        raise ValueError(f"{name} with a text model {kind!r}; supported: {', '.join(kinds)}")
    text = kinds[kind]
    found = {**text.defaults, **inner}
    found |= {key: mapping[key] for key in _OF_THE_WHOLE if mapping.get(key) is not None}
    found |= {
        "architectures": [text.architecture],
        "model_type": text.model_type,
        "tie_word_embeddings": mapping.get("tie_word_embeddings", text.is_tied),
    }
    for key in ("rope_parameters", "rope_scaling"):
        if found.get(key):
            found[key] = _of_text(found[key])
    return {
        key: found[key]
        for key in found
        if key not in ("text_config", "vision_config", "audio_config")
    }


def _of_text(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings without those for pictures."""
    kept = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    for key in ("type", "rope_type"):
        if kept.get(key) == "mrope":
            kept[key] = "default"
    return kept


def text_name(name: str) -> str | None:
    """What the text model calls a tensor; None: it is of a part that is left out."""
    if _TOWERS.match(name):
        return None
    return _TEXT.sub("model.", name.replace("language_model.lm_head.", "lm_head."), count=1)
