"""Streams of text: what they promise of any tokens, and stop strings over token borders."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folojax.models.files.checkpoint import open_checkpoint
from folojax.text.detokenizer import Detokenizer
from folojax.text.tokenizer import INCOMPLETE, Tokenizer
from folojax.text.tokenizer_files import load_tokenizer
from tests.letters import ByteTokens, WordTokens, make_metaspace_tokenizer

LETTERS = "abé中😀"
TEXTS = st.text(alphabet=LETTERS, max_size=30)
STOPS = st.lists(st.text(alphabet=LETTERS, min_size=1, max_size=4), min_size=1, max_size=3)
CUTS = st.lists(st.integers(0, 200), max_size=30)


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return load_tokenizer(open_checkpoint(None).directory)


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    return make_metaspace_tokenizer()


@pytest.fixture(scope="module")
def pieces(embedded: Tokenizer) -> list[int]:
    """Ids of the real tokenizer that are no text on their own: parts of characters."""
    ids = range(embedded.num_tokens)
    return [id_ for id_ in ids if INCOMPLETE in embedded.token_text(id_)]


def split(data: bytes, cuts: Sequence[int]) -> ByteTokens:
    """A vocabulary whose tokens 0, 1, 2 ... spell the data, cut at these places."""
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return ByteTokens([data[a:b] for a, b in itertools.pairwise(borders)])


def stream(detokenizer: Detokenizer, token_ids: Sequence[int]) -> tuple[str, str | None, int]:
    """Feeds tokens one by one and checks the promises; final text, stop string, tokens read."""
    shown, stop, count = "", None, 0
    while count < len(token_ids) and stop is None:
        count += 1
        stop = detokenizer.read(token_ids[:count])
        assert detokenizer.text.startswith(shown), "text was taken back"
        shown = detokenizer.text
    final = detokenizer.finish(token_ids[:count])
    assert final.startswith(shown), "text was taken back at the end"
    return final, stop, count


def check_equals_decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> None:
    for skip in (True, False):
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        final, _, _ = stream(detokenizer, token_ids)
        expected = tokenizer.decode(token_ids, skip_special_tokens=skip)
        assert final == expected
        # Nothing was held back for long: all but the last character, or run of bytes.
        if not expected.endswith(INCOMPLETE) and not tokenizer.byte_values:
            assert detokenizer.text == expected


@settings(max_examples=1500)
@given(data=st.data())
def test_random_tokens_of_a_real_tokenizer(
    embedded: Tokenizer, pieces: list[int], data: st.DataObject
) -> None:
    """Words, parts of characters that may fit together or not, special tokens."""
    one = st.one_of(
        st.sampled_from(pieces),
        st.integers(0, embedded.num_tokens - 1),
        st.sampled_from(sorted(embedded.special_ids)),
    )
    check_equals_decode(embedded, data.draw(st.lists(one, max_size=40)))


@settings(max_examples=150)
@given(data=st.data())
def test_random_tokens_of_a_vocabulary_with_byte_tokens(
    metaspace: Tokenizer, data: st.DataObject
) -> None:
    """A run of byte tokens is text only if all of it is; the first word loses its space."""
    ids = {byte: id_ for id_, byte in metaspace.byte_values.items()}
    word = st.integers(259, metaspace.num_tokens - 1).map(lambda id_: [id_])
    byte = st.integers(0, 255).map(lambda byte: [ids[byte]])
    letter = st.sampled_from(LETTERS + " ").map(lambda text: [ids[byte] for byte in text.encode()])
    special = st.integers(0, 2).map(lambda id_: [id_])
    parts = data.draw(st.lists(st.one_of(word, letter, letter, byte, special), max_size=20))
    check_equals_decode(metaspace, [token for part in parts for token in part])


@given(data=st.binary(max_size=40), cuts=CUTS)
def test_bytes_that_are_no_text_are_read_as_the_tokenizer_reads_them(
    data: bytes, cuts: list[int]
) -> None:
    tokenizer = split(data, cuts)
    final, _, _ = stream(Detokenizer(tokenizer), range(len(tokenizer.vocabulary)))
    assert final == data.decode(errors="replace")


@pytest.mark.parametrize("kind", ["byte", "partial", "special"])
def test_tokens_that_never_become_text_cost_no_more_each(
    embedded: Tokenizer, pieces: list[int], kind: str
) -> None:
    lone = next(id_ for id_ in pieces if embedded.decode([id_] * 3) == INCOMPLETE * 3)
    token_ids = {"byte": [lone] * 300, "partial": [pieces[0]] * 300, "special": [0] * 300}[kind]
    tokenizer = Tokenizer(embedded.hf)
    longest = 0

    def decode(ids: Sequence[int], **options: bool) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return embedded.decode(ids, **options)

    tokenizer.decode = decode  # type: ignore[method-assign, assignment]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
    for count in range(1, 301):
        detokenizer.read(token_ids[:count])
    assert longest < 80
    assert len(embedded.decode(token_ids)) - len(detokenizer.text) < 80


@given(text=TEXTS, cuts=CUTS, stop=STOPS, num_passed_over=st.integers(0, 10))
def test_stop_strings_are_found_as_by_decoding_everything_every_time(
    text: str, cuts: list[int], stop: list[str], num_passed_over: int
) -> None:
    tokenizer = split(text.encode(), cuts)
    token_ids = range(len(tokenizer.vocabulary))
    expected: tuple[str, str | None, int] = (text, None, len(token_ids))
    num_read = 0
    for count in token_ids:
        known = tokenizer.decode(token_ids[: count + 1]).rstrip(INCOMPLETE)
        ends = range(num_read + 1, len(known) + 1) if count >= num_passed_over else ()
        num_read = len(known)
        found = [(end - len(s), s) for end in ends for s in stop if known[:end].endswith(s)]
        if found:
            expected = (known[: min(found)[0]], min(found)[1], count + 1)
            break
    for is_included in (False, True):
        detokenizer = Detokenizer(
            tokenizer, stop, min_tokens=num_passed_over, is_stop_included=is_included
        )
        final, found_stop, count = stream(detokenizer, token_ids)
        suffix = found_stop if is_included and found_stop else ""
        assert (final.removesuffix(suffix), found_stop, count) == expected
        assert final.endswith(suffix)


@given(text=TEXTS, stop=STOPS, num_passed_over=st.integers(0, 10))
def test_stop_strings_in_runs_of_byte_tokens(
    metaspace: Tokenizer, text: str, stop: list[str], num_passed_over: int
) -> None:
    ids = {byte: id_ for id_, byte in metaspace.byte_values.items()}
    byte_tokens = ByteTokens([bytes([byte]) for byte in text.encode()])
    detokenizer = Detokenizer(byte_tokens, stop, min_tokens=num_passed_over)
    expected = stream(detokenizer, range(len(byte_tokens.vocabulary)))
    detokenizer = Detokenizer(metaspace, stop, min_tokens=num_passed_over)
    assert stream(detokenizer, [ids[byte] for byte in text.encode()]) == expected


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        (["ab", "cd"], ["bc"], ("a", "bc")),  # over a border
        (["a", "b", "c", "d"], ["abcd"], ("", "abcd")),  # over three
        (["xxENDyy"], ["END"], ("xx", "END")),  # inside a token
        (["abcabc"], ["c", "b"], ("a", "b")),  # the earliest, in whatever order they are given
        (["abc"], ["abc", "ab"], ("", "ab")),  # from the same place: the one that ended first
        (["ab", "ab"], ["ab"], ("", "ab")),
        (["ab", "ac"], ["aa", "ad"], ("abac", None)),
        (["a", "ab"], ["aab", "ab"], ("", "aab")),  # overlapping
        (["aa", "a", "b"], ["aab"], ("a", "aab")),  # a false start
    ],
)
def test_stop_strings(tokens: list[str], stop: list[str], expected: tuple[str, str | None]) -> None:
    tokenizer = ByteTokens([token.encode() for token in tokens])
    assert stream(Detokenizer(tokenizer, stop), range(len(tokens)))[:2] == expected


def test_text_that_could_begin_a_stop_string_is_held_back_until_it_cannot() -> None:
    tokenizer = ByteTokens([b"one ", b"EN", b"T", b" E", b"N", b"D!"])
    detokenizer = Detokenizer(tokenizer, ["END", "NDX"])
    shown = []
    for count in range(1, 7):
        detokenizer.read(range(count))
        shown.append(detokenizer.text)
    assert shown == ["one ", "one ", "one ENT", "one ENT ", "one ENT ", "one ENT "]


def test_spaces_between_words_are_kept() -> None:
    words = WordTokens([b" one", b" two", b" three"])
    detokenizer = Detokenizer(words, ["three t"], is_stop_included=True)
    assert stream(detokenizer, [0, 1, 2, 1, 0]) == ("one two three t", "three t", 4)
    assert stream(Detokenizer(words), [0, 1, 2, 1])[0] == "one two three two"


def test_a_stop_string_before_an_unfinished_character_is_found_at_once() -> None:
    tokenizer = ByteTokens([b"x", b"a\xf0\x9f", b"\x98\x80"])
    assert stream(Detokenizer(tokenizer, ["a"]), range(3)) == ("x", "a", 2)


def test_a_stop_string_waits_for_the_last_byte_of_its_character() -> None:
    tokenizer = ByteTokens([b"a", b"\xf0\x9f", b"\x98", b"\x80", b"b"])
    assert stream(Detokenizer(tokenizer, ["😀"]), range(5)) == ("a", "😀", 4)


def test_what_ended_before_min_tokens_is_passed_over_for_good() -> None:
    tokenizer = ByteTokens([b"a", b"b", b"a"])
    # The second stop string is long: looking back for it must not find the first one again.
    detokenizer = Detokenizer(tokenizer, ["a", "a very long stop string"], min_tokens=1)
    assert stream(detokenizer, [0, 1, 1, 2]) == ("abb", "a", 4)


def test_a_stop_string_may_begin_before_min_tokens() -> None:
    detokenizer = Detokenizer(ByteTokens([b"a", b"b"]), ["ab"], min_tokens=1)
    assert stream(detokenizer, [0, 1]) == ("", "ab", 2)


SENTENCES = [
    "The quick brown fox jumps over the lazy dog. It didn't see it coming , did it ?",
    "def f(x):\n    return x ** 2\n\n\nprint(f(3))",
    "héllo 😀 world — naïve 中文字符 и ещё 👩‍👩‍👧 end",
    "  leading and trailing  ",
]


@pytest.mark.parametrize("index", range(len(SENTENCES)))
def test_sentences_are_read_back(embedded: Tokenizer, metaspace: Tokenizer, index: int) -> None:
    sentence = SENTENCES[index]
    assert stream(Detokenizer(embedded), embedded.encode(sentence))[0] == sentence
    check_equals_decode(metaspace, metaspace.encode(sentence))


@pytest.mark.parametrize("stop", ["lazy", "azy dog", "zy d", ".", "n't s"])
def test_stop_strings_in_the_tokens_of_a_real_tokenizer(embedded: Tokenizer, stop: str) -> None:
    final, found, _ = stream(Detokenizer(embedded, [stop]), embedded.encode(SENTENCES[0]))
    assert found == stop
    assert final == SENTENCES[0].partition(stop)[0]


def test_an_emoji_of_several_tokens_stops_a_real_text(embedded: Tokenizer) -> None:
    token_ids = embedded.encode(SENTENCES[2])
    assert any(embedded.decode([token]).endswith(INCOMPLETE) for token in token_ids)
    final, found, _ = stream(Detokenizer(embedded, ["😀"]), token_ids)
    assert (final, found) == ("héllo ", "😀")


def test_special_tokens_leave_text_only_where_asked_for(embedded: Tokenizer) -> None:
    end = embedded.hf.eos_token
    token_ids = [*embedded.encode("Hello"), embedded.hf.eos_token_id, *embedded.encode(" you")]
    skipping = Detokenizer(embedded, [end], skip_special_tokens=True)
    assert stream(skipping, token_ids)[:2] == ("Hello you", None)
    keeping = Detokenizer(embedded, [end], skip_special_tokens=False)
    assert stream(keeping, token_ids)[:2] == ("Hello", end)
