"""scripts/generate.py as a person calls it."""

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as Python does when it runs the script
        yield importlib.import_module("generate")


@pytest.fixture
def call(
    script: ModuleType, text_directory: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(*options: str) -> tuple[int, str, str]:
        limits = ("--max-model-len", "128", "--max-num-seqs", "4")
        code = script.main(["--model", str(text_directory), *limits, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_five_default_prompts(call: Callable, script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, text, _ = call("--max-tokens", "4", "--json", str(out))
    assert code == 0
    report = json.loads(out.read_text())
    assert [entry["prompt"] for entry in report["outputs"]] == list(script.DEFAULT_PROMPTS)
    assert len(script.DEFAULT_PROMPTS) == 5
    assert all(prompt in text for prompt in script.DEFAULT_PROMPTS)
    assert report["batch"]["num_requests"] == 5
    assert report["batch"]["output_throughput"] > 0
    assert report["outputs"][0]["metrics"]["ttft_s"] > 0
    assert report["outputs"][0]["outputs"][0]["finish_reason"] in ("stop", "length")


def test_prompts_come_from_options_and_files(call: Callable, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    file.write_text("Three\n\nFour\n")
    options = ["--prompts", "One", "Two", "--prompts-file", str(file), "--json", str(out)]
    assert call(*options, "--max-tokens", "2", "--no-chat")[0] == 0
    outputs = json.loads(out.read_text())["outputs"]
    assert [entry["prompt"] for entry in outputs] == ["One", "Two", "Three", "Four"]
    assert call(*options, "--max-tokens", "2", "--no-chat", "--num-prompts", "6")[0] == 0
    outputs = json.loads(out.read_text())["outputs"]
    assert [entry["prompt"] for entry in outputs] == ["One", "Two", "Three", "Four", "One", "Two"]


def test_chat_is_the_default_where_there_is_a_template(call: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    lengths = []
    for options in ((), ("--chat",), ("--no-chat",)):
        code, _, _ = call("--prompts", "One", "--max-tokens", "2", "--json", str(out), *options)
        assert code == 0
        lengths.append(len(json.loads(out.read_text())["outputs"][0]["prompt_token_ids"]))
    assert lengths[0] == lengths[1] > lengths[2] == 1


def test_compare_sequential_prints_both_runs(call: Callable) -> None:
    code, text, _ = call(
        "--num-prompts", "6", "--max-tokens", "4", "--ignore-eos", "--compare-sequential"
    )
    assert code == 0
    for word in ("batch", "sequential", "speed-up", "time saved", "the same tokens"):
        assert word in text
    assert "NOT" not in text


@pytest.mark.parametrize(
    "options",
    [
        ("--max-tokens", "0"),
        ("--max-tokens", "many"),
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--dtype", "int3"),
        ("--num-prompts", "0"),
        ("--prompts-file", "/no/such/file"),
        ("--max-num-seqs", "0"),
        ("--max-num-seqs", "1000"),
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


def test_help_has_examples(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    assert "--compare-sequential" in capsys.readouterr().out
    assert script.__doc__ is not None
    assert script.__doc__.count("python scripts/generate.py") >= 4


def test_ctrl_c_ends_it_with_130(text_directory: Path) -> None:
    """A run that would take minutes, interrupted once it has begun to generate."""
    limits = ["--max-model-len", "128", "--max-tokens", "100", "--num-prompts", "5000"]
    command = [sys.executable, str(SCRIPT), "--model", str(text_directory), *limits, "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"5000 prompts" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert error.decode().strip().splitlines()[-1] == "interrupted"
