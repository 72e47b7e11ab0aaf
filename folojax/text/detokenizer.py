"""Tokens to text while they come, and the search for stop strings in it.

A token's text can depend on its left neighbours (the space before a first word, the bytes of one
character), so tokens are decoded in a window that moves on as soon as its text can no longer
change. A token then costs the same however long the output is::

    token ids    ... | context | pending ... |
    text         committed     | tail        |
                 ^^^^^^^^^ never changes      ^ may end inside a character, or be decoded
                                                anew as long as a run of byte tokens goes on

The first context is the end of the prompt (see `folojax.text.prompt_end`).

Streamed text is the committed one, less an end that could be the start of a stop string.
"""

import re
from collections.abc import Sequence

from folojax.text.prompt_end import PromptEnd, num_alike, read_run
from folojax.text.tokenizer import INCOMPLETE, Tokenizer

_LONG_WINDOW = 32
"""Pending tokens, far more than a character has bytes: most of them are no text at all."""

_MOST_BYTES = 4

_COULD_LOSE_A_SPACE = re.compile(r" (n'?|'[vr]?)?$")
"""The start of what transformers takes a space out of where it cleans up: " .", " n't", " 've"."""


class Detokenizer:
    """The text of one growing output.

    Args:
        tokenizer: Of the tokens.
        stop: Strings that end the text; none is empty.
        min_tokens: Stop strings that are complete within so many tokens are passed over.
        is_stop_included: Whether the text ends behind the stop string, or before it.
        prompt_token_ids: What the output goes on from.
        **decode_options: The tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        is_stop_included: bool = False,
        prompt_token_ids: Sequence[int] = (),
        **decode_options: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._is_stop_included = is_stop_included
        self._options = decode_options
        self._num_tokens = 0
        is_skipping = decode_options.get("skip_special_tokens", False)
        self._prompt = PromptEnd(tokenizer, prompt_token_ids, is_skipping, self._decode)
        self._window = list(self._prompt.token_ids)  # context, then pending tokens
        self._num_context = len(self._window)
        self._context_len: int | None = None  # characters of its text; None: it is the prompt
        self._run: bytes | None = None  # the byte tokens that a text ends with
        self._is_run_valid = True
        self._run_before, self._text_before = b"", ""  # bytes and text that were there before it
        self._committed: list[str] = []
        self._committed_len = 0
        self._recent = ""  # the committed text's end, long enough for a stop string to begin there
        self._tail = ""
        self._num_searched = 0  # characters of committed text and tail
        self._cut: str | None = None

    @property
    def text(self) -> str:
        """What can be streamed: it only ever grows, and the final text starts with it."""
        if self._cut is not None:
            return self._cut
        text = self._join()
        return text[: len(text) - self._num_held_back()]

    def read(self, token_ids: Sequence[int]) -> str | None:
        """Reads what is new in the whole output; returns the stop string that it completes.

        Of several that are complete for the first time it is the one that starts first. Tokens
        behind it are not read, and the text ends there.
        """
        for index in range(self._num_tokens, len(token_ids)):
            stop = self._add(token_ids[index])
            if stop is not None:
                return stop
        return None

    def finish(self, token_ids: Sequence[int]) -> str:
        """The final text: cut at a stop string, or all that the tokenizer makes of the tokens.

        Args:
            token_ids: The whole output, less a token that ended it and leaves no text.
        """
        if self._cut is not None:
            return self._cut
        text = self._prompt.output_of(self._decode([*self._prompt.token_ids, *token_ids]))
        # A tokenizer that decodes its whole output anew could take back what was streamed.
        return text if text.startswith(self.text) else self._join() + self._tail

    def _add(self, token: int) -> str | None:
        self._num_tokens += 1
        if self._options.get("skip_special_tokens") and token in self._tokenizer.special_ids:
            return None  # the tokenizer leaves it out before it decodes
        byte = self._tokenizer.byte_values.get(token)
        if byte is None:
            self._end_run()
            self._add_token(token)
        else:
            self._add_byte(token, byte)
        return self._search() if self._stop else None

    def _add_token(self, token: int) -> None:
        self._window.append(token)
        self._tail = self._read_window()
        if self._tail and not self._may_change(self._tail):
            self._commit(self._tail, self._next_context())
        elif (len(self._window) - self._num_context) % _LONG_WINDOW == 0:
            self._shorten_window()

    def _read_window(self) -> str:
        """The text of the pending tokens."""
        text = self._decode(self._window)
        if self._context_len is None:
            return self._prompt.output_of(text)
        return text[self._context_len :]

    def _next_context(self) -> list[int]:
        """The pending tokens, and those before them without which they would be cleaned otherwise.

        What is cleaned up are spaces around punctuation: never one before the start of a text.
        """
        start = self._num_context
        if self._tokenizer.is_cleaning_up:
            first = max(0, start - _LONG_WINDOW)
            while (
                start > first and not self._tokenizer.token_text(self._window[start])[-1:].isalpha()
            ):
                start -= 1
        return self._window[start:]

    def _may_change(self, text: str) -> bool:
        """Whether tokens that follow a text can change its end."""
        if text.endswith(INCOMPLETE):
            return True
        if not self._tokenizer.is_cleaning_up or _COULD_LOSE_A_SPACE.search(text) is None:
            return False
        self._num_searched = min(self._num_searched, self._committed_len)
        return True

    def _add_byte(self, token: int, byte: int) -> None:
        """The tokenizer decodes a run of byte tokens as a whole: all of it, or none of it."""
        if self._run is None:
            is_first = self._context_len is None and len(self._window) == self._num_context
            self._run = self._run_before = self._prompt.run if is_first else b""
            self._text_before = self._tail
        self._run += bytes([byte])
        self._window.append(token)
        text = read_run(self._run, is_whole=False)
        self._is_run_valid = text != INCOMPLETE * len(self._run)
        if self._is_run_valid:
            num_shown = num_alike(read_run(self._run_before), text)
            self._tail = self._text_before + text[num_shown:]
            return
        # No later byte mends it, so it need not be kept.
        self._num_searched = min(self._num_searched, self._committed_len)
        num_new = len(self._run) - len(self._run_before)
        self._commit(self._text_before + INCOMPLETE * num_new, [token])
        self._run_before, self._text_before = self._run, ""

    def _end_run(self) -> None:
        if self._run is not None and self._is_run_valid:
            text = self._read_window()
            if text != self._tail:  # it ended inside a character
                self._num_searched = min(self._num_searched, self._committed_len)
            self._commit(text, self._window[-1:])
        self._run = None

    def _commit(self, text: str, context: list[int]) -> None:
        """Makes text final; `context` are the last of its tokens."""
        self._committed.append(text)
        self._committed_len += len(text)
        if self._stop:
            self._recent += text
        self._tail = ""
        self._window = list(context)
        self._num_context = len(context)
        self._context_len = len(self._decode(context))

    def _shorten_window(self) -> None:
        """Commits the start of a long window of bytes that are no text.

        A place where the two halves decode to the whole is a border between characters, once as
        many tokens follow as a character can have bytes.
        """
        pending = self._window[self._num_context :]
        whole = self._decode(pending)
        last = len(pending) - 2 * _MOST_BYTES
        for border in range(last, last - 2 * _MOST_BYTES, -1):
            left, right = self._decode(pending[:border]), self._decode(pending[border:])
            if left and right and left + right == whole and self._tail.endswith(whole):
                tail = self._tail
                self._commit(tail[: len(tail) - len(right)], [])
                self._window, self._tail = pending[border:], right
                return

    def _search(self) -> str | None:
        text = self._recent + self._tail.rstrip(INCOMPLETE)
        offset = self._committed_len - len(self._recent)  # of this text in the whole
        num_old = max(0, self._num_searched - offset)
        self._num_searched = max(self._num_searched, offset + len(text))
        self._recent = self._recent[-max(map(len, self._stop)) :]
        if self._num_tokens <= self._min_tokens:
            return None
        # What was complete before has been passed over.
        found = [(text.find(stop, max(0, num_old - len(stop) + 1)), stop) for stop in self._stop]
        found = [(start, stop) for start, stop in found if start >= 0]
        if not found:
            return None
        start, stop = min(found)
        end = offset + start + (len(stop) if self._is_stop_included else 0)
        self._cut = (self._join() + self._tail)[:end]
        return stop

    def _num_held_back(self) -> int:
        """Length of the longest end of the committed text that a stop string may begin with."""
        recent = self._recent
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, min(len(stop), len(recent) + 1))
                if recent.endswith(stop[:size])
            ),
            default=0,
        )

    def _join(self) -> str:
        self._committed = ["".join(self._committed)]
        return self._committed[0]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, **self._options) if token_ids else ""
