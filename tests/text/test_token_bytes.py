"""The bytes of tokens: together they are the text, with every kind of tokenizer."""

import random

import pytest

from folojax.text.token_bytes import token_bytes
from tests.letters import make_metaspace_tokenizer
from tests.tokenizer_kinds import CORPUS, KINDS, SPACE, SPECIAL, make_tokenizer, random_text

WHOLE = [kind for kind in KINDS if not kind.startswith("word")]
"""Those that lose no letter of a text."""


@pytest.mark.parametrize("kind", WHOLE)
def test_they_are_those_of_the_text(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    known = token_bytes(tokenizer, tokenizer.num_tokens + 5)
    assert known[-5:] == [b""] * 5
    draw = random.Random(0)
    for text in (*CORPUS, *(random_text(draw) for _ in range(100))):
        token_ids = tokenizer.encode_inside(text)
        # SentencePiece reads its sign for a space as one.
        expected = text if kind == "byte-level" else text.replace(SPACE, " ")
        assert b"".join(known[token] for token in token_ids) == expected.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_those_of_their_name(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    known = token_bytes(tokenizer, tokenizer.num_tokens)
    for name in SPECIAL:
        assert known[tokenizer.ids_by_name[name]] == name.encode()


def test_a_token_that_is_half_a_character_is_its_byte() -> None:
    tokenizer = make_metaspace_tokenizer()
    known = token_bytes(tokenizer, tokenizer.num_tokens)
    assert known[3 : 3 + 256] == [bytes([byte]) for byte in range(256)]
