"""`folojax bench` and `folojax plan`. No time is asserted."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from folojax.cli.main import main


@pytest.fixture
def call(
    text_directory: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(command: str, *options: str) -> tuple[int, str, str]:
        limits = ("--max-model-len", "128", "--max-num-seqs", "4")
        code = main([command, "--model", str(text_directory), *limits, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_plan_lists_executables_and_runs_nothing(call: Callable) -> None:
    code, text, _ = call("plan")
    assert code == 0
    lines = text.splitlines()
    assert any(line.startswith("decode rows=4") for line in lines)
    assert lines[-1].startswith(f"{len(lines) - 1} executables: ")
    assert "compiling" not in text


@pytest.mark.parametrize(
    "prompts", [("--num-prompts", "3", "--input-len", "5"), ("--prompts", "One", "Two", "Three")]
)
def test_rounds_are_counted_and_printed(
    call: Callable, tmp_path: Path, prompts: tuple[str, ...]
) -> None:
    out = tmp_path / "out.json"
    code, text, _ = call(
        "bench", *prompts, "--max-tokens", "4", "--rounds", "2", "--json", str(out)
    )
    assert code == 0
    rounds = json.loads(out.read_text())
    assert list(rounds) == ["round 1", "round 2"]
    for name, figures in rounds.items():
        assert name in text
        assert figures["num_requests"] == 3
        assert figures["num_output_tokens"] == 12
        assert figures["output_throughput"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("bench", "--rounds", "0"), "--rounds is 0"),
        (("bench", "--input-len", "0"), "--input-len 0"),
        (("bench", "--prompts", "a", "--input-len", "4"), "no meaning beside prompts"),
        (("bench", "--json", "/no/such/directory/out"), "there is no such directory"),
        (("bench", "--input-len", "128"), "prompt 0: "),
        (("plan", "--page-size", "0"), "page_size is 0"),
        (("plan", "--prompts", "a"), "unrecognized arguments: --prompts a"),
    ],
)
def test_a_mistake_is_told(call: Callable, options: tuple[str, ...], words: str) -> None:
    code, text, error = call(*options)
    assert (code, text) == (2, "")
    assert words in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("error: ")


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err
