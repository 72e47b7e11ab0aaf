"""SmolLM3: Llama, with some layers that have no rotary embedding (NoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from folojax.models.core.family import Family, windows


def _fields(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """`no_rope_layers` says 1 for a layer that has it: the name is misleading."""
    layers = range(mapping["num_hidden_layers"])
    has_rope = mapping.get("no_rope_layers")
    if has_rope is None:
        interval = mapping["no_rope_layer_interval"]
        has_rope = [(layer + 1) % interval != 0 for layer in layers]
    ropeless = tuple(layer for layer in layers if not has_rope[layer])
    fields: dict[str, Any] = {"ropeless_layers": ropeless}
    if not mapping.get("use_sliding_window") or mapping.get("sliding_window") is None:
        fields["windows"] = ()
    elif not mapping.get("layer_types"):
        fields["windows"] = windows(mapping, lambda layer: layer in ropeless)
    return fields


SMOLLM3 = Family(
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
    },
    fields=_fields,
    has_layer_types=True,
)
