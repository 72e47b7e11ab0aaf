"""The packaged GGUF model, converted, against transformers' own reading of the same file."""

import json
import os
import subprocess
import sys

import chex
import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.files import gguf_conversion
from folojax.models.files.checkpoint import build_module, load_params, open_checkpoint
from folojax.models.files.gguf_tokenizer import build_tokenizer
from folojax.models.files.save import params_to_hf
from tests import dense, reference

TEXT = (
    "The three primary colours are red, yellow and blue. In 1969, Apollo 11 landed on the Moon; "
    "def add(a, b):\n    return a + b\n"
)
TEXTS = [
    TEXT,
    "",
    " ",
    "\n\n  \t indented",
    "don't we're I'LL",
    "日本語 émoji 🙂 naïve ﬁ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|im_start|>x<repo_name>",
    "1st 22nd 3.14159 2026-11-23",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache directory of this file's own, with nothing in it at first."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLOJAX_CACHE_DIR", str(path))
        yield path


@pytest.fixture(scope="module")
def embedded(cache):
    return open_checkpoint()


@pytest.fixture(scope="module")
def tokenizer(embedded):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded.directory)


def test_the_conversion_is_in_the_cache_and_complete(embedded, cache):
    assert embedded.directory.is_relative_to(cache / "gguf")
    assert [path.name for path in (cache / "gguf").iterdir()] == [embedded.directory.name]
    assert embedded.eos_token_ids == (2,)
    assert embedded.generation_config == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = embedded.config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.rope_theta, config.rms_norm_eps, config.max_position) == (1e5, 1e-5, 8192)


def test_a_second_opening_converts_nothing(embedded, monkeypatch):
    def fail(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf_conversion, "_convert", fail)
    assert open_checkpoint() == embedded


def test_tensors_are_those_of_transformers(embedded):
    theirs = reference.embedded_model().state_dict()
    ours = params_to_hf(load_params(embedded, jnp.float32), embedded.config)
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].numpy(), err_msg=name)


def test_logits_are_those_of_transformers(embedded, tokenizer):
    tokens = tokenizer.encode(TEXT)
    module, params = build_module(embedded.config, jnp.float32), load_params(embedded, jnp.float32)
    ours = dense.logits(module, params, tokens)
    theirs = reference.logits(reference.embedded_model(), tokens)
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_encodes_like_transformers(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == reference.embedded_tokenizer().encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("x =  5", ["x", "Ġ=", "ĠĠ", "5"]),
        ("a ²", ["a", "Ġ", "Â²"]),
        ("12345", ["1", "2", "3", "4", "5"]),
    ],
)
def test_digits_are_split_off_first_as_in_the_original_tokenizer(tokenizer, text, pieces):
    # transformers' reading of a GGUF file lacks this rule and yields "Ġ", "Ġ", "5" for "  5".
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_saved_tokenizer_has_the_originals_structure(embedded):
    saved = json.loads((embedded.directory / "tokenizer.json").read_text())
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    digits = {"type": "Digits", "individual_digits": True}
    assert saved["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    assert saved["normalizer"] is None
    special = {token["content"]: token["id"] for token in saved["added_tokens"]}
    assert [special[f"<|{name}|>"] for name in ("endoftext", "im_start", "im_end")] == [0, 1, 2]
    assert all(token["special"] for token in saved["added_tokens"])


def test_special_tokens_and_chat_template_are_kept(tokenizer):
    theirs = reference.embedded_tokenizer()
    assert tokenizer.special_tokens_map == theirs.special_tokens_map
    assert len(tokenizer) == len(theirs) == 49152
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.endswith("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.encode(ours), skip_special_tokens=True).startswith("system\n")


def test_converting_and_loading_need_no_torch(tmp_path):
    code = """
import sys
sys.modules["torch"] = None
import jax.numpy as jnp
from folojax.models.files.checkpoint import load_params, open_checkpoint
load_params(open_checkpoint(sys.argv[1]), jnp.float32)
assert "transformers" not in sys.modules
assert ("gguf" in sys.modules) == (sys.argv[2] == "cold")
"""
    tiny = write_tiny(tmp_path / "tiny.gguf")
    for path, start in ((tiny, "cold"), (tiny, "warm")):
        subprocess.run(
            [sys.executable, "-c", code, str(path), start],
            check=True,
            env=os.environ | {"FOLOJAX_CACHE_DIR": str(tmp_path / "cache")},
        )


VOCABULARY = ["<s>", "</s>", "a", "b", "Ġ", "1", "ab"]


def tiny_metadata(**changes):
    metadata = {
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.block_count": 1,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": VOCABULARY,
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    metadata |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in metadata.items() if value is not None}


def tiny_tensors():
    shapes = {
        "token_embd.weight": (len(VOCABULARY), 32),
        "output_norm.weight": (32,),
        "output.weight": (len(VOCABULARY), 32),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.ffn_gate.weight": (32, 32),
        "blk.0.ffn_up.weight": (32, 32),
        "blk.0.ffn_down.weight": (32, 32),
    }
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype="float32") for name, shape in shapes.items()}


