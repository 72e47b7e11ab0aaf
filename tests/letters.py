"""Small tokenizers whose every token is known."""

from collections.abc import Sequence
from typing import Any

from folojax.text.tokenizer import Tokenizer


class ByteTokens(Tokenizer):
    """A vocabulary of byte strings; characters of several bytes may be cut anywhere."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        super().__init__(None)
        self.vocabulary = vocabulary

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """As byte-level tokenizers do it: what is no whole character becomes U+FFFD."""
        return b"".join(self.vocabulary[i] for i in token_ids).decode(errors="replace")


class WordTokens(ByteTokens):
    """Drops the space before the first word, as SentencePiece does: a token needs its context."""

    def decode(self, token_ids: Sequence[int], *options: bool, **named: bool) -> str:
        """The text without its first space."""
        return super().decode(token_ids).removeprefix(" ")


def make_metaspace_tokenizer() -> Tokenizer:
    """As Llama 2 has it: spaces are letters, unknown letters are byte tokens.

    Ids 0 to 2 are special, then come 256 bytes, then words.
    """
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend
    from tokenizers.pre_tokenizers import Metaspace
    from transformers import PreTrainedTokenizerFast

    words = [
        "\u2581",
        "\u2581\u2581",
        "a",
        "b",
        "\u2581a",
        "ab",
        "\u2581ab",
        "\u00e9",
        ".",
        "\ufffd",
    ]
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Backend(
        models.BPE(
            vocab={token: id_ for id_, token in enumerate(tokens)},
            merges=[("\u2581", "\u2581"), ("\u2581", "a"), ("a", "b"), ("\u2581a", "b")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    return Tokenizer(hf)


def make_letters_tokenizer() -> Any:
    """A transformers tokenizer with a token for each printable letter of ASCII, and a template.

    Ids 0 to 2 are special (padding, beginning and end), then come 95 letters from the space on.
    """
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    tokens = [*special, *map(chr, range(32, 127))]
    backend = Backend(models.BPE({token: id_ for id_, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if not loop.last %}|{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}|[assistant]{% endif %}"
        ),
    )


EOS = 2
"""Of the letters tokenizer."""


def encode(text: str) -> list[int]:
    """The letters tokenizer's ids of a text."""
    return [ord(letter) - 29 for letter in text]


def decode(token_ids: Sequence[int]) -> str:
    """The text of the letters tokenizer's ids, special ones included."""
    special = ("<pad>", "<s>", "</s>")
    return "".join(special[i] if i < 3 else chr(i + 29) for i in token_ids)
