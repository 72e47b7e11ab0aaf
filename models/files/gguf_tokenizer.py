"""The tokenizer inside a GGUF file, written as the files transformers loads.

transformers can do this too, but only where PyTorch is installed, and it splits text for this
family's `smollm` vocabularies without the rule that keeps every digit apart.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from folojax.models.files.gguf_cuts import (
    begins_with_bos,
    normalizer,
    pre_tokenizer,
    takes_words_whole,
)

# Values of tokenizer.ggml.token_type, as llama.cpp numbers them.
CONTROL, USER_DEFINED = 3, 4

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
        case "gemma4":  # whose pairs are listed
            vocab = {token: index for index, token in enumerate(tokens)}
            tokenizer = _of_pieces(metadata, vocab, _merges(metadata, tokens))
        case _:
            raise ValueError(
                f"GGUF tokenizer model {kind!r} is not supported; supported: 'gpt2' (byte-level "
                "BPE), 'llama' (SentencePiece) and 'gemma4'. Use the model's safetensors version"
            )
    for index, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type in (CONTROL, USER_DEFINED) and tokenizer.token_to_id(token) == index:
            is_special = token_type == CONTROL
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special)])
    has_bos = kind != "gpt2" or (
        begins_with_bos(metadata.get("tokenizer.ggml.pre"))
        and "tokenizer.ggml.bos_token_id" in metadata
    )
    added = [
        (_token(metadata, key), metadata[f"tokenizer.ggml.{key}_token_id"])
        for key, is_default in (("bos", has_bos), ("eos", False))
        if metadata.get(f"tokenizer.ggml.add_{key}_token", is_default)
    ]
    if added:
        begins = metadata.get("tokenizer.ggml.add_bos_token", has_bos)
        before, after = ([name for name, _ in some] for some in (added[:begins], added[begins:]))
        single = [*before, "$A", *after]
        pair = [*(f"{one}:1" for one in before), "$B:1", *(f"{one}:1" for one in after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, *pair], special_tokens=list(dict.fromkeys(added))
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
    model = _bpe(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges(metadata, tokens),
        fuse_unk=False,
        byte_fallback=False,
        ignore_merges=takes_words_whole(pre),
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    composing = normalizer(pre)
    if composing is not None:
        tokenizer.normalizer = composing
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(metadata: dict[str, Any], tokens: list[str]) -> list[tuple[str, ...]]:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    if not merges:
        raise ValueError(f"the metadata has {len(tokens)} tokens and 0 merges")
    return merges


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece's BPE, as Llama 2, Mistral, Phi-3 and Gemma have it.

    Pieces have scores, and the best pair is merged first.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise ValueError(f"the metadata has {len(tokens)} tokens and {len(scores)} scores")
    vocab = {token: index for index, token in enumerate(tokens)}
    return _of_pieces(
        metadata, vocab, generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    )


def _of_pieces(metadata: dict[str, Any], vocab: dict[str, int], merges: Any) -> Tokenizer:
    """BPE over whole texts, of which bytes are the last resort."""
    has_unknown = "tokenizer.ggml.unknown_token_id" in metadata
    tokenizer = Tokenizer(
        _bpe(
            vocab=vocab,
            merges=merges,
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
