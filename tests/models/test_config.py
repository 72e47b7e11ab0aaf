"""What is read from a config.json, and what is refused."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from folojax.models.core.config import ModelConfig
from folojax.models.core.shards import problems_of
from folojax.models.families.families import FAMILIES
from folojax.models.files.checkpoint import build_module
from folojax.models.files.hf_config import config_from_hf
from tests.families import config_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
# By which one of two layers attends, in families that are hybrid, or none reads another's keys.
ATTENDING: dict[str, dict[str, Any]] = {
    "Qwen": {"full_attention_interval": 2},
    "Granite": {"layer_types": ["mamba", "attention"]},
    "Gemma3n": {"num_kv_shared_layers": 0},
    "Bamba": {"attn_layer_indices": [1]},
    "Nemotron": {"hybrid_override_pattern": "M*"},
}


def keys_of(architecture: str) -> dict[str, Any]:
    """What a config.json of an architecture needs beside the keys of Llama."""
    is_hybrid = "Hybrid" in architecture or not architecture.startswith("Granite")
    words = [own for name, own in ATTENDING.items() if is_hybrid and architecture.startswith(name)]
    return {"architectures": [architecture]} | (words[0] if words else {})


LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_defaults_are_those_of_the_architecture():
    config = config_from_hf(LLAMA)
    assert config == ModelConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_position=512,
        rope_theta=10_000.0,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
    )
    assert hash(config) == hash(config_from_hf(dict(LLAMA)))
    qwen2 = config_from_hf(LLAMA | {"architectures": ["Qwen2ForCausalLM"]})
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, 16)
    qwen3 = config_from_hf(LLAMA | {"architectures": ["Qwen3ForCausalLM"]})
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope_theta": 5e5}, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}, "llama3"),
        (
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "rope_type": "llama3"}},
            "llama3",
        ),
    ],
)
def test_rotary_settings_are_read_in_both_spellings(keys, scaling):
    config = config_from_hf(LLAMA | keys)
    assert config.rope_theta == 5e5
    assert (config.rope_scaling and config.rope_scaling.kind) == scaling


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, r"FalconForCausalLM.*LlamaForCausalLM, Llama4"),
        ({"architectures": None}, "architectures None"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'.*silu"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "'ntk'.*llama3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -4.0}}, "factor is -4"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": math.nan}},
            "attention_factor is nan, not a number above 0",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 5.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "high_freq_factor is 4.0, below low_freq_factor, 5.0",
        ),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "1 entries; 8 pairs"),
        ({"rope_scaling": 5}, "malformed"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000.*to 1,024"),
        ({"vocab_size": 10**12}, "vocab_size is"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": 66}, "no head_dim"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3"),
        ({"num_hidden_layers": 2000, "rms_norm_eps": -1.0}, "num_layers is 2000.*eps is -1"),
    ],
)
def test_what_is_not_supported_is_named(keys, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(LLAMA | keys)


def test_an_inactive_sliding_window_is_no_obstacle():
    keys = {"sliding_window": 4096, "use_sliding_window": False, "layer_types": ["full_attention"]}
    assert config_from_hf(LLAMA | keys) == config_from_hf(LLAMA)


def test_every_family_can_be_a_config():
    for name in FAMILIES:
        config = config_from_hf(LLAMA | keys_of(name))
        assert config.architecture == name
    with pytest.raises(ValueError, match="'Other' is not supported; supported: Llama"):
        build_module(dataclasses.replace(config, architecture="Other"), jnp.float32)


@pytest.mark.parametrize("theta", [500.0, 1e6])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.5},
        LLAMA3 | {"rope_type": "llama3"},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)]}
        | {"long_factor": [9.0] * 8, "original_max_position_embeddings": 128},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rates_are_those_of_transformers(rope, theta):
    """With the defaults of what is left out; powers of NumPy and PyTorch differ in the last bit."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope | {"rope_theta": theta}
    keys: Any = LLAMA | {"rope_parameters": dict(rope)}
    theirs = transformers.LlamaConfig(**keys)
    rates, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu", seq_len=64)
    found: Any = config_from_hf(LLAMA | {"rope_parameters": rope}).rope_scaling
    assert found.kind == rope["rope_type"]
    np.testing.assert_allclose(found.rates, rates.numpy(), rtol=1e-6)
    assert found.attention_factor == pytest.approx(factor)


def test_a_longrope_model_ends_where_its_long_factors_begin():
    rope = {"type": "su", "short_factor": [1] * 8, "long_factor": [2] * 8}
    keys = {"rope_scaling": rope, "original_max_position_embeddings": 128}
    config = config_from_hf(LLAMA | keys)
    assert config.rope_scaling is not None
    assert config.rope_scaling.kind == "su"
    assert config.max_position == 128


def test_local_layers_of_olmo_3_are_not_scaled_by_older_files():
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    keys = {"architectures": ["Olmo3ForCausalLM"], "rope_theta": 1e6, "rope_scaling": yarn}
    config = config_from_hf(LLAMA | keys)
    assert config.rope_scaling is not None
    assert config.rope_scaling.kind == "yarn"
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 5e5)


def test_the_file_itself_stays_with_the_config_but_does_not_count():
    config = config_from_hf(LLAMA)
    other = config_from_hf(LLAMA | {"comment": "the same model"})
    assert config.hf_config != other.hf_config
    assert config == other
    assert hash(config) == hash(other)


def test_windows_are_those_of_the_family():
    def windows(architecture, **keys):
        return config_from_hf(LLAMA | {"architectures": [architecture]} | keys).windows

    assert windows("MistralForCausalLM") == (4096, 4096)
    assert windows("MistralForCausalLM", sliding_window=None) == ()
    assert windows("Gemma2ForCausalLM", sliding_window=7) == (7, None)
    assert windows("Gemma3ForCausalLM", sliding_window_pattern=2, sliding_window=7) == (7, None)
    assert windows("Olmo3ForCausalLM", num_hidden_layers=4) == (4096, 4096, 4096, None)
    assert windows("Qwen2ForCausalLM") == ()
    assert windows("Phi3ForCausalLM", sliding_window=2047) == (2047, 2047)


def test_heads_that_a_joined_kernel_does_not_tell_are_not_shared_out() -> None:
    config = config_from_hf(config_of("gemma4", transformers))
    assert problems_of(config, 2) == []
    other = dataclasses.replace(config, full_kv_heads=2, has_keys_as_values=False)
    assert problems_of(other, 1) == []
    (told,) = problems_of(other, 2)
    assert "full_kv_heads is set and has_keys_as_values is not" in told
