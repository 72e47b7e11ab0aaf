"""The forms of a prompt, and what is said of anything else."""

from typing import Any

import numpy as np
import pytest

from folojax.requests.continuations import pair_continuations
from folojax.requests.prompts import (
    ParsedPrompt,
    conversations,
    parse_prompts,
    sampling_params_per_prompt,
)
from folojax.requests.sampling_params import SamplingParams
from folojax.text.tokenizer import Tokenizer


class CodePoints(Tokenizer):
    """One token a character."""

    def __init__(self) -> None:
        super().__init__(None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The code points."""
        return [ord(character) for character in text]


TOKENIZER = CodePoints()
DEFAULT = SamplingParams(top_k=9)
AB = ParsedPrompt("ab", [97, 98])


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("ab", [AB]),
        ("", [ParsedPrompt("", [])]),
        (["ab"], [AB]),
        (("ab", "ab"), [AB, AB]),
        ([5, 6], [ParsedPrompt(None, [5, 6])]),
        (np.array([5, 6]), [ParsedPrompt(None, [5, 6])]),
        ({"prompt": None, "prompt_token_ids": [5]}, [ParsedPrompt(None, [5])]),
        ((5, 6), [ParsedPrompt(None, (5, 6))]),
        (range(3), [ParsedPrompt(None, range(3))]),
        ([[5, 6], [7]], [ParsedPrompt(None, [5, 6]), ParsedPrompt(None, [7])]),
        ([[5, 6]], [ParsedPrompt(None, [5, 6])]),
        ([[]], [ParsedPrompt(None, [])]),
        ([], []),
        ((), []),
        ({"prompt": "ab"}, [AB]),
        ({"prompt_token_ids": [5, 6]}, [ParsedPrompt(None, [5, 6])]),
        ({"prompt": "ab", "prompt_token_ids": [5]}, [ParsedPrompt("ab", [5])]),
        (
            ["ab", [5], {"prompt": "ab"}, {"prompt_token_ids": (6,)}],
            [AB, ParsedPrompt(None, [5]), AB, ParsedPrompt(None, (6,))],
        ),
    ],
    ids=str,
)
def test_every_form_of_a_prompt(prompts: Any, expected: list[ParsedPrompt]) -> None:
    assert parse_prompts(prompts, TOKENIZER) == expected


@pytest.mark.parametrize("prompts", [[5], [[5], [6]], {"prompt_token_ids": [5]}], ids=str)
def test_token_ids_need_no_tokenizer(prompts: Any) -> None:
    assert parse_prompts(prompts, None)[0] == ParsedPrompt(None, [5])


@pytest.mark.parametrize("prompts", ["ab", [[5], "ab"], {"prompt": "ab"}], ids=str)
def test_text_needs_a_tokenizer(prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt \d is text, but the engine has no tokenizer"):
        parse_prompts(prompts, None)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (5, "prompts is a int"),
        (None, "prompts is a NoneType"),
        (b"ab", "prompts is a bytes"),
        ({"ab"}, "prompts is a set"),
        (["ab", None], "prompt 1 is a NoneType"),
        (["ab", 5], "prompt 1 is a int"),
        ([[5], b"ab"], "prompt 1 is a bytes"),
        ([1.5], "prompt 0 is a float"),
        ({"text": "ab"}, r"prompt 0 has keys \['text'\]"),
        (["ab", {}], r"prompt 1 has keys \[\]"),
        ({"prompt": None}, r"prompt 0 has keys \['prompt'\]; it needs"),
        ({"prompt": 5}, '"prompt" of prompt 0 is a int'),
        ({"prompt": "ab", "multi_modal_data": 1}, "prompt 0: multi_modal_data is 1; .* text only"),
        ({"prompt_token_ids": 5}, "prompt 0 is a int"),
    ],
    ids=str,
)
def test_anything_else_is_named_with_its_place(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prompts(prompts, TOKENIZER)


def test_one_set_of_parameters_serves_all_prompts() -> None:
    params = SamplingParams(top_k=3)
    assert sampling_params_per_prompt(params, 3, DEFAULT) == [params] * 3
    assert sampling_params_per_prompt(params, 0, DEFAULT) == []
    assert sampling_params_per_prompt(None, 2, DEFAULT) == [DEFAULT] * 2


def test_each_prompt_may_have_its_own_parameters() -> None:
    params = [SamplingParams(top_k=3), SamplingParams(top_k=4)]
    assert sampling_params_per_prompt(params, 2, DEFAULT) == params
    assert sampling_params_per_prompt(tuple(params), 2, DEFAULT) == params


@pytest.mark.parametrize("num_prompts", [0, 1, 3])
def test_a_list_of_another_length_is_refused(num_prompts: int) -> None:
    with pytest.raises(ValueError, match=f"has 2 entries for {num_prompts} prompts"):
        sampling_params_per_prompt([SamplingParams(), SamplingParams()], num_prompts, DEFAULT)


@pytest.mark.parametrize("params", [5, "ab", {"top_k": 3}, [{"top_k": 3}], [None]], ids=str)
def test_other_parameters_are_refused(params: Any) -> None:
    with pytest.raises(ValueError, match="sampling_params must be"):
        sampling_params_per_prompt(params, 1, DEFAULT)


def test_continuations_are_paired_with_their_prompts() -> None:
    five, six = ParsedPrompt(None, [5]), ParsedPrompt(None, [6])
    assert pair_continuations("ab", "ab", TOKENIZER) == [(AB, AB)]
    assert pair_continuations("ab", [[5], [6]], TOKENIZER) == [(AB, five), (AB, six)]
    mixed: list[Any] = ["ab", [5]]
    assert pair_continuations(mixed, mixed[::-1], TOKENIZER) == [(AB, five), (five, AB)]
    assert pair_continuations("ab", [], TOKENIZER) == []
    with pytest.raises(ValueError, match="continuations has 1 entries for 2 prompts"):
        pair_continuations(["ab", "ab"], "ab", TOKENIZER)
    with pytest.raises(ValueError, match="continuation 0 is a NoneType"):
        pair_continuations("ab", [None], TOKENIZER)  # type: ignore[arg-type]


def test_conversations_are_told_from_lists_of_them() -> None:
    one = [{"role": "user", "content": "x"}]
    assert conversations(one) == [one]
    assert conversations([one, one]) == [one, one]
    assert conversations([]) == []


@pytest.mark.parametrize("messages", [5, None, "text", {"role": "user"}, [[]], ["x"], [5]], ids=str)
def test_other_messages_are_refused(messages: Any) -> None:
    with pytest.raises(ValueError, match="messages"):
        conversations(messages)
