"""The tokenizer inside a GGUF file, written as the files transformers loads.

transformers can do this too, but only where PyTorch is installed, and it splits text for this
family's `smollm` vocabularies without the rule that keeps every digit apart.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

# Values of tokenizer.ggml.token_type, as llama.cpp numbers them.
CONTROL, USER_DEFINED = 3, 4

# Source: tokenizer.json of meta-llama/Meta-Llama-3-8B, Qwen/Qwen2-7B, mistralai's Tekken and
# MiniMaxAI/MiniMax-M2, which differ in how many digits and which letters stay together.
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS" + _REST.replace("/", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+END|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*END|DIGITS"
    + _REST
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "lfm2", "falcon-h1")
"""Names of Llama 3's way to cut text and to take a word that is a token whole."""

_SPLITS = {
    **dict.fromkeys(
        (*_LLAMA3, "glm4", "chatglm-bpe", "dbrx"), _SPLIT.replace("DIGITS", r"\p{N}{1,3}")
    ),
    "qwen2": _SPLIT.replace("DIGITS", r"\p{N}"),
    "tekken": _CASED.replace("END", "").replace("DIGITS", r"\p{N}"),
    **dict.fromkeys(
        ("minimax-m2", "gpt-4o"),
        _CASED.replace("END", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", r"\p{N}{1,3}"),
    ),
}
_DIGITS_APART = ("smollm", "refact", "starcoder", "command-r")
"""Names of GPT-2's way with every digit for itself."""

_SPACE = "\u2581"
"""How SentencePiece spells a space."""


def save_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template, if there is one.

    Raises:
        ValueError: the vocabulary is of a kind that is not supported, its way to split text is
            unknown, or it is malformed.
    """
    special = {
        name: _token(metadata, key)
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    tokenizer = build_tokenizer(metadata)
    # As transformers does when it loads them, so that the file alone is the whole tokenizer.
    tokenizer.add_special_tokens([special_token(text) for text in special.values()])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def special_token(text: str) -> AddedToken:
    """What transformers adds for a token that a config gives a role."""
    return AddedToken(text, normalized=False, special=True)


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Builds the tokenizer that the metadata of a GGUF file describes.

    Raises:
        ValueError: another kind of vocabulary, an unknown pre-tokenizer, or lists that are missing
            or do not fit each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    if len(types) != len(tokens):
        raise ValueError(
            f"the metadata has {len(tokens)} tokens and {len(types)} token types: it needs as many"
        )
    match kind:
        case "gpt2":
            tokenizer = _byte_level(metadata, tokens)
        case "llama":
            tokenizer = _sentencepiece(metadata, tokens)
        case _:
            raise ValueError(
                f"GGUF tokenizer model {kind!r} is not supported; supported: 'gpt2' (byte-level "
                "BPE) and 'llama' (SentencePiece). Use the model's safetensors version"
            )
    for index, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type in (CONTROL, USER_DEFINED) and tokenizer.token_to_id(token) == index:
            is_special = token_type == CONTROL
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special)])
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        bos = _token(metadata, "bos")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])],
        )
    return tokenizer


def _token(metadata: dict[str, Any], key: str) -> str:
    """A special token's text."""
    tokens, name = metadata["tokenizer.ggml.tokens"], f"tokenizer.ggml.{key}_token_id"
    token_id = metadata.get(name)
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ValueError(f"{name} is {token_id!r}; there are tokens 0 to {len(tokens) - 1}")
    return tokens[token_id]


def _bpe(**options: Any) -> models.BPE:
    try:
        return models.BPE(**options)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"tokens and merges do not fit each other: {error}") from error


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """BPE over bytes, as GPT-2 has it."""
    pre = metadata.get("tokenizer.ggml.pre")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    if not merges:
        raise ValueError(f"the metadata has {len(tokens)} tokens and 0 merges")
    model = _bpe(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        fuse_unk=False,
        byte_fallback=False,
        # Llama 3 takes a word that is a token whole, whatever the merges say.
        ignore_merges=pre in (*_LLAMA3, "tekken"),
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    if pre in ("qwen2", "command-r"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece's BPE, as Llama 2, Mistral, Phi-3 and Gemma have it.

    Pieces have scores, the best pair is merged first, and bytes are the last resort.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise ValueError(f"the metadata has {len(tokens)} tokens and {len(scores)} scores")
    vocab = {token: index for index, token in enumerate(tokens)}
    has_unknown = "tokenizer.ggml.unknown_token_id" in metadata
    tokenizer = Tokenizer(
        _bpe(
            vocab=vocab,
            merges=generate_merges(vocab, dict(zip(tokens, scores, strict=True))),
            unk_token=_token(metadata, "unknown") if has_unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    decoded = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decoded.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoded)
    return tokenizer


def _pre_tokenizer(pre: str | None) -> PreTokenizer:
    """How text is cut before merging, by llama.cpp's name for it."""
    if pre in _DIGITS_APART:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if pre == "gpt-2":
        return ByteLevel(add_prefix_space=False)
    if pre in _SPLITS:
        split = Split(Regex(_SPLITS[pre]), behavior="isolated")
        return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(map(repr, (*_DIGITS_APART, "gpt-2", *_SPLITS)))
    raise ValueError(
        f"GGUF pre-tokenizer {pre!r} is not supported; supported: {known}. Use the model's "
        "safetensors version"
    )
