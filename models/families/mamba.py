"""Hybrids of attention and the state space of Mamba-2: Bamba, Granite 4, Nemotron-H."""

from collections.abc import Mapping, Sequence
from typing import Any

from folojax.models.core.recurrent import Recurrent
from folojax.models.families.experts import SIGMOID_KEYS
from folojax.models.families.family import BLOCK_NAMES, HEAD_NAMES, Family, renamed

RECURRENT, _FULL = "linear_attention", "full_attention"
_KINDS = {"mamba": RECURRENT, "attention": _FULL}
"""What files of before transformers 5 call the kinds of layers."""


def plain_kinds(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json whose `layer_types` are those of transformers 5."""
    words = renamed(mapping, {"layers_block_type": "layer_types"})
    kinds = words.get("layer_types")
    return words if not kinds else words | {"layer_types": [_KINDS.get(i, i) for i in kinds]}


def state_space(
    mapping: Mapping[str, Any], layers: Sequence[int], inner: int | None = None, **further: Any
) -> dict[str, Any]:
    """Fields of a model some of whose layers have a state space, by Bamba's words for its sizes.

    Args:
        mapping: A config.json.
        layers: Which they are.
        inner: Width of all heads; None: it follows from the others.
        further: Fields of `Recurrent`.
    """
    if not layers:
        return {}
    heads, width = mapping["mamba_n_heads"], mapping["mamba_d_head"]
    inner = mapping["mamba_expand"] * mapping["hidden_size"] if inner is None else inner
    if width == "auto":
        width = inner // heads
    if heads * width != inner:
        raise ValueError(f"mamba_n_heads {heads} times mamba_d_head {width} is not {inner}")
    limits = [_number(one) for one in mapping["time_step_limit"]]
    sizes = Recurrent(
        kind="space",
        layers=tuple(layers),
        num_key_heads=mapping["mamba_n_groups"],
        num_value_heads=heads,
        key_dim=mapping["mamba_d_state"],
        value_dim=width,
        conv_width=mapping["mamba_d_conv"],
        has_conv_bias=bool(mapping["mamba_conv_bias"]),
        has_bias=bool(mapping["mamba_proj_bias"]),
        step_limits=(limits[0], limits[1]),
        **further,
    )
    return {"recurrent": sizes}


def _number(stated: Any) -> float:
    """One that JSON may not have."""
    return float(stated["__float__"] if isinstance(stated, Mapping) else stated)


def spaces_by_type(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the layers that `layer_types` names; all, if there is none."""
    layers, kinds = range(mapping["num_hidden_layers"]), mapping.get("layer_types")
    return state_space(mapping, [i for i in layers if not kinds or kinds[i] == RECURRENT])


SPACE_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": (0.0, float("inf")),
}


def space_names(module: str) -> dict[str, tuple[str, ...]]:
    """Tensors of a state space, which its layer calls so."""
    words = {
        "in_proj": "in_proj.weight",
        "conv": "conv1d.weight",
        "a_log": "A_log",
        "dt_bias": "dt_bias",
        "state_skip": "D",
        "state_norm": "norm.weight",
        "out_proj": "out_proj.weight",
    }
    return {name: (f"{module}.{word}",) for name, word in words.items()}


def _bamba(mapping: Mapping[str, Any]) -> dict[str, Any]:
    layers, full = range(mapping["num_hidden_layers"]), mapping.get("attn_layer_indices") or ()
    return state_space(mapping, [layer for layer in layers if layer not in full])


BAMBA = Family(
    model_type="bamba",
    defaults={
        **SPACE_DEFAULTS,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262_144,
        "partial_rotary_factor": 0.5,
    },
    derive=_bamba,
    recurrent_type=RECURRENT,
    has_partial_rotary=True,
    head_names={**HEAD_NAMES, "final_norm": ("model.final_layernorm.weight",)},
    block_names={
        **BLOCK_NAMES,
        **space_names("mamba"),
        "mlp_norm": ("pre_ff_layernorm.weight",),
        "gate_up": ("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight"),
        "down": ("feed_forward.down_proj.weight",),
    },
)

