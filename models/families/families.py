"""Every supported family, as what it differs in from Llama; docs/new_model.md says how to add one.

`normalize` and `derive` get the dict of a config.json; the latter with `defaults` filled in.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from folojax.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, MISTRAL4
from folojax.models.families.dense import APERTUS, ARCEE, CWM, ERNIE4_5, NEMOTRON, SEED_OSS
from folojax.models.families.experts import (
    DOTS1,
    ERNIE4_5_MOE,
    GLM4_MOE,
    MINIMAX_M2,
    OLMOE,
    QWEN2_MOE,
    dense_layers,
)
from folojax.models.families.falcon_h1 import FALCON_H1
from folojax.models.families.family import BLOCK_NAMES, POST_NORM_NAMES, Family, renamed
from folojax.models.families.gemma3n import GEMMA3N
from folojax.models.families.gemma4 import GEMMA4
from folojax.models.families.glm import GLM, GLM4
from folojax.models.families.gpt2 import GPT2
from folojax.models.families.gpt_oss import GPT_OSS
from folojax.models.families.granite import (
    GRANITE,
    GRANITE_HYBRID,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
)
from folojax.models.families.hunyuan import HUNYUAN
from folojax.models.families.lfm2 import LFM2, LFM2_MOE
from folojax.models.families.llama4 import LLAMA4
from folojax.models.families.mamba import BAMBA, NEMOTRON_H
from folojax.models.families.mistral import MINISTRAL, MINISTRAL3, MISTRAL
from folojax.models.families.pictures import PICTURES
from folojax.models.families.qwen_hybrid import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from folojax.models.families.ropeless import COHERE, COHERE2, EXAONE4, ropeless_layers

# SmolLM, SmolLM2 and TinyLlama call themselves Llama too.
_LLAMA = Family(model_type="llama")

_MIXTRAL = Family(
    model_type="mixtral",
    defaults={
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    keys={
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "intermediate_size": "expert_size",
    },
    is_local=lambda mapping, layer: True,
    block_names={
        **BLOCK_NAMES,
        "router": ("block_sparse_moe.gate.weight",),
        "experts_gate_up": (
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
        ),
        "experts_down": ("block_sparse_moe.experts.{}.w2.weight",),
    },
)

# Qwen 2 and 2.5.
_QWEN2 = Family(
    model_type="qwen2",
    defaults={"sliding_window": 4096, "max_window_layers": 28},
    fixed={"qkv_bias": True, "o_bias": False},
    is_local=lambda mapping, layer: layer >= mapping["max_window_layers"],
    has_window_switch=True,
    has_layer_types=True,
)

_QWEN3 = dataclasses.replace(
    _QWEN2,
    model_type="qwen3",
    defaults={**_QWEN2.defaults, "head_dim": 128},
    fixed={"qk_norm": True},
)


_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    defaults={
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    # Transformers 5 writes another word for the number of experts than it reads.
    normalize=lambda mapping: renamed(mapping, {"num_local_experts": "num_experts"}),
    fixed={"qk_norm": True},
    keys={
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "moe_intermediate_size": "expert_size",
        "norm_topk_prob": "is_expert_weight_normed",
    },
    derive=dense_layers,
    is_local=lambda mapping, layer: True,
    has_window_switch=True,
)


_GEMMA = Family(
    model_type="gemma",
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
    },
    fixed={"norm": "rms_offset"},
    derive=lambda mapping: {"embed_scale": math.sqrt(mapping["hidden_size"])},
)


def _gemma_activation(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """hidden_act was always overruled: the first files stated it wrongly."""
    return {**mapping, "hidden_act": mapping.get("hidden_activation") or "gelu_pytorch_tanh"}


def _gemma_scales(mapping: Mapping[str, Any]) -> dict[str, Any]:
    if mapping.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention true: only causal attention is supported")
    return {
        "embed_scale": math.sqrt(mapping["hidden_size"]),
        "attention_scale": mapping["query_pre_attn_scalar"] ** -0.5,
    }


_GEMMA2 = Family(
    model_type="gemma2",
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    normalize=_gemma_activation,
    fixed={"norm": "rms_offset", "has_post_norm": True},
    keys={
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logits_softcap",
    },
    derive=_gemma_scales,
    is_local=lambda mapping, layer: layer % 2 == 0,
    has_layer_types=True,
    block_names={**BLOCK_NAMES, **POST_NORM_NAMES},
)

# The text part. transformers has a cap of scores among its fields but no code for it.
_GEMMA3 = dataclasses.replace(
    _GEMMA2,
    model_type="gemma3_text",
    defaults={
        **_GEMMA2.defaults,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
    },
    fixed={**_GEMMA2.fixed, "qk_norm": True},
    keys={"final_logit_softcapping": "logits_softcap"},
    is_local=lambda mapping, layer: (layer + 1) % mapping["sliding_window_pattern"] != 0,
    has_rope_by_kind=True,
)

# Phi-3, Phi-3.5 and Phi-4. Published files state biases, and the model has none.
_PHI3 = Family(
    model_type="phi3",
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    fixed={"qkv_bias": False, "o_bias": False},
    is_local=lambda mapping, layer: True,
    has_partial_rotary=True,
    block_names={
        **BLOCK_NAMES,
        "qkv": ("self_attn.qkv_proj.weight",),
        "gate_up": ("mlp.gate_up_proj.weight",),
    },
)

_OLMO2 = Family(
    model_type="olmo2",
    defaults={"rms_norm_eps": 1e-5},
    fixed={
        "norm": "rms_wide",
        "has_pre_norm": False,
        "has_post_norm": True,
        "qk_norm": True,
        "is_qk_norm_joint": True,
    },
    block_names={**BLOCK_NAMES, **POST_NORM_NAMES},
)

# Files of before transformers 5 scale the rates of all layers, and have no word of those without.
_OLMO3 = dataclasses.replace(
    _OLMO2,
    model_type="olmo3",
    defaults={
        **_OLMO2.defaults,
        "sliding_window": 4096,
        "rope_theta": 500_000.0,
        "rope_local_base_freq": 500_000.0,
    },
    is_local=lambda mapping, layer: (layer + 1) % 4 != 0,
    has_layer_types=True,
    has_rope_by_kind=True,
)


_SMOLLM3 = Family(
    model_type="smollm3",
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
    },
    derive=ropeless_layers,
    is_local=lambda mapping, layer: layer in ropeless_layers(mapping)["ropeless_layers"],
    has_window_switch=True,
    has_layer_types=True,
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "Llama4ForCausalLM": LLAMA4,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": _MIXTRAL,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen3MoeForCausalLM": _QWEN3_MOE,
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3nForCausalLM": GEMMA3N,
    "Gemma4ForCausalLM": GEMMA4,
    "Phi3ForCausalLM": _PHI3,
    "Olmo2ForCausalLM": _OLMO2,
    "Olmo3ForCausalLM": _OLMO3,
    "SmolLM3ForCausalLM": _SMOLLM3,
    "GPT2LMHeadModel": GPT2,
    "GraniteForCausalLM": GRANITE,
    "GraniteMoeForCausalLM": GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": GRANITE_MOE_SHARED,
    "GraniteMoeHybridForCausalLM": GRANITE_HYBRID,
    "BambaForCausalLM": BAMBA,
    "NemotronHForCausalLM": NEMOTRON_H,
    "FalconH1ForCausalLM": FALCON_H1,
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": GLM4,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "MinistralForCausalLM": MINISTRAL,
    "Ministral3ForCausalLM": MINISTRAL3,
    "Exaone4ForCausalLM": EXAONE4,
    "CohereForCausalLM": COHERE,
    "Cohere2ForCausalLM": COHERE2,
    "HunYuanDenseV1ForCausalLM": HUNYUAN,
    "Lfm2ForCausalLM": LFM2,
    "Lfm2MoeForCausalLM": LFM2_MOE,
    "GptOssForCausalLM": GPT_OSS,
    "SeedOssForCausalLM": SEED_OSS,
    "Ernie4_5ForCausalLM": ERNIE4_5,
    "Ernie4_5_MoeForCausalLM": ERNIE4_5_MOE,
    "ArceeForCausalLM": ARCEE,
    "ApertusForCausalLM": APERTUS,
    "NemotronForCausalLM": NEMOTRON,
    "CwmForCausalLM": CWM,
    "Dots1ForCausalLM": DOTS1,
    "MiniMaxM2ForCausalLM": MINIMAX_M2,
    "OlmoeForCausalLM": OLMOE,
    "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "Mistral4ForCausalLM": MISTRAL4,
    "Qwen3NextForCausalLM": QWEN3_NEXT,
    "Qwen3_5ForCausalLM": QWEN3_5,
    "Qwen3_5MoeForCausalLM": QWEN3_5_MOE,
}
"""By the name in `architectures` of config.json."""


def family_of(architectures: Any) -> tuple[str, Family]:
    """The name and the family that the `architectures` entry of a config.json means.

    Raises:
        ValueError: the entry is no list of names, or none of them is supported.
    """
    names = architectures if isinstance(architectures, list | tuple) else [architectures]
    for name in names:
        if isinstance(name, str) and name in FAMILIES:
            return name, FAMILIES[name]
    raise ValueError(
        f"architectures {architectures!r} is not supported; supported: {', '.join(FAMILIES)}; "
        f"and the text part of {', '.join(PICTURES)}"
    )
