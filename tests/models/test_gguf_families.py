"""GGUF files of every supported architecture, and of vocabularies of SentencePiece."""

import math
from pathlib import Path
from typing import Any

import chex
import gguf
import numpy as np
import pytest

from folojax.models.core.rope import plain_rates, read_scaling
from folojax.models.files.checkpoint import load_params, open_checkpoint
from folojax.models.files.gguf_config import hf_config
from folojax.models.files.gguf_families import GGUF_FAMILIES
from folojax.models.files.gguf_tokenizer import build_tokenizer
from tests import dense, gguf_writer, reference
from tests.families import save_family

_GROWING = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 20.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
_PLAIN_SPACE = {
    "mamba_proj_bias": False,
    "projectors_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_SHARED_KEYS = {"linear_num_value_heads": 6, "linear_value_head_dim": 24}
_V2_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
_ONE_BASE = {
    "full_attention": {key: _V2_YARN[key] for key in _V2_YARN if not key.startswith("mscale")},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
_WITHOUT_EXPERTS = ["linear_attention", "mlp", "full_attention", "mlp"]
_WITH_EXPERTS = ["linear_attention", "moe", "full_attention", "moe"]
# What no file says: chunks and growth of queries that begin at 8,192 tokens.
_SCOUT = {
    "num_hidden_layers": 4,
    "moe_layers": None,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 1, 1, 0],
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}

# By architecture: a case of `tests.families`, and what differs from it where GGUF cannot say it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama/mistral": ("mistral", {}),
    "llama/linear": ("llama-rope-linear", {}),
    "llama/mixtral": ("mixtral", {}),
    "llama/biases": ("llama-biases", {"mlp_bias": False}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3moe": ("qwen3-moe", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 24}),
    # Six layers: the last one is global.
    "gemma3": (
        "gemma3",
        {"query_pre_attn_scalar": 24, "num_hidden_layers": 6, "layer_types": None},
    ),
    "gemma3n": ("gemma3n", {"laurel_rank": 64, "vocab_size_per_layer_input": 128}),
    "phi3": ("phi3", {}),
    "seed_oss": ("seed-oss", {"attention_out_bias": False}),
    "ernie4_5": ("ernie4.5", {"use_bias": False}),
    "arcee": ("arcee", {"attention_bias": False, "mlp_bias": False}),
    "nemotron": ("nemotron", {}),
    "olmoe": ("olmoe", {}),
    "hunyuan-dense": (
        "hunyuan",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    ),
    "granite": ("granite", {}),
    # Five layers: every fourth is without rotary embedding, and the file does not say so.
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}),
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", {"attention_bias": True}),
    "gpt2": ("gpt2", {}),
    "lfm2": ("lfm2", {"conv_bias": False}),
    "lfm2moe": ("lfm2-moe", {"routed_scaling_factor": 1.0}),
    "falcon-h1": ("falcon-h1", {}),
    "falcon-h1/normed": ("falcon-h1-normed", _PLAIN_SPACE),
    "command-r": ("cohere", {}),
    # Four layers: the last one is without a window.
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "layer_types": None}),
    "granitemoe": ("granite-moe", {}),
    "granitemoe/shared": ("granite-moe-shared", {}),
    "granitehybrid": ("granite-hybrid", {}),
    "granitehybrid/dense": (
        "granite-hybrid-dense",
        {"mamba_proj_bias": False, "time_step_limit": [0.0, math.inf]},
    ),
    "qwen2moe": ("qwen2-moe", {}),
    "ernie4_5-moe": ("ernie4.5-moe", {"moe_layer_end_index": 2}),
    "glm4moe": ("glm4-moe", {}),
    "dots1": ("dots1", {"sliding_window": None, "layer_types": None}),
    "minimax-m2": ("minimax-m2", {}),
    "gpt-oss": ("gpt-oss", {"swiglu_limit": 7.0}),
    "mistral3": ("ministral3", {"rope_parameters": _GROWING}),
    "mistral3/small": ("mistral-full", {}),
    "exaone4": ("exaone4", {}),
    "exaone4/full": ("exaone4-full", {}),
    "apertus": ("apertus", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "qwen3next": ("qwen3-next", {}),
    "qwen3next/fused": ("qwen3-next", {}),
    "qwen35": ("qwen3.5", _SHARED_KEYS),
    "qwen35moe": ("qwen3.5-moe", {}),
    "gemma4": ("gemma4", {}),
    "gemma4/moe": ("gemma4-moe", {"vocab_size_per_layer_input": 128}),
    "gemma4/apart": ("gemma4-moe", {"vocab_size_per_layer_input": 128}),
    "deepseek2": ("deepseek-v3", {"attention_bias": False}),
    "deepseek2/before-mla": ("deepseek-v3", {"attention_bias": False}),
    "deepseek2/v2": ("deepseek-v2-groups", {"rope_parameters": _V2_YARN}),
    "deepseek2/lite": ("deepseek-v2", {}),
    "deepseek2/flash": ("glm4-moe-lite", {"mlp_layer_types": ["dense", "sparse"]}),
    "mistral4": ("mistral4", {"rope_parameters": _GROWING | {"llama_4_scaling_beta": 0.1}}),
    "mistral4/apart": ("mistral4", {"rope_parameters": _GROWING | {"llama_4_scaling_beta": 0.1}}),
    "nemotron_h": ("nemotron-h", {"layers_block_type": _WITHOUT_EXPERTS}),
    "nemotron_h_moe": ("nemotron-h", {"layers_block_type": _WITH_EXPERTS}),
    "nemotron_h_moe/latent": ("nemotron-h-latent", {"time_step_min": 0.001}),
    "llama4": ("llama4", _SCOUT),
    "chatglm": ("glm", {"head_dim": 16}),
    "chatglm/joined": ("glm", {"head_dim": 16, "attention_bias": True}),
    "granitehybrid/bamba": ("bamba", {}),
    # Four layers: every fourth is without a window, where no list says so.
    "olmo2/olmo3": ("olmo3", {}),
    "olmo2/olmo3-old": (
        "olmo3",
        {"num_hidden_layers": 4, "layer_types": None, "rope_parameters": _ONE_BASE},
    ),
    "qwen2vl": ("qwen2", {}),
    "qwen3vl": ("qwen3", {}),
    "qwen3vlmoe": ("qwen3-moe", {}),
}


