"""Gemma 3n: several residual streams, a way by attention, gates that are mostly 0."""

import statistics
from collections.abc import Mapping
from typing import Any

from folojax.models.families.family import Family
from folojax.models.families.gemma4 import EMBEDDING_NAMES, GEMMA4, LAYER_NAMES, NORMS, kv_layers

_FULL, _LOCAL = "full_attention", "sliding_attention"


def _normalize(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Kinds of layers are spelt out; a list of the MLPs' sizes is told from one size."""
    words = {**mapping, "hidden_act": mapping.get("hidden_activation") or "gelu_pytorch_tanh"}
    count = mapping.get("num_hidden_layers") or 0
    words["layer_types"] = mapping.get("layer_types") or [
        _LOCAL if (layer + 1) % 5 else _FULL for layer in range(count)
    ]
    sizes = mapping.get("intermediate_size")
    if isinstance(sizes, list | tuple) and sizes:
        if len(sizes) != count:
            raise ValueError(f"intermediate_size has {len(sizes)} entries for {count} layers")
        words["intermediate_size"] = max(sizes)
        words["intermediate_sizes"] = tuple(sizes) if min(sizes) < max(sizes) else ()
    return words


def _cutoffs(mapping: Mapping[str, Any]) -> tuple[float | None, ...]:
    """By layer, above how many standard deviations the wanted share of gates lies."""
    count, shares = mapping["num_hidden_layers"], mapping["activation_sparsity_pattern"]
    if shares is None:
        shares = [0.95 if count > 10 and layer < 10 else 0.0 for layer in range(count)]
    if len(shares) != count or not all(0 <= share < 1 for share in shares):
        raise ValueError(
            f"activation_sparsity_pattern is {shares}; it must be {count} numbers from 0 up to 1"
        )
    normal = statistics.NormalDist()
    found = tuple(normal.inv_cdf(share) if share else None for share in shares)
    return found if any(share > 0 for share in shares) else ()


def _derive(mapping: Mapping[str, Any]) -> dict[str, Any]:
    if mapping["altup_active_idx"] != 0 or not mapping["altup_correct_scale"]:
        raise ValueError(
            "altup_active_idx other than 0 or altup_correct_scale false: not supported, as no "
            "published model has them"
        )
    return {
        "embed_scale": mapping["hidden_size"] ** 0.5,
        "kv_layers": kv_layers(mapping) if mapping["num_kv_shared_layers"] else (),
        "side_streams": mapping["altup_num_inputs"] - 1,
        "gate_cutoffs": _cutoffs(mapping),
        "intermediate_sizes": mapping["intermediate_sizes"],
    }


GEMMA3N = Family(
    model_type="gemma3n_text",
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "intermediate_size": 16_384,
        "intermediate_sizes": (),
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "final_logit_softcapping": 30.0,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "altup_num_inputs": 4,
        "num_kv_shared_layers": 15,
        "laurel_rank": 64,
        "activation_sparsity_pattern": None,
    },
    normalize=_normalize,
    fixed=NORMS,
    keys={
        "final_logit_softcapping": "logits_softcap",
        "hidden_size_per_layer_input": "layer_embed_size",
        "vocab_size_per_layer_input": "layer_embed_vocab",
        "laurel_rank": "bypass_rank",
    },
    derive=_derive,
    has_layer_types=True,
    has_rope_by_kind=True,
    head_names={
        **EMBEDDING_NAMES,
        "streams_in": ("model.altup_projections.{}.weight",),
        "streams_out": ("model.altup_unembed_projections.{}.weight",),
    },
    block_names={
        **LAYER_NAMES,
        "stream_router": ("altup.modality_router.weight",),
        "stream_router_norm": ("altup.router_norm.weight",),
        "stream_guess": ("altup.prediction_coefs.weight",),
        "stream_correct": ("altup.correction_coefs.weight",),
        "stream_scale": ("altup.correct_output_scale",),
        "bypass_down": ("laurel.linear_left.weight",),
        "bypass_up": ("laurel.linear_right.weight",),
        "bypass_norm": ("laurel.post_laurel_norm.weight",),
    },
    # Keys and values of layers that read those of others.
    ignorable=GEMMA4.ignorable,
)
