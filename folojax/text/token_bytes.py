"""The bytes of every token, for those who read texts byte by byte: grammars."""

import functools

from folojax.text.tokenizer import INCOMPLETE, Tokenizer


def token_bytes(tokenizer: Tokenizer, count: int) -> list[bytes]:
    """What each of the ids below `count` adds to a text that goes on; nothing where none knows.

    Special tokens have the bytes of their name, which no text is made of.
    """
    found = [b""] * count
    letters = _byte_of_letter() if tokenizer.is_byte_level else {}
    for name, token_id in tokenizer.ids_by_name.items():
        if token_id >= count:
            continue
        if token_id in tokenizer.special_ids:
            found[token_id] = name.encode()
        elif token_id in tokenizer.byte_values:
            found[token_id] = bytes([tokenizer.byte_values[token_id]])
        elif letters:
            # A token that was added has a name in plain letters.
            is_coded = all(letter in letters for letter in name)
            found[token_id] = bytes(map(letters.__getitem__, name)) if is_coded else name.encode()
        elif INCOMPLETE not in (text := tokenizer.token_text(token_id)):
            found[token_id] = text.encode()
    return found


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """How GPT-2 spells bytes: those that print as themselves, others as letters from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}