LIKE_OTHERS = (
    *("seed_oss", "ernie4_5", "arcee", "olmoe", "qwen2moe", "glm4moe", "minimax-m2", "exaone4"),
    *("exaone4/full", "cohere2", "lfm2moe", "ernie4_5-moe", "granitemoe", "granitemoe/shared"),
    *("granitehybrid/dense", "falcon-h1", "falcon-h1/normed", "dots1", "mistral3/small"),
    *("qwen3next/fused", "qwen35", "gemma4/apart", "deepseek2/before-mla", "deepseek2/lite"),
    *("deepseek2/v2", "deepseek2/flash", "mistral4", "mistral4/apart", "nemotron_h", "chatglm"),
    *("nemotron_h_moe/latent", "granitehybrid/bamba", "olmo2/olmo3", "olmo2/olmo3-old"),
    *("qwen2vl", "qwen3vl", "qwen3vlmoe"),
)
"""What they read and undo, others do."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory of every test's own."""
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LIKE_OTHERS)) for case in CASES]
)
def test_logits_are_those_of_the_model_it_was_made_from(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = save_family(family, tmp_path / "hf", changes)
    architecture, _, variant = case.partition("/")
    gguf_writer.convert(model, tmp_path / "hf", architecture, tmp_path / "tiny.gguf", variant)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    tokens = np.random.default_rng(0).integers(3, 128, 64).tolist()
    ours = dense.logits(*dense.load(tmp_path / "tiny.gguf"), tokens)
    # Norms lose a bit to the 1 that is added in the file.
    atol = 2e-4 if GGUF_FAMILIES[architecture].norm_offset else 1e-4
    np.testing.assert_allclose(ours, reference.logits(model, tokens), rtol=0, atol=atol)
    converted = reference.load_model(checkpoint.directory)
    np.testing.assert_allclose(ours, reference.logits(converted, tokens), rtol=0, atol=1e-4)


def test_every_architecture_is_tried() -> None:
    assert {case.partition("/")[0] for case in CASES} == set(GGUF_FAMILIES)


def test_layers_that_guess_further_tokens_are_left_out(tmp_path: Path) -> None:
    """The file counts them as layers."""
    model = save_family("glm4-moe", tmp_path / "hf")
    gguf_writer.convert(model, tmp_path / "hf", "glm4moe", tmp_path / "plain.gguf")
    metadata, tensors = contents(tmp_path / "plain.gguf")
    tensors["blk.2.nextn.eh_proj.weight"] = np.zeros((64, 128), np.float32)
    metadata |= {"glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1}
    gguf_writer.write(tmp_path / "guessing.gguf", "glm4moe", metadata, tensors)
    plain, other = (open_checkpoint(tmp_path / f"{name}.gguf") for name in ("plain", "guessing"))
    assert other.config == plain.config
    chex.assert_trees_all_equal(load_params(other), load_params(plain))


@pytest.mark.parametrize(
    ("case", "key", "value", "message"),
    [
        ("deepseek2", "expert_gating_func", 1, "expert_gating_func is 1, .* has 2: use its safet"),
        ("deepseek2", "attention.temperature_scale", 0.1, "Mistral Large 3.*: use a model of"),
        ("llama4", "attention.sliding_window", 0, "MobileLLM.* is not supported: use a model of"),
        ("llama4", "interleave_moe_layer_step", 0, "MobileLLM.* is not supported: use a model of"),
        ("glm4", "rope.dimension_sections", [2, 1, 1, 0], "GLM-4V.* is not supported: use a model"),
        # numbers that do not fit the layers
        ("llama", "rope.dimension_count", 0, "dimension_count is 0; heads have 16 dimensions"),
        ("llama", "rope.dimension_count", 32, "dimension_count is 32; heads have 16 dimensions"),
        ("gemma4", "attention.sliding_window_pattern", [True], "has 1 entries for 4 layers"),
        ("deepseek2", "expert_group_used_count", 9, "8 experts in 4 groups, 9 for a token"),
        ("nemotron_h", "feed_forward_length", [0, 32], "length has 2 entries for 4 layers"),
    ],
)
def test_other_families_of_a_name_and_what_does_not_fit_are_refused(
    case: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    path = changed_file(case, key, value, tmp_path)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_rows_that_do_not_fit_are_told(tmp_path: Path) -> None:
    model = save_family("glm", tmp_path / "hf", {"head_dim": 16})
    gguf_writer.convert(model, tmp_path / "hf", "chatglm", tmp_path / "tiny.gguf", "joined")
    metadata, tensors = contents(tmp_path / "tiny.gguf")
    tensors["blk.1.attn_qkv.weight"] = tensors["blk.1.attn_qkv.weight"][:-16]
    gguf_writer.write(tmp_path / "cut.gguf", "chatglm", metadata, tensors)
    with pytest.raises(ValueError, match=r"blk.1.attn_qkv.weight has \(112, 64\), .* \(128, 64\)"):
        open_checkpoint(tmp_path / "cut.gguf")


def changed_file(case: str, key: str, value: Any, directory: Path) -> Path:
    """A file that says something else under a key of its architecture."""
    family, changes = CASES[case]
    model = save_family(family, directory / "hf", changes)
    gguf_writer.convert(model, directory / "hf", case, directory / "tiny.gguf")
    metadata, tensors = contents(directory / "tiny.gguf")
    path = directory / "other.gguf"
    gguf_writer.write(path, case, metadata | {f"{case}.{key}": value}, tensors)
    return path


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says, and its tensors."""
    reader = gguf.GGUFReader(path)
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "general."))
    }
    return metadata, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_a_message_of_gpt_oss_is_no_turn(tmp_path: Path) -> None:
    path = llama_file(tmp_path / "plain.gguf", {})
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    metadata["tokenizer.ggml.tokens"][3:6] = ["<|end|>", "<|return|>", "<|call|>"]
    metadata["tokenizer.ggml.token_type"][3:6] = [3, 3, 3]
    assert hf_config(metadata, GGUF_FAMILIES["llama"], {}, ())["eos_token_id"] == [2, 4, 5]
    metadata["tokenizer.ggml.token_type"][5] = 1
    assert hf_config(metadata, GGUF_FAMILIES["llama"], {}, ())["eos_token_id"] == [2, 3, 4]


def llama_file(path: Path, tensors: dict[str, Any], **changes: Any) -> Path:
    """A one-layer Llama whose `down` is 256 wide, so that every kind of block fits."""
    shapes = {
        "token_embd.weight": (8, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (32, 32),
        "blk.0.attn_v.weight": (32, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.ffn_gate.weight": (256, 32),
        "blk.0.ffn_up.weight": (256, 32),
        "blk.0.ffn_down.weight": (32, 256),
    }
    metadata = {
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 256,
        "llama.block_count": 1,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        **gguf_writer.letters_metadata(8),
    }
    metadata |= {name.replace("__", "."): value for name, value in changes.items()}
    plain = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    gguf_writer.write(path, "llama", metadata, plain | tensors)
    return path


def test_the_scaling_of_llama_3_is_found_in_its_table(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaling = read_scaling(rope, 8, 500_000.0, 8192)
    assert scaling is not None
    table = plain_rates(8, 500_000.0) / scaling.rates
    path = llama_file(
        tmp_path / "tiny.gguf",
        {"rope_freqs.weight": table.astype(np.float32)},
        llama__rope__freq_base=500_000.0,
    )
    assert open_checkpoint(path).config.rope_scaling == scaling


def test_longrope_factors_are_read_from_their_tables(tmp_path: Path) -> None:
    model = save_family("phi3", tmp_path / "hf")
    gguf_writer.convert(model, tmp_path / "hf", "phi3", tmp_path / "plain.gguf")
    metadata, tensors = contents(tmp_path / "plain.gguf")
    tensors["rope_factors_short.weight"] = np.linspace(1, 3, 8, dtype=np.float32)
    tensors["rope_factors_long.weight"] = np.linspace(1, 9, 8, dtype=np.float32)
    metadata["phi3.rope.scaling.original_context_length"] = 128
    gguf_writer.write(tmp_path / "long.gguf", "phi3", metadata, tensors)
    config = open_checkpoint(tmp_path / "long.gguf").config
    assert config.max_position == 128
    scaling = config.rope_scaling
    assert scaling is not None
    assert scaling.kind == "longrope"
    factors = plain_rates(16, config.rope_theta) / scaling.rates
    np.testing.assert_allclose(factors, np.linspace(1, 3, 8), rtol=1e-6)


TEXTS = ["the cat sat", " a  b", "naïve 日本 🙂", "", "cat\n\tcat", "<s> the"]


@pytest.mark.parametrize("has_prefix", [True, False])
def test_a_sentencepiece_vocabulary_encodes_as_the_one_it_was_made_from(has_prefix: bool) -> None:
    """The original: trained by the tokenizers library; its file: pieces and scores."""
    import tokenizers
    from tokenizers import decoders, normalizers

    original = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "\u2581")
    prefix = [normalizers.Prepend("\u2581")] if has_prefix else []
    original.normalizer = normalizers.Sequence([*prefix, spaces])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special)
    original.train_from_iterator(["the cat sat on the mat", "a cat that sat there"] * 20, trainer)
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    original.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    vocab = original.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    ours = build_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
            "tokenizer.ggml.add_space_prefix": has_prefix,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.unknown_token_id": 0,
        }
    )
    for text in TEXTS:
        encoded = ours.encode(text, add_special_tokens=False).ids
        if "<s>" not in text:
            assert encoded == original.encode(text, add_special_tokens=False).ids
            assert ours.decode(encoded) == text
        else:
            assert encoded[0] == 1, "a control token in a text is that token"
