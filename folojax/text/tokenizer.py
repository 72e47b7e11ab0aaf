"""Text to token ids and back, through transformers."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from folojax.text.chat_messages import CONTENT_FORMATS, Message, read_messages, render
from folojax.text.time_limit import call_within

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""How tokenizers spell bytes that are no whole UTF-8 character (yet)."""

_TEMPLATE_SECONDS = 10.0
"""For a chat template to render; real ones take milliseconds."""

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A tokenizer of transformers, narrowed to what the engine uses.

    Args:
        source: That tokenizer, or what does the same under the same names.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._texts: dict[int, str] = {}

    @property
    def hf(self) -> Any:
        """The tokenizer of transformers."""
        return self._source

    @functools.cached_property
    def num_tokens(self) -> int:
        """One more than the highest id that it knows."""
        return 1 + max(self.ids_by_name.values())

    @property
    def ids_by_name(self) -> dict[str, int]:
        """All ids, in a new dict; names spell bytes as the tokenizer does."""
        return self._source.get_vocab()

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out where it is to skip special tokens."""
        added = getattr(self._source, "added_tokens_decoder", {})
        return frozenset(id_ for id_, token in added.items() if token.special)

    @property
    def is_byte_level(self) -> bool:
        """Whether tokens are bytes, each spelled by a letter, as GPT-2 has it."""
        return self._decodes_with("ByteLevel")

    @functools.cached_property
    def byte_values(self) -> dict[int, int]:
        """Byte by id, of the tokens <0x00> ... of a vocabulary that falls back to bytes."""
        if not self._decodes_with("ByteFallback"):
            return {}
        matches = ((_BYTE_TOKEN.fullmatch(text), id_) for text, id_ in self.ids_by_name.items())
        return {id_: int(match[1], 16) for match, id_ in matches if match}

    def _decodes_with(self, kind: str) -> bool:
        backend = getattr(self._source, "backend_tokenizer", None)
        # The decoder is known by its serialised form only.
        decoder = getattr(backend, "decoder", None)
        return decoder is not None and f'"{kind}"'.encode() in decoder.__getstate__()

    @functools.cached_property
    def is_cleaning_up(self) -> bool:
        """Whether transformers takes spaces out of a whole text once more when it is decoded."""
        if not getattr(self._source, "clean_up_tokenization_spaces", False):
            return False
        backend = getattr(self._source, "backend_tokenizer", None)
        if backend is None:
            return True
        # It does not for all that say so: for BPE it would be wrong.
        token_ids = self.encode("a . a , a ? a ' a", add_special_tokens=False)
        return self._source.decode(token_ids) != backend.decode(
            token_ids, skip_special_tokens=False
        )

    @functools.cached_property
    def eos_token_id(self) -> int | None:
        """The token that the tokenizer's own files say ends a text; None if there is none."""
        return getattr(self._source, "eos_token_id", None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the special tokens that a prompt has around it.

        Raises:
            ValueError: it holds half of a surrogate pair, which is no text.
        """
        try:
            return self._source.encode(text, add_special_tokens=add_special_tokens)
        # The library has no better word for it: a text with such a letter is no text to it.
        except (TypeError, UnicodeEncodeError) as error:
            place = next(
                (i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None
            )
            if place is None:
                raise
            raise ValueError(
                f"the text holds {text[place]!r} at {place}, half of a surrogate pair: no text in "
                "UTF-8 can hold it; join the pair, or replace it, as in "
                'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
            ) from error

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that goes on from another, and has no special tokens of its own.

        SentencePiece begins every text with a space that is not there; it is left out here.
        """
        token_ids = self.encode(text, add_special_tokens=False)
        if not self._has_dummy_prefix:
            return token_ids
        for before in ("\n", "a", "."):
            context = self.encode(before, add_special_tokens=False)
            joint = self.encode(before + text, add_special_tokens=False)
            if context and joint[: len(context)] == context:
                return joint[len(context) :]
        return token_ids

    @functools.cached_property
    def _has_dummy_prefix(self) -> bool:
        """Whether a text that begins with a letter is encoded as if a space stood before it."""
        if not hasattr(self._source, "decode"):
            return False
        token_ids = self.encode("a", add_special_tokens=False)
        return "".join(map(self.token_text, token_ids)).startswith(" ")

    def token_text(self, token_id: int) -> str:
        """The text of one token where others stand before it; special ones are included."""
        if token_id not in self._texts:
            text = self._source.decode([token_id])
            # A character's first bytes and a special token are the same everywhere.
            is_fixed = INCOMPLETE in text or token_id in self.special_ids
            if self._letter is not None and not is_fixed:
                letter = self._source.decode([self._letter])
                both = self._source.decode([self._letter, token_id])
                text = both[len(letter) :] if both.startswith(letter) else text
            self._texts[token_id] = text
        return self._texts[token_id]

    @functools.cached_property
    def _letter(self) -> int | None:
        """Some token that is letters, for others to stand behind; None if there is none."""
        others = self.special_ids | self.byte_values.keys()
        for token_id in sorted(set(self.ids_by_name.values()) - others):
            text = self._source.decode([token_id])
            if text.isalpha() and text.isascii():
                return token_id
        return None

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of tokens."""
        return self._source.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether it has a template of its own."""
        return getattr(self.hf, "chat_template", None) is not None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        content_format: str = "auto",
        **options: Any,
    ) -> str:
        """The text of a conversation, rendered in a sandbox and in bounded time.

        Content may be a list of parts; `folojax.text.chat_messages` says what `content_format` is.

        Raises:
            ValueError: neither the model nor the call has a template, a message has no role or
                a content that is no text, or the template fails or takes too long.
        """
        if chat_template is None and not self.has_chat_template:
            raise ValueError(
                "the tokenizer has no chat template: pass chat_template=, or use generate() with "
                "a prompt that you formatted yourself"
            )
        if content_format not in CONTENT_FORMATS:
            raise ValueError(
                f"chat_template_content_format is {content_format!r}; it must be one of "
                f"{', '.join(CONTENT_FORMATS)}"
            )
        read = read_messages(messages)

        def apply(messages: list[Message]) -> str:
            return self._apply_chat_template(messages, chat_template, options)

        # Templates may fail in any way; to the caller all of them are one. They come with models,
        # from anywhere, and the sandbox bounds a single range but not loops inside of loops.
        try:
            return call_within(
                _TEMPLATE_SECONDS, functools.partial(render, read, apply, content_format)
            )
        except Exception as error:
            raise ValueError(f"the chat template failed: {error}") from error

    def _apply_chat_template(
        self, messages: list[Message], chat_template: str | None, options: Mapping[str, Any]
    ) -> str:
        return self.hf.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, **options
        )
