"""What users hand over: numbers of other libraries, text that is none, lines of every kind."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from folojax import LLM, SamplingParams
from folojax.requests.prompts import ParsedPrompt, parse_prompts
from folojax.requests.validation import Validator
from folojax.sched.config import SchedulerConfig
from tests.jsonl_runs import entries, line, run
from tests.stub_llm import StubLLM
from tests.tokenizer_kinds import DUMMY_PREFIX, make_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=3)
LONE = ("\ud83d", "a\ude00b", "hello \ud800 world", "\udbc0" * 3)
"""As in tiktoken 82, transformers 43459: halves of surrogate pairs."""

IDS = [5, 6, 7]
SAME_IDS: list[Any] = [
    [np.int64(5), np.int64(6), np.int64(7)],
    (np.int32(5), 6, np.uint8(7)),
    np.array(IDS),
    np.array(IDS, np.uint16),
    jnp.array(IDS),
    list(jnp.array(IDS)),
    torch.tensor(IDS),
    list(torch.tensor(IDS)),
    range(5, 8),
]


@pytest.mark.parametrize("ids", SAME_IDS, ids=lambda ids: str(type(ids)))
def test_token_ids_are_numbers_of_any_library(ids: Any) -> None:
    """As in verl 772: a flat list of np.int64 is a prompt, not a list of prompts."""
    for prompts in (ids, [ids], {"prompt_token_ids": ids}):
        ((text, found),) = parse_prompts(prompts, None)
        assert (text, list(found)) == (None, IDS)
        assert all(type(token) is int for token in found)
    params = SamplingParams(stop_token_ids=ids, allowed_token_ids=ids)
    assert params.stop_token_ids == params.allowed_token_ids == (5, 6, 7)
    bias: Any = {np.int64(5): np.float32(2)}
    assert SamplingParams(logit_bias=bias).logit_bias == {5: 2.0}


def test_rows_of_an_array_are_prompts() -> None:
    wanted = [ParsedPrompt(None, [5, 6]), ParsedPrompt(None, [7, 8])]
    rows = [[5, 6], [7, 8]]
    arrays: list[Any] = [np.array(rows), jnp.array(rows), torch.tensor(rows)]
    for array in arrays:
        assert parse_prompts(array, None) == wanted
        assert parse_prompts(list(array), None) == wanted


def test_parameters_are_numbers_of_any_library() -> None:
    params = SamplingParams(
        temperature=jnp.float32(0.5),
        top_k=np.int64(3),  # type: ignore[arg-type]
        top_p=np.float32(0.5),  # type: ignore[arg-type]
        max_tokens=jnp.int32(4),
        seed=np.uint64(2**63),  # type: ignore[arg-type]
        ignore_eos=np.True_,  # type: ignore[arg-type]
    )
    assert params == SamplingParams(
        temperature=0.5, top_k=3, top_p=0.5, max_tokens=4, seed=2**63, ignore_eos=True
    )


@pytest.mark.parametrize("ids", [[np.bool_(True)], np.array([1.5]), [jnp.float32(5)], [True]])
def test_what_is_no_integer_is_no_token_id(letters_llm: LLM, ids: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt 1.*(integers|must be text)"):
        letters_llm.generate([IDS, ids], GREEDY)
    with pytest.raises(ValueError, match="stop_token_ids"):
        SamplingParams(stop_token_ids=ids)


def test_numbers_of_any_library_reach_the_engine(letters_llm: LLM) -> None:
    (wanted,) = letters_llm.generate([IDS], GREEDY, use_tqdm=False)
    for ids in SAME_IDS:
        (output,) = letters_llm.generate(ids, GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert output.prompt_token_ids == IDS
    (score,) = letters_llm.score(np.array(IDS), [jnp.array([8, 9])], use_tqdm=False)
    (same,) = letters_llm.score([IDS], [[8, 9]], use_tqdm=False)
    assert (score.token_ids, score.logprobs) == (same.token_ids, same.logprobs)


@pytest.mark.parametrize("text", LONE)
@pytest.mark.parametrize("kind", ["bpe", "byte-level", "word-piece"])
def test_half_of_a_surrogate_pair_is_refused_by_place(kind: str, text: str) -> None:
    tokenizer = make_tokenizer(kind)
    place = next(i for i, letter in enumerate(text) if letter >= "\ud800")
    with pytest.raises(ValueError, match=rf"prompt 1 cannot be encoded: .* at {place}, half of a"):
        parse_prompts(["fine", text], tokenizer)
    with pytest.raises(ValueError, match="continuation 0 cannot be encoded"):
        parse_prompts(text, tokenizer, "continuation")


@pytest.mark.parametrize("text", LONE)
def test_half_of_a_surrogate_pair_harms_no_other_request(letters_llm: LLM, text: str) -> None:
    mixed: list[Any] = ["ab", {"prompt": text}]
    refused = [
        lambda: letters_llm.generate(["ab", text], GREEDY),
        lambda: letters_llm.generate(mixed, GREEDY),
        lambda: letters_llm.chat(
            [[{"role": "user", "content": one}] for one in ("ab", text)], GREEDY
        ),
        lambda: letters_llm.score(["ab", text], ["c", "d"]),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=r"(prompt|conversation) 1.* half of a surrogate pair"):
            call()
    with pytest.raises(ValueError, match=r"continuation 1.* half of a surrogate pair"):
        letters_llm.score("ab", ["c", text])
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        letters_llm.add_request("one", text, GREEDY)
    for field in ("stop", "bad_words"):
        with pytest.raises(ValueError, match=rf"{field} .*lone surrogates"):
            SamplingParams(**{field: [text]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5] * 500, "prompt 2: prompt has 500 tokens"),
        ([128], "prompt 2: prompt holds id 128"),
        ([], "prompt 2: .*empty"),
        (None, "prompt 2 is a NoneType"),
        ({"text": "a"}, "prompt 2 has keys"),
        ("\ud800", "prompt 2 cannot be encoded"),
    ],
)
def test_a_refusal_names_the_prompts_index(letters_llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        letters_llm.generate([IDS, "ab", prompt], GREEDY)
    with pytest.raises(ValueError, match=message):
        next(letters_llm.stream([IDS, "ab", prompt], GREEDY))
    with pytest.raises(ValueError, match=r"(prompt|continuation) 2"):
        letters_llm.score([IDS, "ab", prompt], ["a"] * 3)


def test_a_refusal_of_parameters_names_the_prompts_index(letters_llm: LLM) -> None:
    bad = SamplingParams(stop_token_ids=[98])
    with pytest.raises(ValueError, match="prompt 1: stop_token_ids holds id 98"):
        letters_llm.generate(["a", "b"], [GREEDY, bad])


HOSTILE = [
    b'{"prompt": "a\\ud83d"}\n',
    b'{"messages": [{"role": "user", "content": "\\udfff"}]}\n',
    b'{"prompt": "a", "sampling": {"stop": ["\\ud83d"]}}\n',
    b'{"prompt": "a", "sampling": {"bad_words": ["\\ud83d"]}}\n',
    b'{"prompt_token_ids": [1e400]}\n',
    b'{"prompt_token_ids": [123456789012345678901234567890]}\n',
    b'{"prompt_token_ids": [[5]]}\n',
    b'{"prompt": "a", "sampling": {"seed": -2}}\n',
    b'{"prompt": "a", "sampling": {"top_k": 1e400}}\n',
    b'{"prompt": "a", "sampling": {"logit_bias": {"5": 1e400}}}\n',
    b'{"messages": [{"role": "user", "content": 5}]}\n',
    b'{"messages": [{"role": {"a": 1}, "content": "x"}]}\n',
    b'{"prompt": "' + b"x" * 100_000 + b'"}\n',
    b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}\n",
    b'{"id": "\\ud800", "prompt": "\\ud800"}\n',
    b"\xff\xfe\n",
    b"\x00\n",
]


def test_no_line_ends_a_job(letters_llm: LLM, target: Path) -> None:
    good = line("good", "ab", temperature=0)
    run([*HOSTILE, good], target, llm=letters_llm)
    found = entries(target)
    assert [entry["line"] for entry in found] == list(range(1, len(HOSTILE) + 2))
    assert all("error" in entry for entry in found[:-1])
    assert "half of a surrogate pair" in found[0]["error"]
    assert len(found[-1]["outputs"][0]["token_ids"]) == 2


@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, RecursionError, MemoryError])
def test_no_error_of_a_line_ends_a_job(target: Path, error: type[Exception]) -> None:
    class Failing(StubLLM):
        def add_request(self, request_id: str, prompt: Any, *rest: Any) -> None:
            if prompt == {"prompt": "bad"}:
                raise error("some reason")
            super().add_request(request_id, prompt, *rest)

    run([line(1, "bad"), line(2, "good"), line(3, "bad")], target, llm=Failing())
    found = entries(target)
    assert [entry["id"] for entry in found] == [1, 2, 3]
    assert error.__name__ in found[0]["error"]
    assert "some reason" in found[2]["error"]
    assert json.dumps(found[1]["outputs"])
    assert "error" not in found[1]


@pytest.mark.parametrize("kind", [*DUMMY_PREFIX, "bpe-no-prefix", "byte-level"])
@pytest.mark.parametrize("word", ["sea", " sea", "hello", "中", " ", "\n"])
def test_bad_words_are_banned_at_the_start_and_inside_of_a_text(kind: str, word: str) -> None:
    """As in vllm 23886, 32557, 47841: whatever a space before a word does to its tokens."""
    tokenizer = make_tokenizer(kind)
    limits = SchedulerConfig(
        max_num_seqs=1, max_num_batched_tokens=64, max_model_len=64, num_pages=8, page_size=16
    )
    validator = Validator(limits, tokenizer.num_tokens, tokenizer.num_tokens, 5, tokenizer)
    params = SamplingParams(bad_words=[word])
    checked = validator.check("one", ParsedPrompt(None, [5]), params)
    bare = word.lstrip() or word
    assert tuple(tokenizer.encode(bare, add_special_tokens=False)) in checked.bad_word_ids
    if kind in DUMMY_PREFIX:
        for text in (bare, " " + bare):
            before = tokenizer.encode("a\n", add_special_tokens=False)
            whole = tokenizer.encode("a\n" + text, add_special_tokens=False)
            if whole[: len(before)] == before:
                assert tuple(whole[len(before) :]) in checked.bad_word_ids


def test_text_inside_of_a_text_has_no_space_of_its_own() -> None:
    for kind in DUMMY_PREFIX:
        tokenizer = make_tokenizer(kind)
        for text in ("sea", " sea", "\n", "\n\n", "  ", "中", ".", "'s"):
            inside = tokenizer.encode_inside(text)
            assert "".join(map(tokenizer.token_text, inside)).replace("\ufffd", "") in (text, "")
