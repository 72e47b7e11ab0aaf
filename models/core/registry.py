"""Which architectures exist: one row a family (docs/new_model.md says how to add one)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folojax.models.core.family import Family

# By name, so that one family is not imported for another, and configs may ask what exists.
FAMILIES = {
    # SmolLM, SmolLM2 and TinyLlama call themselves Llama too.
    "LlamaForCausalLM": "folojax.models.core.family:LLAMA",
    "MistralForCausalLM": "folojax.models.families.mistral:MISTRAL",
    "MixtralForCausalLM": "folojax.models.families.mistral:MIXTRAL",
    "Qwen2ForCausalLM": "folojax.models.families.qwen:QWEN2",
    "Qwen3ForCausalLM": "folojax.models.families.qwen:QWEN3",
    "Qwen3MoeForCausalLM": "folojax.models.families.qwen:QWEN3_MOE",
    "Gemma2ForCausalLM": "folojax.models.families.gemma:GEMMA2",
    "Gemma3ForCausalLM": "folojax.models.families.gemma:GEMMA3",
    "Phi3ForCausalLM": "folojax.models.families.phi3:PHI3",
    "Olmo2ForCausalLM": "folojax.models.families.olmo2:OLMO2",
    "Olmo3ForCausalLM": "folojax.models.families.olmo3:OLMO3",
    "SmolLM3ForCausalLM": "folojax.models.families.smollm3:SMOLLM3",
    "GPT2LMHeadModel": "folojax.models.families.gpt2:GPT2",
    "GraniteForCausalLM": "folojax.models.families.granite:GRANITE",
}


MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "granite": "GraniteForCausalLM",
}
"""What transformers goes by, `model_type`, and the architecture that it means."""


def family_of(architectures: Any) -> tuple[str, Family]:
    """Finds the row for the `architectures` entry of a config.json.

    Returns:
        The architecture's name and its family.

    Raises:
        ValueError: the entry is no list of names, or none of them is in the registry.
    """
    names = architectures if isinstance(architectures, list | tuple) else [architectures]
    for name in names:
        if isinstance(name, str) and name in FAMILIES:
            module, attribute = FAMILIES[name].split(":")
            return name, getattr(importlib.import_module(module), attribute)
    raise ValueError(
        f"architectures {architectures!r} is not supported; supported: {', '.join(FAMILIES)}"
    )
