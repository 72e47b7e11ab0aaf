"""Text to token ids and back, through transformers."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from folojax.time_limit import call_within

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
        return 1 + max(self._source.get_vocab().values())

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out where it is to skip special tokens."""
        added = getattr(self._source, "added_tokens_decoder", {})
        return frozenset(id_ for id_, token in added.items() if token.special)

    @functools.cached_property
    def byte_values(self) -> dict[int, int]:
        """Byte by id, of the tokens <0x00> ... of a vocabulary that falls back to bytes."""
        backend = getattr(self._source, "backend_tokenizer", None)
        # The decoder is known by its serialised form only.
        if backend is None or b'"ByteFallback"' not in _state(backend.decoder):
            return {}
        vocabulary = self._source.get_vocab()
        matches = ((_BYTE_TOKEN.fullmatch(text), id_) for text, id_ in vocabulary.items())
        return {id_: int(match[1], 16) for match, id_ in matches if match}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the special tokens that a prompt has around it."""
        return self._source.encode(text, add_special_tokens=add_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of one token on its own, special ones included."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._source.decode([token_id])
        return text

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

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        **options: Any,
    ) -> str:
        """The text of a conversation, rendered in transformers' sandbox and in bounded time.

        Raises:
            ValueError: neither the model nor the call has a template, a message has no role, or
                the template fails or takes too long.
        """
        if chat_template is None and self.hf.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template: pass chat_template=, or use generate() with "
                "a prompt that you formatted yourself"
            )
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(
                    f'messages holds {message!r}; a message must be {{"role": ..., "content": ...}}'
                )
        render = functools.partial(
            self.hf.apply_chat_template,
            [dict(message) for message in messages],
            chat_template=chat_template,
            tokenize=False,
            **options,
        )
        # Templates may fail in any way; to the caller all of them are one. They come with models,
        # from anywhere, and the sandbox bounds a single range but not loops inside of loops.
        try:
            return call_within(_TEMPLATE_SECONDS, render)
        except Exception as error:
            raise ValueError(f"the chat template failed: {error}") from error


def _state(part: Any) -> bytes:
    return part.__getstate__() if part is not None else b""
