"""OLMo 2: norms behind attention and MLP instead of before, and joint norms of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from folojax.models.core.family import BLOCK_NAMES, POST_NORM_NAMES, Family


def _fields(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "norm": "rms_wide",
        "has_pre_norm": False,
        "has_post_norm": True,
        "qk_norm": True,
        "is_qk_norm_joint": True,
    }


OLMO2 = Family(
    defaults={"rms_norm_eps": 1e-5},
    fields=_fields,
    block_names={**BLOCK_NAMES, **POST_NORM_NAMES},
)