_LETTERS = {"M": RECURRENT, "E": "moe", "*": _FULL, "-": "mlp"}
_NEMOTRON_WORDS = {
    "layer_norm_epsilon": "rms_norm_eps",
    "mlp_hidden_act": "hidden_act",
    "num_local_experts": "n_routed_experts",
    "layer_types": "layers_block_type",
    "mamba_num_heads": "mamba_n_heads",
    "mamba_head_dim": "mamba_d_head",
    "ssm_state_size": "mamba_d_state",
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "use_conv_bias": "mamba_conv_bias",
    "use_bias": "mamba_proj_bias",
}


def _nemotron_words(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Kinds of layers are a list, of the letters of older files too, and say how many there are."""
    words = renamed(mapping, _NEMOTRON_WORDS)
    letters = words.get("hybrid_override_pattern")
    stated = words.pop("layers_block_type", None)
    if stated is None and letters:
        stated = [_LETTERS.get(letter, letter) for letter in letters]
    kinds = [_KINDS.get(kind, kind) for kind in stated or (RECURRENT, "moe", _FULL, "mlp")]
    unknown = sorted(set(kinds) - set(_LETTERS.values()))
    if unknown:
        known = ", ".join(_LETTERS.values())
        raise ValueError(f"layers_block_type has {', '.join(unknown)}; supported are {known}")
    return words | {"parts": kinds, "num_hidden_layers": len(kinds)}


def _nemotron(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Every layer is one part of a layer of others: attention, a state space, an MLP or experts."""
    kinds = mapping["parts"]
    found = {kind: [i for i, one in enumerate(kinds) if one == kind] for kind in _LETTERS.values()}
    spaces = found[RECURRENT]
    sizes = {**mapping, "time_step_limit": (mapping["time_step_min"], float("inf"))}
    inner = mapping["mamba_n_heads"] * mapping["mamba_d_head"]
    fields = {
        **state_space(sizes, spaces, inner),
        "ropeless_layers": tuple(range(len(kinds))),
        "mixerless_layers": tuple(sorted((*found["mlp"], *found["moe"]))),
        "mlpless_layers": tuple(sorted((*spaces, *found[_FULL]))),
    }
    if found["moe"]:
        fields |= {ours: mapping[theirs] for theirs, ours in SIGMOID_KEYS.items()}
        fields |= {
            "router": "sigmoid",
            "dense_layers": tuple(i for i in range(len(kinds)) if kinds[i] != "moe"),
            "shared_expert_size": mapping["moe_shared_expert_intermediate_size"],
            "expert_latent": mapping.get("moe_latent_size") or 0,
        }
    return fields


NEMOTRON_H = Family(
    model_type="nemotron_h",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "mamba_n_heads": 128,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 8,
        "mamba_d_conv": 4,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_min": 0.001,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    normalize=_nemotron_words,
    fixed={"norm": "rms_wide", "is_gated": False, "qkv_bias": False, "o_bias": False},
    derive=_nemotron,
    head_names={
        **HEAD_NAMES,
        "embed": ("backbone.embeddings.weight",),
        "final_norm": ("backbone.norm_f.weight",),
    },
    block_names={
        **space_names("mixer"),
        "attn_norm": ("norm.weight",),
        "mlp_norm": ("norm.weight",),
        "qkv": ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight"),
        "o": ("mixer.o_proj.weight",),
        "up": ("mixer.up_proj.weight",),
        "down": ("mixer.down_proj.weight",),
        "router": ("mixer.gate.weight",),
        "router_correction": ("mixer.gate.e_score_correction_bias",),
        "experts_in": ("mixer.fc1_latent_proj.weight",),
        "experts_out": ("mixer.fc2_latent_proj.weight",),
        "experts_up": ("mixer.experts.{}.up_proj.weight",),
        "experts_down": ("mixer.experts.{}.down_proj.weight",),
        "shared_up": ("mixer.shared_experts.up_proj.weight",),
        "shared_down": ("mixer.shared_experts.down_proj.weight",),
    },
    block_prefix="backbone.layers.{}.",
    other_prefix="model.",
    ignorable=r"mtp\..*",  # layers that guess a second token
)
