"""The text of an output that goes on from a prompt, with real tokenizers of every kind."""

import itertools
import random

import pytest

from folojax.text.detokenizer import Detokenizer
from folojax.text.tokenizer import INCOMPLETE, Tokenizer
from tests.tokenizer_kinds import DUMMY_PREFIX, KINDS, make_tokenizer, random_text


def read(
    tokenizer: Tokenizer,
    prompt: list[int],
    output: list[int],
    ends: list[int] | None = None,
    stop: tuple[str, ...] = (),
    is_skipping: bool = True,
) -> str:
    """The text of an output that is read up to each of these places; it never takes text back."""
    detokenizer = Detokenizer(
        tokenizer, stop, prompt_token_ids=prompt, skip_special_tokens=is_skipping
    )
    shown = ""
    for end in [*(range(len(output)) if ends is None else ends), len(output)]:
        detokenizer.read(output[:end])
        assert detokenizer.text.startswith(shown), "text was taken back"
        shown = detokenizer.text
    final = detokenizer.finish(output)
    assert final.startswith(shown), "text was taken back at the end"
    return final


def expected_text(
    tokenizer: Tokenizer, prompt: list[int], output: list[int], is_skipping: bool = True
) -> str:
    """The tokenizer's decode of all tokens, less that of the prompt."""
    before = tokenizer.decode(prompt, skip_special_tokens=is_skipping) if prompt else ""
    whole = tokenizer.decode([*prompt, *output], skip_special_tokens=is_skipping)
    # A prompt that ends inside a character is the whole's start up to that character.
    shared = len(before)
    while not whole.startswith(before[:shared]):
        shared -= 1
    return whole[shared:]


def check_kind(kind: str, num_texts: int) -> None:
    tokenizer, random_ = make_tokenizer(kind), random.Random(kind)
    special = sorted(tokenizer.special_ids)
    for _ in range(num_texts):
        token_ids = tokenizer.encode(random_text(random_), random_.random() < 0.5)
        has_break = random_.random() < 0.2
        if has_break:
            token_ids.insert(random_.randint(0, len(token_ids)), random_.choice(special))
        border = random_.randint(0, len(token_ids))
        prompt, output = token_ids[:border], token_ids[border:]
        ends = sorted(random_.choices(range(len(output) + 1), k=random_.randint(0, len(output))))
        for is_skipping in (True, False):
            text = read(tokenizer, prompt, output, ends, is_skipping=is_skipping)
            before = tokenizer.decode(prompt, skip_special_tokens=is_skipping).rstrip(INCOMPLETE)
            whole = tokenizer.decode(token_ids, skip_special_tokens=is_skipping)
            # A special token inside a character may undo a run of bytes, the prompt's among them.
            if has_break and not whole.startswith(before):
                continue
            assert text == expected_text(tokenizer, prompt, output, is_skipping), (prompt, output)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_output_are_the_text_of_all_tokens(kind: str) -> None:
    """As in transformers 22710, 28776, vllm 984: token by token, whatever comes between."""
    check_kind(kind, 150)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_output_are_the_text_of_all_tokens_of_many_texts(kind: str) -> None:
    check_kind(kind, 2000)


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_at_all_give_text_that_is_never_taken_back(kind: str) -> None:
    """As in vllm 26071, 21951: tokens that no text is encoded to, bytes that are no characters."""
    tokenizer, random_ = make_tokenizer(kind), random.Random(kind)
    for _ in range(150):
        token_ids = random_.choices(range(tokenizer.num_tokens), k=random_.randint(1, 40))
        border = random_.randint(0, len(token_ids))
        prompt, output = token_ids[:border], token_ids[border:]
        text = read(tokenizer, prompt, output)
        whole = tokenizer.decode(token_ids)
        if whole.startswith(tokenizer.decode(prompt).rstrip(INCOMPLETE)):
            assert text == expected_text(tokenizer, prompt, output)


@pytest.mark.parametrize("kind", DUMMY_PREFIX)
@pytest.mark.parametrize("text", [" hello", "    return x", "\n\n", "a", " 中", "  "])
def test_the_space_before_the_first_word_is_kept(kind: str, text: str) -> None:
    """As in mlx-lm 1754, transformers 47487, llama-cpp-python 2362: none is lost, none twice."""
    tokenizer = make_tokenizer(kind)
    before = tokenizer.encode("The sea")
    whole = tokenizer.encode("The sea" + text)
    assert whole[: len(before)] == before or text == "a"
    output = whole[len(before) :] if text != "a" else tokenizer.encode_inside("a")
    assert read(tokenizer, before, output) == text


