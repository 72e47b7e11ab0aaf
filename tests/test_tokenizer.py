"""Text of tokens, and stop strings over their borders."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folojax.models.checkpoint import open_checkpoint
from folojax.tokenizer import INCOMPLETE, StopStringSearch, Tokenizer, load_tokenizer


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


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return load_tokenizer(open_checkpoint(None).directory)


def split(data: bytes, cuts: Sequence[int]) -> ByteTokens:
    """A vocabulary whose tokens 0, 1, 2 ... spell the data, cut at these places."""
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return ByteTokens([data[a:b] for a, b in itertools.pairwise(borders)])


def feed(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str], num_passed_over: int = 0
) -> tuple[list[tuple[str, int] | None], str]:
    """Adds tokens until one completes a stop string; returns all answers, and the text."""
    search = StopStringSearch(tokenizer, stop)
    answers = []
    for count, token in enumerate(token_ids, start=1):
        answers.append(search.add(token, is_searched=count > num_passed_over))
        if answers[-1] is not None:
            break
    return answers, search.text


def expected_answers(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str], num_passed_over: int
) -> list[tuple[str, int] | None]:
    """The same, by decoding everything every time: of all that ended just now, the earliest."""
    answers: list[tuple[str, int] | None] = []
    num_read = 0
    for count in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:count])
        found = []
        if not text.endswith(INCOMPLETE):
            ends = range(num_read + 1, len(text) + 1) if count > num_passed_over else ()
            found = [(end - len(s), s) for end in ends for s in stop if text[:end].endswith(s)]
            num_read = len(text)
        answers.append((min(found)[1], min(found)[0]) if found else None)
        if found:
            break
    return answers


# Few letters, so that stop strings do occur, of one to four bytes.
TEXTS = st.text(alphabet="abé中😀", max_size=30)


@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 200), max_size=30),
    stop=st.lists(st.text(alphabet="abé中😀", min_size=1, max_size=4), min_size=1, max_size=3),
    num_passed_over=st.integers(0, 10),
)
def test_the_search_equals_decoding_everything_every_time(
    text: str, cuts: list[int], stop: list[str], num_passed_over: int
) -> None:
    tokenizer = split(text.encode(), cuts)
    token_ids = range(len(tokenizer.vocabulary))
    answers, read = feed(tokenizer, token_ids, stop, num_passed_over)
    assert answers == expected_answers(tokenizer, token_ids, stop, num_passed_over)
    if not answers or answers[-1] is None:
        assert read == text


@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 200), max_size=20))
def test_bytes_that_are_no_text_are_read_as_the_tokenizer_reads_them(
    data: bytes, cuts: list[int]
) -> None:
    data += b"."  # ends on a whole character
    tokenizer = split(data, cuts)
    _, read = feed(tokenizer, range(len(tokenizer.vocabulary)), ["\0never\0"])
    assert read == data.decode(errors="replace")


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        (["ab", "cd"], ["bc"], ("bc", 1)),  # over a border
        (["a", "b", "c", "d"], ["abcd"], ("abcd", 0)),  # over three
        (["xxENDyy"], ["END"], ("END", 2)),  # inside a token
        (["abcabc"], ["c", "b"], ("b", 1)),  # the earliest, whatever the order they are given in
        (["abc"], ["abc", "ab"], ("ab", 0)),  # from the same place: the one that ended first
        (["ab", "ab"], ["ab"], ("ab", 0)),
        (["ab", "ac"], ["aa", "ad"], None),
    ],
)
def test_stop_strings(tokens: list[str], stop: list[str], expected: tuple[str, int] | None) -> None:
    tokenizer = ByteTokens([token.encode() for token in tokens])
    answers, _ = feed(tokenizer, range(len(tokens)), stop)
    assert answers[-1] == expected


def test_spaces_between_words_are_kept() -> None:
    words = WordTokens([b" one", b" two", b" three"])
    answers, text = feed(words, [0, 1, 2, 1], ["three t"])
    assert answers == [None, None, None, ("three t", 8)]
    assert text == words.decode([0, 1, 2, 1]) == "one two three two"


def test_a_stop_string_waits_for_the_last_byte_of_its_character() -> None:
    tokenizer = ByteTokens([b"a", b"\xf0\x9f", b"\x98", b"\x80", b"b"])
    answers, text = feed(tokenizer, range(5), ["😀"])
    assert answers == [None, None, None, ("😀", 1)]
    assert text == "a😀"


def test_what_ended_before_min_tokens_is_passed_over_for_good() -> None:
    tokenizer = ByteTokens([b"a", b"b", b"a"])
    # The second stop string is long: looking back for it must not find the first one again.
    answers, _ = feed(tokenizer, [0, 1, 1, 2], ["a", "a very long stop string"], num_passed_over=1)
    assert answers == [None, None, None, ("a", 3)]


def test_a_stop_string_may_begin_before_min_tokens() -> None:
    answers, _ = feed(ByteTokens([b"a", b"b"]), [0, 1], ["ab"], num_passed_over=1)
    assert answers == [None, ("ab", 0)]


SENTENCES = [
    "The quick brown fox jumps over the lazy dog. It didn't see it coming , did it ?",
    "def f(x):\n    return x ** 2\n\n\nprint(f(3))",
    "héllo 😀 world — naïve 中文字符 и ещё 👩‍👩‍👧 end",
    "  leading and trailing  ",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_text_of_the_search_is_the_tokenizers(embedded: Tokenizer, sentence: str) -> None:
    token_ids = embedded.encode(sentence)
    _, text = feed(embedded, token_ids, ["\0never\0"])
    assert text == embedded.decode(token_ids) == sentence


@pytest.mark.parametrize("stop", ["lazy", "azy dog", "zy d", ".", "n't s"])
def test_stop_strings_in_the_tokens_of_a_real_tokenizer(embedded: Tokenizer, stop: str) -> None:
    answers, text = feed(embedded, embedded.encode(SENTENCES[0]), [stop])
    assert answers[-1] == (stop, SENTENCES[0].index(stop))
    assert SENTENCES[0].startswith(text)


def test_an_emoji_of_several_tokens_stops_a_real_text(embedded: Tokenizer) -> None:
    token_ids = embedded.encode(SENTENCES[2])
    assert any(embedded.decode([token]).endswith(INCOMPLETE) for token in token_ids)
    answers, _ = feed(embedded, token_ids, ["😀"])
    assert answers[-1] == ("😀", SENTENCES[2].index("😀"))


def test_special_tokens_leave_text_only_where_asked_for(embedded: Tokenizer) -> None:
    end = embedded.hf.eos_token
    token_ids = [*embedded.encode("Hello"), embedded.hf.eos_token_id, *embedded.encode(" you")]
    assert embedded.decode(token_ids) == "Hello you"
    assert embedded.decode(token_ids, skip_special_tokens=False) == f"Hello{end} you"
    for skip in (True, False):
        search = StopStringSearch(embedded, [end], skip_special_tokens=skip)
        answers = [search.add(token) for token in token_ids]
        assert ((end, 5) in answers) == (not skip)


def test_a_chat_is_rendered_with_its_special_tokens_once(embedded: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    token_ids = embedded.apply_chat_template(messages, add_generation_prompt=True)
    text = embedded.decode(token_ids, skip_special_tokens=False)
    assert text == embedded.hf.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text.count("Be brief.") == text.count("Hi") == 1
    own = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    token_ids = embedded.apply_chat_template(messages, own)
    text = embedded.decode(token_ids, skip_special_tokens=False)
    assert text == f"{embedded.hf.bos_token}[Be brief.][Hi]"


def test_a_chat_without_any_template_is_refused() -> None:
    class Bare:
        chat_template = None

    with pytest.raises(ValueError, match="no chat template: pass chat_template="):
        Tokenizer(Bare()).apply_chat_template([{"role": "user", "content": "Hi"}])


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="no tokenizer could be loaded from") as info:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(info.value)
