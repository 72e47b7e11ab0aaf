"""Granite 3: Llama with multipliers of embedding, scores, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from folojax.models.core.family import Family


def _fields(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "embed_scale": mapping["embedding_multiplier"],
        "attention_scale": mapping["attention_multiplier"],
        "residual_scale": mapping["residual_multiplier"],
        "logits_divisor": mapping["logits_scaling"],
    }


GRANITE = Family(
    defaults={
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    fields=_fields,
)
