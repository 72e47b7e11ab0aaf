"""Adapters as peft lays them out, and models of transformers with the same updates merged."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


@dataclasses.dataclass(frozen=True)
class Adapted:
    """An adapter on disk, and the model that it makes of its base."""

    directory: Path
    merged: Any  # of transformers


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of linear layers that may have updates here."""
    found = {
        name.rpartition(".")[2]
        for name, one in model.named_modules()
        if type(one).__name__ in ("Linear", "Conv1D") and ".experts" not in name
    }
    return sorted(found - {"lm_head", "gate"})


def save_adapter(
    model: Any,
    directory: Path,
    *,
    seed: int,
    rank: int = 4,
    alpha: float = 8,
    targets: Sequence[str] | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    use_rslora: bool = False,
    size: float = 0.3,
) -> Adapted:
    """Writes a random adapter of a model.

    Args:
        model: Of transformers.
        directory: Where it goes.
        seed: Of its numbers.
        rank: As in peft's config, like the next.
        alpha: Of all modules.
        targets: Last parts of names; None: all that may have updates.
        rank_pattern: By the last part of a name.
        alpha_pattern: Likewise.
        use_rslora: Whether updates are divided by the root of the rank.
        size: Of the numbers.
    """
    import torch

    rng = np.random.default_rng(seed)
    merged, tensors = copy.deepcopy(model), dict[str, Any]()
    wanted = linear_names(model) if targets is None else targets
    for name, module in merged.named_modules():
        last = name.rpartition(".")[2]
        if last not in wanted or ".experts" in name or not hasattr(module, "weight"):
            continue
        is_in_out = type(module).__name__ == "Conv1D"
        kernel = module.weight.T if is_in_out else module.weight
        own_rank = (rank_pattern or {}).get(last, rank)
        own_alpha = (alpha_pattern or {}).get(last, alpha)
        scale = own_alpha / (math.sqrt(own_rank) if use_rslora else own_rank)
        a = rng.normal(0, size / math.sqrt(kernel.shape[1]), (own_rank, kernel.shape[1]))
        b = rng.normal(0, size, (kernel.shape[0], own_rank))
        a, b = a.astype(np.float32), b.astype(np.float32)
        prefix = f"base_model.model.{name}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        with torch.no_grad():
            update = torch.tensor(scale * (b @ a))
            module.weight += update.T if is_in_out else update
    assert tensors
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/model",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(wanted),
        "rank_pattern": rank_pattern or {},
        "alpha_pattern": alpha_pattern or {},
        "use_rslora": use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return Adapted(directory, merged)
