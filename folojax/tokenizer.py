"""Text to token ids and back, through transformers; and the search for stop strings."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""How tokenizers spell bytes that are no whole UTF-8 character (yet)."""


class Tokenizer:
    """A tokenizer of transformers, narrowed to what the engine uses."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf = hf_tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model expects around it."""
        return self.hf.encode(text)

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of tokens."""
        return self.hf.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        **options: bool,
    ) -> list[int]:
        """Token ids of a conversation, rendered in transformers' sandbox.

        Raises:
            ValueError: neither the model nor the call has a template.
        """
        if chat_template is None and self.hf.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template: pass chat_template=, or use generate() with "
                "a prompt that you formatted yourself"
            )
        text = self.hf.apply_chat_template(
            list(messages), chat_template=chat_template, tokenize=False, **options
        )
        # The template writes the special tokens itself: adding them would double them.
        return self.hf.encode(text, add_special_tokens=False)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer of a directory in the Hugging Face layout; its code is never run.

    Raises:
        ValueError: the directory has no tokenizer that transformers can read.
    """
    # Else transformers advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # slow to import, and not needed with token ids

    try:
        return Tokenizer(AutoTokenizer.from_pretrained(os.fspath(path), trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no tokenizer could be loaded from {os.fspath(path)}: {error}; "
            "pass tokenizer= a directory or a transformers tokenizer"
        ) from error


class StopStringSearch:
    """Finds the first stop string in a growing output, over token borders.

    The text is decoded in a window that moves on whenever it ends on a whole character, so a
    token costs the same however long the output is.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], **decode_options: bool) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._options = decode_options
        self._token_ids: list[int] = []
        self._window_start = 0  # the window gives a token its left context ...
        self._window_read = 0  # ... up to here its text is in `text` already
        self.text = ""

    def add(self, token_id: int, is_searched: bool = True) -> tuple[str, int] | None:
        """Appends a token; returns the earliest stop string that is complete and where it starts.

        Args:
            token_id: The newest output token.
            is_searched: False only reads the text (before min_tokens).
        """
        self._token_ids.append(token_id)
        known = self._decode(self._token_ids[self._window_start : self._window_read])
        text = self._decode(self._token_ids[self._window_start :])
        if text.endswith(INCOMPLETE) or len(text) <= len(known):
            return None
        num_old = len(self.text)
        self.text += text[len(known) :]
        self._window_start, self._window_read = self._window_read, len(self._token_ids)
        if not is_searched:
            return None
        # A stop string that was complete before has been passed over (min_tokens).
        found = [
            (self.text.find(stop, max(0, num_old - len(stop) + 1)), stop) for stop in self._stop
        ]
        found = [(start, stop) for start, stop in found if start >= 0]
        if not found:
            return None
        start, stop = min(found)
        return stop, start

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, **self._options)
