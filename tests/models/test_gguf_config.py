"""What the metadata of GGUF files means, where it is stated and where it is not."""

import pytest

from folojax.models.files.gguf_config import hf_config
from folojax.models.files.gguf_families import GGUF_FAMILIES, gguf_family
from tests.models.test_gguf import tiny_metadata


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"scaling.factor": 0.0}, {"rope_type": "default"}),
        ({"scaling.factor": 4.0, "scaling.type": "none"}, {"rope_type": "default"}),
        ({"scaling.type": "linear"}, {"rope_type": "default"}),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 1.0},
            {"rope_type": "yarn", "factor": 4.0},
        ),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 1.25},
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
        ),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.yarn_attn_factor": 1.0,
                "scaling.yarn_ext_factor": 1.0,
                "scaling.yarn_beta_fast": 16.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0, "beta_fast": 16.0},
        ),
    ],
)
def test_rotary_scaling_is_what_llama_cpp_takes_it_for(stated, expected):
    metadata = tiny_metadata(general__architecture="llama") | {
        f"llama.rope.{key}": value for key, value in stated.items()
    }
    config = hf_config(metadata, GGUF_FAMILIES["llama"], {}, ())
    assert config["rope_parameters"] == {"rope_theta": 10_000.0} | expected


@pytest.mark.parametrize(
    ("family", "period"),
    [("cohere2", 4), ("exaone4", 4), ("gemma2", 2), ("gemma3", 6), ("gpt-oss", 2), ("olmo2", 4)],
)
def test_layers_with_a_window_are_told_by_a_list_or_a_number(family, period):
    """Or, where a file has neither, by what all models of the family have."""
    numbers = {"attention.layer_norm_epsilon": 1e-5, "attention.sliding_window": 8}
    numbers |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 8}
    numbers |= {"block_count": 6, "rope.freq_base": 1e4, "logit_scale": 1.0}
    plain = tiny_metadata(general__architecture=family)
    metadata = {name.replace("llama.", f"{family}."): value for name, value in plain.items()}
    metadata |= {f"{family}.{key}": value for key, value in numbers.items()}
    pattern = f"{family}.attention.sliding_window_pattern"

    def global_layers(stated):
        config = hf_config(metadata | stated, gguf_family(metadata | stated), {}, ())
        kinds = config["layer_types"]
        assert len(kinds) == 6
        return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]

    assert global_layers({}) == list(range(period - 1, 6, period))
    assert global_layers({pattern: 3}) == [2, 5]
    assert global_layers({pattern: [False, True, True, True, False, True]}) == [0, 4]


def test_a_gemma_4_file_without_its_kinds_of_layers_is_told_what_it_lacks():
    plain = tiny_metadata(general__architecture="gemma4")
    metadata = {name.replace("llama.", "gemma4."): value for name, value in plain.items()}
    with pytest.raises(ValueError, match=r"lacks .*gemma4\.attention\.sliding_window_pattern"):
        hf_config(metadata, GGUF_FAMILIES["gemma4"], {}, ())


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"type": "longrope"}, "'longrope' is not supported.* Use the model's safetensors"),
        ({"type": "yarn", "yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5.*use the model's"),
    ],
)
def test_rotary_scaling_of_other_kinds_is_refused(stated, message):
    metadata = tiny_metadata(general__architecture="llama") | {
        f"llama.rope.scaling.{key}": one for key, one in stated.items()
    }
    with pytest.raises(ValueError, match=message):
        hf_config(metadata, GGUF_FAMILIES["llama"], {}, ())
