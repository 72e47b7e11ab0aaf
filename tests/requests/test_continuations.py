"""Where a text is cut into prompt and continuation, with real tokenizers."""

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from folojax.requests.continuations import pair_continuations
from folojax.text.tokenizer import Tokenizer
from tests.tokenizer_kinds import DUMMY_PREFIX, KINDS, make_tokenizer, random_text


def texts(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    return [tokenizer.token_text(token) for token in token_ids]


def harness_split(tokenizer: Tokenizer, before: str, after: str) -> tuple[list[int], list[int]]:
    """As lm-evaluation-harness documents it, for a causal model."""
    spaces = before[len(before.rstrip()) :]
    if spaces:
        before, after = before.rstrip(), spaces + after
    whole, num_before = tokenizer.encode(before + after), len(tokenizer.encode(before))
    return whole[:num_before], whole[num_before:]


@pytest.mark.parametrize("kind", [*DUMMY_PREFIX, "byte-level"])
def test_a_word_after_a_prompt_has_no_second_space(kind: str) -> None:
    """As in lm-evaluation-harness 1322: " Paris" by itself would begin with a lone space."""
    tokenizer = make_tokenizer(kind)
    ((prompt, continuation),) = pair_continuations("The capital", " Paris", tokenizer)
    joint = tokenizer.encode("The capital Paris")
    assert [*prompt.token_ids, *continuation.token_ids] == joint
    assert "".join(texts(tokenizer, list(continuation.token_ids))) == " Paris"
    assert (prompt.text, continuation.text) == ("The capital", " Paris")


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_where_the_harness_cuts_them(kind: str) -> None:
    """As in lm-evaluation-harness 63, 546 and 4055: anything may become of the border."""
    tokenizer, random_ = make_tokenizer(kind), random.Random(kind)
    num_refused = 0
    for _ in range(200):
        before, after = random_text(random_), random_text(random_)
        expected = harness_split(tokenizer, before, after)
        if len(tokenizer.encode(before.rstrip())) == 1:  # BOS: nothing would be left of the prompt
            continue
        if not expected[1]:
            num_refused += 1
            with pytest.raises(ValueError, match="has no token behind"):
                pair_continuations(before, after, tokenizer)
            continue
        ((prompt, continuation),) = pair_continuations(before, after, tokenizer)
        assert (prompt.token_ids, continuation.token_ids) == expected
    assert num_refused < 20


def test_spaces_at_the_end_of_the_prompt_belong_to_the_continuation() -> None:
    for kind in (*DUMMY_PREFIX, "byte-level"):
        tokenizer = make_tokenizer(kind)
        pairs = pair_continuations(["The sea", "The sea "], [" is", "is"], tokenizer)
        assert pairs[0][0].token_ids == pairs[1][0].token_ids
        assert pairs[0][1].token_ids == pairs[1][1].token_ids


@pytest.mark.parametrize("kind", DUMMY_PREFIX)
def test_a_border_inside_a_token_counts_it_to_the_prompt(kind: str) -> None:
    """As in lm-evaluation-harness 4055; what has no token left is refused with its index."""
    tokenizer = make_tokenizer(kind)
    num_before = len(tokenizer.encode("The s"))
    ((prompt, continuation),) = pair_continuations("The s", "ea is blue and high", tokenizer)
    whole = tokenizer.encode("The sea is blue and high")
    assert prompt.token_ids == whole[:num_before]
    assert continuation.token_ids == whole[num_before:]


def test_a_continuation_without_a_token_of_its_own_is_refused_with_its_index() -> None:
    tokenizer = make_tokenizer("byte-level")
    parts = ("hel", "lo")
    assert len(tokenizer.encode("hello")) <= len(tokenizer.encode("hel"))
    with pytest.raises(ValueError, match=r"continuation 1 is 'lo', which has no token .* border"):
        pair_continuations(["one", parts[0]], [" two", parts[1]], tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_taken_as_they_are(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    ids = tokenizer.encode("The sea ", add_special_tokens=False)
    text = {"prompt": "The sea ", "prompt_token_ids": ids}
    for prompts, continuations in ((ids, [[5, 6]]), (text, [[5, 6]]), ("The sea ", [[5, 6]])):
        ((prompt, continuation),) = pair_continuations(prompts, continuations, tokenizer)
        assert list(prompt.token_ids)[-len(ids) :] == ids
        assert continuation.token_ids == [5, 6]
    ((prompt, continuation),) = pair_continuations(text, "hello", tokenizer)
    assert prompt.token_ids == ids
    assert continuation.token_ids


@pytest.mark.parametrize("kind", DUMMY_PREFIX)
@pytest.mark.parametrize("word", [" sea", "sea", " is blue", "\n", "中"])
def test_text_after_token_ids_is_encoded_as_inside_of_a_text(kind: str, word: str) -> None:
    tokenizer = make_tokenizer(kind)
    ids = tokenizer.encode("The")
    ((_, continuation),) = pair_continuations(ids, word, tokenizer)
    before = tokenizer.decode(ids)
    assert tokenizer.decode([*ids, *continuation.token_ids]) == before + word


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_prompt_is_what_the_tokenizer_begins_a_text_with(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    for before in ("", " ", "\n"):
        ((prompt, continuation),) = pair_continuations(before, "The sea", tokenizer)
        whole = tokenizer.encode(before + "The sea")
        assert [*prompt.token_ids, *continuation.token_ids] == whole
        assert prompt.token_ids[0] == tokenizer.hf.bos_token_id


def test_a_prompt_of_nothing_but_spaces_keeps_them() -> None:
    tokenizer = make_tokenizer("bpe-no-prefix")
    tokenizer = Tokenizer(_without_bos(tokenizer))
    ((prompt, continuation),) = pair_continuations("    ", "sea", tokenizer)
    assert tokenizer.decode(prompt.token_ids) == "    "
    assert continuation.token_ids


def _without_bos(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    backend = Backend.from_str(tokenizer.hf.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return PreTrainedTokenizerFast(tokenizer_object=backend)
