"""The tokenizer inside a GGUF file, written as the files transformers loads.

transformers can do this too, but only where PyTorch is installed, and it splits text for this
family's `smollm` vocabularies without the rule that keeps every digit apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

# Values of tokenizer.ggml.token_type, as llama.cpp numbers them.
_CONTROL, _USER_DEFINED = 3, 4

# Source: tokenizer.json of meta-llama/Meta-Llama-3-8B.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template, if there is one.

    Args:
        metadata: The key-value pairs of a GGUF file.
        directory: Where the files go.

    Raises:
        ValueError: the vocabulary is not byte-level BPE, or its way to split text is unknown.
    """
    # Here, because a conversion that is in the cache already has no use for it.
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    ).save_pretrained(directory)


def build_tokenizer(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """Builds the byte-level BPE that the metadata of a GGUF file describes.

    Raises:
        ValueError: another kind of vocabulary, an unknown pre-tokenizer, or lists that are missing
            or do not fit each other.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(
            f"GGUF tokenizer model {kind!r} is not supported; supported: 'gpt2' (byte-level BPE). "
            "Use the model's safetensors version"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    if len(types) != len(tokens) or not merges:
        raise ValueError(
            f"the metadata has {len(tokens)} tokens, {len(types)} token types and {len(merges)} "
            "merges; it needs as many types as tokens, and merges"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            fuse_unk=False,
            byte_fallback=False,
            # Llama 3 takes a word that is a token whole, whatever the merges say.
            ignore_merges=pre == "llama-bpe",
        )
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    for index, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type in (_CONTROL, _USER_DEFINED) and tokenizer.token_to_id(token) == index:
            is_special = token_type == _CONTROL
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special)])
    if metadata.get("tokenizer.ggml.add_bos_token"):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]}:1 $B:1",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _pre_tokenizer(pre: str | None) -> tokenizers.pre_tokenizers.PreTokenizer:
    """How text is cut before merging, by llama.cpp's name for it."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    match pre:
        case "smollm":
            return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        case "gpt-2":
            return ByteLevel(add_prefix_space=False)
        case "llama-bpe":
            split = Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
            return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
        case _:
            raise ValueError(
                f"GGUF pre-tokenizer {pre!r} is not supported; supported: 'smollm', 'gpt-2', "
                "'llama-bpe'. Use the model's safetensors version"
            )
