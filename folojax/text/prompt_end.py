"""The end of a prompt, for the text that goes on from it.

What a token spells depends on what stands before it: SentencePiece drops the space of a first word
and keeps it in all others, WordPiece joins pieces, and a prompt may end inside a character. So the
text of an output is what the tokenizer makes of prompt and output, less what it makes of the
prompt::

    decode(prompt)             Hello world ?
    decode(prompt + output)    Hello world \N{HOT PEPPER} is hot
                               ^^^^^^^^^^^^ in both: the text of the output is the rest

where `?` stands for a character's first bytes. A few tokens of the prompt are enough to know.
"""

import codecs
from collections.abc import Callable, Sequence

from folojax.text.tokenizer import INCOMPLETE, Tokenizer

_FEWEST = 16
"""Tokens, more than the bytes of several characters: behind them a decoder is in step again."""


class PromptEnd:
    """As many of a prompt's last tokens as the text behind them depends on.

    `decode` is the tokenizer's, with the options of the output.

    Attributes:
        token_ids: The last tokens, those that leave no text left out.
        text: Theirs; INCOMPLETE where a character is not whole.
        run: Bytes of the byte tokens at the very end: one run with those that follow.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        token_ids: Sequence[int],
        is_special_skipped: bool,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        byte_values = tokenizer.byte_values if token_ids else {}

        def is_hidden(token: int) -> bool:
            # Rows of the vocabulary that the tokenizer does not know leave no text either.
            is_skipped = is_special_skipped and token in tokenizer.special_ids
            return is_skipped or token >= tokenizer.num_tokens

        self.token_ids: list[int] = []
        self.text = ""
        start = len(token_ids)
        while start:
            start = max(0, start - max(_FEWEST, len(token_ids) - start))
            # A run of byte tokens is decoded as a whole, so it is not to be cut.
            while start and (is_hidden(token_ids[start]) or token_ids[start] in byte_values):
                start -= 1
            self.token_ids = [token for token in token_ids[start:] if not is_hidden(token)]
            self.text = decode(self.token_ids)
            # A decoder that drops spaces at the start must have dropped what it drops.
            if len(self.token_ids) >= _FEWEST and self.text.strip(INCOMPLETE + " \n\t"):
                break
        num_others = len(self.token_ids)
        while num_others and self.token_ids[num_others - 1] in byte_values:
            num_others -= 1
        self.run = bytes(byte_values[token] for token in self.token_ids[num_others:])

    def output_of(self, text: str) -> str:
        """The output's part of the text of these tokens and an output."""
        if text.startswith(self.text):
            return text[len(self.text) :]
        num_shared = num_alike(self.text, text)
        if self.run and num_shared < len(self.text.rstrip(INCOMPLETE)):
            # A byte of the output has made the whole run invalid: one INCOMPLETE for each byte,
            # and those of the prompt's bytes are no output.
            num_shared = max(0, len(self.text) - len(read_run(self.run))) + len(self.run)
        return text[num_shared:]


def read_run(run: bytes, is_whole: bool = True) -> str:
    """The text of a run of byte tokens: UTF-8 if all of it is, else an INCOMPLETE for each byte.

    A run that is not whole may end inside a character, which is left out.
    """
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(run, final=is_whole)
    except UnicodeDecodeError:
        return INCOMPLETE * len(run)


def num_alike(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
