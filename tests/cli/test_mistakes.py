"""A mistake on the command line is one line that names it."""

import io
import sys
from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    "options",
    [
        ("--max-tokens", "0"),
        ("--max-tokens", "many"),
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--dtype", "int3"),
        ("--quantization", "int3"),
        ("--num-prompts", "0"),
        ("--prompts-file", "/no/such/file"),
        ("--json", "/no/such/directory/out.json"),
        ("--n", "2"),
        ("--n", "0", "--temperature", "1"),
        ("--stop", ""),
        ("--stop",),
        ("--min-tokens", "99"),
        ("--logprobs", "-2"),
        ("--repetition-penalty", "0"),
        ("--presence-penalty", "3"),
        ("--frequency-penalty", "-3"),
        ("--system", "Be brief.", "--no-chat"),
        ("--stream", "--compare-sequential"),
        ("--max-num-seqs", "0"),
        ("--max-num-seqs", "1000", "--max-num-batched-tokens", "100"),
        ("--model", "/no/such/model"),
        ("--prompts",),
        ("--unknown",),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(call: Callable, options: tuple[str, ...]) -> None:
    code, text, error = call(*options)
    assert code == 2
    assert text == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_what_only_the_engine_can_refuse_is_told_too(call: Callable) -> None:
    code, text, error = call("--logprobs", "1000")
    assert code == 2
    assert text == ""
    assert error.splitlines()[-1].startswith("error: prompt 0: logprobs is 1000; ")


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        (b" \n", ("--prompts", "-"), "--prompts - has no prompt in it"),
        (b"", ("--prompts-file", "-"), "--prompts-file - has no prompt in it"),
        (b"\xff", ("--prompts", "-"), "--prompts -: 'utf-8' codec can't decode"),
        (b"a", ("--prompts", "-", "-"), "standard input can be read once"),
        (b"a", ("--prompts", "-", "--prompts-file", "-"), "standard input can be read once"),
        (b"", ("--n", "3"), "--n is 3, and at temperature 0 all samples of a prompt are the same"),
        (b"", ("--n", "3", "--temperature", "0"), "add --temperature 0.7"),
    ],
)
def test_a_mistake_names_the_option(
    call: Callable,
    monkeypatch: pytest.MonkeyPatch,
    given: bytes,
    options: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    code, _, error = call(*options)
    assert code == 2
    assert words in error