@pytest.mark.parametrize("kind", DUMMY_PREFIX)
def test_a_prompt_of_nothing_but_special_tokens_leaves_the_first_word_first(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    bos, *words = tokenizer.encode("hello world")
    assert read(tokenizer, [bos], words) == "hello world"
    assert read(tokenizer, [bos], words, is_skipping=False) == " hello world"


@pytest.mark.parametrize("kind", DUMMY_PREFIX)
def test_a_stop_string_with_a_leading_space_is_found_in_the_first_word(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    prompt = tokenizer.encode("The")
    output = tokenizer.encode("The hello")[len(prompt) :]
    detokenizer = Detokenizer(tokenizer, (" hello",), prompt_token_ids=prompt)
    assert detokenizer.read(output) == " hello"
    assert detokenizer.finish(output) == ""


@pytest.mark.parametrize("kind", ["bpe", "unigram", "metaspace", "byte-level"])
@pytest.mark.parametrize("letter", ["🌶", "中", "é", "👩‍👩‍👧"])
def test_a_prompt_may_end_inside_a_character(kind: str, letter: str) -> None:
    """As in vllm 8627: characters of several tokens."""
    tokenizer = make_tokenizer(kind)
    start = len(tokenizer.encode("Hello world "))
    token_ids = tokenizer.encode(f"Hello world {letter} is")
    for border in range(start, len(token_ids)):
        prompt, output = token_ids[:border], token_ids[border:]
        known = tokenizer.decode(prompt).rstrip(INCOMPLETE)
        assert known + read(tokenizer, prompt, output) == f"Hello world {letter} is"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (b"\xe4\xb8", b"\xad", "中"),
        (b"\xc3\xa9\xe4\xb8", b"\xad", "é中"),  # none of it was text before
        (b"A", b"\xff", INCOMPLETE),  # the prompt's letter is no text any more: not the output's
        (b"A", b"B", "B"),
        (b"\xff", b"A", INCOMPLETE),
        (b"A\xe4", b"B", INCOMPLETE),
        (b"AB", b"\xe4\xb8", INCOMPLETE * 2),
    ],
)
def test_a_run_of_bytes_may_begin_in_the_prompt(
    kind: str, before: bytes, after: bytes, expected: str
) -> None:
    tokenizer = make_tokenizer(kind)
    ids = {byte: id_ for id_, byte in tokenizer.byte_values.items()}
    for prefix in ([], tokenizer.encode("Hello")):
        prompt = [*prefix, *(ids[byte] for byte in before)]
        output = [ids[byte] for byte in after]
        assert read(tokenizer, prompt, output) == expected
        word = tokenizer.encode_inside(" is")
        assert read(tokenizer, prompt, [*output, *word]) == expected + " is"


def test_spaces_that_transformers_takes_out_are_taken_out_of_streams_too() -> None:
    tokenizer = make_tokenizer("word-piece-cleaned")
    token_ids = tokenizer.encode("We don't say so , do we ? They've gone ! I'm here .")
    for border in range(len(token_ids)):
        prompt, output = token_ids[:border], token_ids[border:]
        assert read(tokenizer, prompt, output) == expected_text(tokenizer, prompt, output)


def test_only_tokenizers_that_are_cleaned_up_hold_spaces_back() -> None:
    assert [kind for kind in KINDS if make_tokenizer(kind).is_cleaning_up] == ["word-piece-cleaned"]
    bpe = make_tokenizer("byte-level").hf
    bpe = type(bpe)(tokenizer_object=bpe.backend_tokenizer, clean_up_tokenization_spaces=True)
    tokenizer = Tokenizer(bpe)  # transformers does not clean up what BPE has decoded
    detokenizer = Detokenizer(tokenizer, prompt_token_ids=tokenizer.encode("a"))
    detokenizer.read(tokenizer.encode(" ."))
    assert detokenizer.text == " ."


def test_only_the_end_of_a_long_prompt_is_decoded() -> None:
    tokenizer = Tokenizer(make_tokenizer("bpe").hf)
    prompt = tokenizer.encode("The sea is blue. " * 500)
    lengths = []

    def decode(ids: list[int], **options: bool) -> str:
        lengths.append(len(ids))
        return Tokenizer.decode(tokenizer, ids, **options)

    tokenizer.decode = decode  # type: ignore[method-assign, assignment]
    output = tokenizer.encode_inside(" The sea")
    assert read(tokenizer, prompt, output) == " The sea"
    assert max(lengths) < 40


@pytest.mark.parametrize("filler", ["▁▁▁▁▁▁▁▁", "<0xE4>"])
def test_as_much_of_the_prompt_is_decoded_as_is_needed(filler: str) -> None:
    """Spaces that a decoder may drop, and runs of bytes that it decodes as a whole."""
    tokenizer = make_tokenizer("bpe")
    letter = "🌶".encode()
    ids = {byte: id_ for id_, byte in tokenizer.byte_values.items()}
    run = [ids[byte] for byte in "日本".encode() * 10 + letter[:2]]
    fill = [tokenizer.hf.convert_tokens_to_ids(filler)] * 40
    prompts = [[*tokenizer.encode("a"), *fill], [*tokenizer.encode("a"), *fill, *run], fill, run]
    for prompt, size in itertools.product(prompts, (1, 2)):
        output = [ids[byte] for byte in letter[2 : 2 + size]] + tokenizer.encode_inside(" is")
        assert read(tokenizer, prompt, output) == expected_text(tokenizer, prompt, output)