def write_tiny(path, architecture="llama", tensors=None, **changes):
    """A GGUF file of a one-layer model, with some of its metadata changed."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in tiny_metadata(**changes).items():
        match value:
            case str():
                writer.add_string(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case _:
                writer.add_array(name, value)
    for name, array in (tiny_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_untied_file_with_grouped_heads_converts(tmp_path, cache):
    tensors = tiny_tensors()
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny.gguf"))
    assert not checkpoint.config.tie_embeddings
    params = load_params(checkpoint, jnp.float32)
    chex.assert_trees_all_equal(params["lm_head"], tensors["output.weight"])
    # Head 0 of the keys: the file has dimensions 0 4 1 5 2 6 3 7 in its rows.
    key = tensors["blk.0.attn_k.weight"][:8][[0, 2, 4, 6, 1, 3, 5, 7]]
    chex.assert_trees_all_equal(params["layers_0"]["qkv"][32:40], key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "'mamba' is not supported; supported: 'llama', 'qwen2'"),
        ({"llama__context_length": None}, "lacks llama.context_length"),
        ({"llama__expert_count": 8}, "lacks llama.expert_used_count"),
        ({"llama__rope__dimension_count": 4}, "partial_rotary_factor 0.5"),
        ({"llama__rope__scaling__type": "ntk"}, "'ntk' is not supported"),
        ({"tokenizer__ggml__model": "t5"}, "tokenizer model 't5' is not supported"),
        ({"tokenizer__ggml__model": "llama"}, "7 tokens and 0 scores"),
        ({"tokenizer__ggml__pre": "other"}, "pre-tokenizer 'other' is not supported"),
        ({"tokenizer__ggml__merges": None}, "and 0 merges"),
        ({"tokenizer__ggml__merges": ["x y"]}, "tokens and merges do not fit each other"),
        ({"tokenizer__ggml__merges": 5}, "the metadata is malformed"),
        ({"tokenizer__ggml__tokens": 5}, "the metadata is malformed"),
        ({"tokenizer__ggml__eos_token_id": 7}, "eos_token_id is 7; there are tokens 0 to 6"),
        ({"tokenizer__ggml__bos_token_id": "a"}, "bos_token_id is 'a'; there are tokens 0 to 6"),
        ({"llama__attention__head_count": 0}, "the metadata is malformed"),
        ({"llama__attention__head_count": [4, 4]}, "the metadata is malformed"),
        ({"split__count": 2}, "part None of 2, .* is 0 of 1: name parts as llama-gguf-split does"),
        ({"tensors": {"rope_freqs.weight": np.arange(4, dtype="float32")}}, "rope_freqs.weight"),
        ({"tensors": {}}, "missing: token_embd.weight"),
        ({"llama__embedding_length": 64}, r"token_embd.weight has \(7, 32\)"),
        ({"llama__embedding_length": 0}, "hidden_size is 0"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(4, "float32")}}, "missing: blk.0.attn_k.bias"),
    ],
)
def test_what_is_not_supported_is_named_and_leaves_nothing(tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path / "cache"))
    path = write_tiny(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(ValueError, match=f"tiny.gguf: .*{message}"):
        open_checkpoint(path)
    assert not list((tmp_path / "cache" / "gguf").iterdir())


@pytest.mark.parametrize("size", [0, 3, 20, 300, -64])
def test_a_truncated_file_is_named(tmp_path, monkeypatch, size):
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path / "cache"))
    path = write_tiny(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"tiny\.gguf is truncated or no GGUF file"):
        open_checkpoint(path)


def test_linear_rope_and_turn_ends_are_read(tmp_path, cache):
    checkpoint = open_checkpoint(
        write_tiny(
            tmp_path / "tiny.gguf",
            llama__rope__scaling__type="linear",
            llama__rope__scaling__factor=4.0,
            tokenizer__ggml__eot_token_id=2,
        )
    )
    assert checkpoint.config.rope_scaling is not None
    assert checkpoint.config.rope_scaling.kind == "linear"
    assert checkpoint.config.rope_scaling.rates[0] == 0.25
    assert checkpoint.eos_token_ids == (1, 2)


def test_pre_tokenizers_differ_as_their_names_say():
    def pieces(pre, text):
        return build_tokenizer(
            tiny_metadata(tokenizer__ggml__pre=pre)
        ).pre_tokenizer.pre_tokenize_str(text)

    cut = {
        pre: [piece for piece, _ in pieces(pre, "a 12345 B'LL")]
        for pre in ("smollm", "gpt-2", "llama-bpe", "tekken", "minimax-m2")
    }
    assert cut == {
        "smollm": ["a", "Ġ", "1", "2", "3", "4", "5", "ĠB", "'", "LL"],
        "gpt-2": ["a", "Ġ12345", "ĠB", "'", "LL"],
        "llama-bpe": ["a", "Ġ", "123", "45", "ĠB", "'LL"],
        "tekken": ["a", "Ġ", "1", "2", "3", "4", "5", "ĠB", "'LL"],
        "minimax-m2": ["a", "Ġ", "123", "45", "ĠB'LL"],
    }


def test_a_beginning_token_is_added_if_the_file_says_so():
    ids = build_tokenizer(tiny_metadata(tokenizer__ggml__add_bos_token=True)).encode("ab").ids
    assert ids == [0, 6]


@pytest.mark.parametrize(("begins", "ends"), [(True, True), (False, True), (False, False)])
def test_an_end_token_is_added_if_the_file_says_so(begins, ends):
    said = {"tokenizer__ggml__add_bos_token": begins, "tokenizer__ggml__add_eos_token": ends}
    tokenizer = build_tokenizer(tiny_metadata(**said, tokenizer__ggml__eos_token_id=1))
    expected = [0] * begins + [6] + [1] * ends
    assert tokenizer.encode("ab").ids == expected
    assert tokenizer.encode("ab", "ab").ids == 2 * expected


@pytest.mark.parametrize(
    ("pre", "changes", "begins"),
    [
        ("llama-bpe", {}, True),
        ("tekken", {}, True),
        ("llama-bpe", {"tokenizer__ggml__add_bos_token": False}, False),
        ("llama-bpe", {"tokenizer__ggml__bos_token_id": None}, False),
        ("smaug-bpe", {}, False),
        ("qwen2", {}, False),
    ],
)
def test_where_a_file_does_not_say_a_text_begins_as_in_llama_cpp(pre, changes, begins):
    """Many files of Llama 3 do not."""
    metadata = tiny_metadata(tokenizer__ggml__pre=pre, **changes)
    assert build_tokenizer(metadata).encode("ab").ids == [0] * begins + [6]
