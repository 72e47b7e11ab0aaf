"""Mistral, Ministral and Ministral 3, which scales queries by their position."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import Family

MISTRAL = Family(
    model_type="mistral",
    defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    is_local=lambda mapping, layer: True,
)

MINISTRAL = dataclasses.replace(MISTRAL, model_type="ministral", has_layer_types=True)


def query_growth(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """By the position; of Mistral 4, too."""
    rope = mapping["rope_parameters"]
    keys = "llama_4_scaling_beta", "original_max_position_embeddings"
    if any(rope.get(key) is None for key in keys):
        raise ValueError(f"rope_parameters needs {' and '.join(keys)}")
    beta, original = (rope[key] for key in keys)
    return {"query_growth": float(beta), "query_growth_length": original}


MINISTRAL3 = dataclasses.replace(
    MISTRAL,
    model_type="ministral3",
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    derive=query_growth,
)
