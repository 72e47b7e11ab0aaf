"""How the tokenizers of GGUF files cut text, by the names of the ways to do so."""

import json
import re
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, normalizers

from folojax.models.files.gguf_cuts import normalizer, pre_tokenizer, takes_words_whole
from folojax.models.files.gguf_families import GGUF_FAMILIES
from folojax.models.files.gguf_tokenizer import build_tokenizer
from tests.house.test_imports import ROOT

TEXT = "Hé's a 12345 ABcD!!\n\n 日本テ中文"

# By hand, of the patterns that the models' tokenizer.json and tokenization_kimi.py have.
_ALIKE = ["Hé", "'s", " a", " ", *"12345", " ABcD", "!!\n\n", " 日本テ中文"]
_PLAIN_END = [" a", " ", *"12345", " ABcD", "!!", "\n", "\n", " ", "日本テ中文"]
CUT = {
    "exaone4": ["Hé", "'s", " a", " 12345", " ABcD", "!!", "\n\n", " 日本テ中文"],
    "olmo": ["Hé", "'s", " a", " 12345", " ABcD", "!!", "\n\n", " 日本テ中文"],
    "falcon3": ["Hé", "'s", " a", " ", "123", "45", " ABcD", "!!\n\n", " 日本テ中文"],
    "smaug-bpe": ["Hé", "'s", " a", " ", "123", "45", " ABcD", "!!\n\n", " 日本テ中文"],
    "deepseek-r1-qwen": _ALIKE,
    "hunyuan": _ALIKE,
    "qwen35": _ALIKE,
    "seed-coder": ["Hé", "'s", " a", " ", *"12345", " ABcD", "!!", "\n\n", " 日本テ中文"],
    "pixtral": ["Hé", "'s", " a", " ", *"12345", " ABc", "D", "!!\n\n", " 日本テ中文"],
    "llama4": ["Hé's", " a", " ", "123", "45", " ABc", "D", "!!\n\n", " 日本テ中文"],
    "tiny_aya": ["Hé's", " a", " ", "12", "345", " ABc", "D", "!!\n\n", " 日本テ中文"],
    "kimi-k2": ["Hé's", " a", " ", "123", "45", " ABc", "D", "!!\n\n", " ", "日本", "テ", "中文"],
    "deepseek-v3": ["Hé", "'s", " a", " ", "123", "45", " ABcD", "!!\n\n", " ", "日本テ中文"],
    "joyai-llm": ["Hé", "'s", " a", " ", "123", "45", " ABcD", "!!\n\n", " ", "日本テ中文"],
    "hunyuan-dense": ["Hé", "'s", " a", " ", "123", "45", " ABcD", "!!\n\n", " ", "日本テ中文"],
    # Its signs are those from ":" to "~", letters among them.
    "deepseek-llm": ["H", "é", "'", "s", *_PLAIN_END],
    "deepseek-coder": ["Hé", "'", "s", *_PLAIN_END],
}


@pytest.mark.parametrize("name", CUT)
def test_text_is_cut_where_the_models_tokenizers_cut_it(name: str) -> None:
    cuts = pre_tokenizer(name).pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in cuts] == CUT[name]


def test_marks_belong_to_letters_in_qwen_3_5_alone() -> None:
    text = "नमस्ते"
    pieces = {name: len(pre_tokenizer(name).pre_tokenize_str(text)) for name in ("qwen2", "qwen35")}
    assert pieces == {"qwen2": 3, "qwen35": 1}


def test_words_of_mistral_and_llama_are_whole_and_those_of_qwen_composed() -> None:
    whole = {name for name in (*CUT, "tekken", "qwen2") if takes_words_whole(name)}
    composed = {name for name in (*CUT, "tekken", "qwen2") if normalizer(name) is not None}
    assert whole == {"falcon3", "pixtral", "tekken"}
    assert composed == {"qwen2", "deepseek-r1-qwen", "qwen35", "olmo", "tiny_aya"}


def test_what_is_unknown_is_refused_with_what_is_known() -> None:
    with pytest.raises(
        ValueError, match=r"'poro-chat' is not supported; supported: .*'kimi-k2'.* Use"
    ):
        pre_tokenizer("poro-chat")


def test_a_vocabulary_of_gemma_4_encodes_as_the_one_it_was_made_from() -> None:
    """Its pairs are listed in the order in which they merge, and their order is no score's."""
    original = tokenizers.Tokenizer(
        tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    original.normalizer = normalizers.Replace(" ", "\u2581")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, special_tokens=special)
    lines = ["the cat sat on the mat", "a cat\n\n\nthat sat there"] * 20
    original.train_from_iterator(lines, trainer)
    original.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    state: dict[str, Any] = json.loads(original.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [3, 3, 3, 2] + [6] * 256 + [1] * (len(tokens) - 260),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["merges"]],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
    }
    ours = build_tokenizer(metadata)
    for text in ("the cat sat", " a  b", "naïve 日本 🙂", "", "cat\n\n\n\tcat", "<eos>the"):
        encoded = ours.encode(text, add_special_tokens=False).ids
        assert encoded == original.encode(text, add_special_tokens=False).ids
        assert ours.decode(encoded, skip_special_tokens=False) == text
        assert ours.encode(text).ids == [2, *encoded]


def test_the_page_names_what_is_read() -> None:
    page = (ROOT / "docs" / "gguf.md").read_text()
    families, _, rest = page.partition("## Bits")
    rows = re.findall(r"^\| .+? \| (.+?) \| .+ \|$", families, re.M)
    named = {name for row in rows for name in row.split(", ")} - {"architecture", "---", "none"}
    assert named == set(GGUF_FAMILIES)
    ways = re.findall(r"^\| [^|]+ \| (.+?) \|$", rest, re.M)
    for name in {name for row in ways for name in row.split(", ")} - {"names", "---"}:
        assert pre_tokenizer(name) is not None
