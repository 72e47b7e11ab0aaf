"""OLMo 3: OLMo 2 with a sliding window in three layers of four, whose rotary rates are unscaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from folojax.models.core.family import local_rope_theta, windows
from folojax.models.families.olmo2 import OLMO2

_ROPE_THETA = 500_000.0


def _fields(mapping: Mapping[str, Any]) -> dict[str, Any]:
    # Files of before transformers 5 have the scaling, and no word of layers that go without.
    fields = OLMO2.fields(mapping) | {"local_rope_theta": local_rope_theta(mapping, _ROPE_THETA)}
    if not mapping.get("layer_types"):
        fields["windows"] = windows(mapping, lambda layer: (layer + 1) % 4 != 0)
    return fields


OLMO3 = dataclasses.replace(
    OLMO2,
    defaults={**OLMO2.defaults, "sliding_window": 4096, "rope_theta": _ROPE_THETA},
    fields=_fields,
    has_layer_types=True,
    has_rope_by_kind=True,
)
