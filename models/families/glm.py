"""GLM: neighbouring dimensions of half a head turn; GLM-4 norms what its parts return too."""

import dataclasses

from folojax.models.families.family import BLOCK_NAMES, Family

GLM = Family(
    model_type="glm",
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    fixed={"o_bias": False, "is_rope_interleaved": True},
    has_partial_rotary=True,
    block_names={**BLOCK_NAMES, "gate_up": ("mlp.gate_up_proj.weight",)},
)

GLM4 = dataclasses.replace(
    GLM,
    model_type="glm4",
    fixed={**GLM.fixed, "has_post_norm": True},
    block_names={
        **GLM.block_names,
        "attn_post_norm": ("post_self_attn_layernorm.weight",),
        "mlp_post_norm": ("post_mlp_layernorm.weight",),
    },
)
