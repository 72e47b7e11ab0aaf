"""`folojax generate` with JSON Lines in and out."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folojax.cli.main import main
from tests.reference import save_tiny

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"  # is `folojax generate`
LIMITS = ("--max-model-len", "128", "--max-num-seqs", "4", "--max-tokens", "3")


@pytest.fixture
def call(
    text_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, str, str]]:
    def call(*options: Any, stdin: str = "") -> tuple[int, str, str]:
        (tmp_path / "stdin").write_text(stdin)
        with (tmp_path / "stdin").open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            code = main(["generate", "--model", str(text_directory), *LIMITS, *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three lines, of which the second is bad."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "a", "prompt": "One"}\n{"prompt": 2}\n{"id": "c", "prompt": "Three"}\n')
    return path


def entries(text: str) -> list[dict[str, Any]]:
    return sorted(map(json.loads, text.splitlines()), key=lambda entry: entry["line"])


def test_texts_are_those_of_a_run_without_json_lines(
    call: Callable, source: Path, tmp_path: Path
) -> None:
    """Greedy, and each way in: a prompt, a conversation, token ids; a file, standard input."""
    report = tmp_path / "report.json"
    expected = []
    for chat in ("--no-chat", "--chat"):
        assert call("--prompts", "One", "Three", chat, "--json", report)[0] == 0
        expected.append(json.loads(report.read_text())["outputs"])
    lines = [{"prompt": "One"}, {"prompt_token_ids": expected[0][1]["prompt_token_ids"]}]
    lines += [{"messages": [{"role": "user", "content": text}]} for text in ("One", "Three")]
    content = "".join(json.dumps(one) + "\n" for one in lines)
    source.write_text(content)
    code, from_file, error = call("--input", source)
    assert code == 0
    assert "4 done, 0 skipped, 0 bad; " in error.splitlines()[-1]
    code, from_stdin, _ = call("--input", "-", stdin=content)
    assert code == 0
    assert entries(from_file) == entries(from_stdin)
    for found, wanted in zip(entries(from_file), expected[0] + expected[1], strict=True):
        for name in ("text", "token_ids", "finish_reason", "stop_reason", "seed"):
            assert found["outputs"][0][name] == wanted["outputs"][0][name]
        assert found["usage"]["prompt_tokens"] == len(wanted["prompt_token_ids"])


def test_bad_lines_are_told_by_number_and_give_exit_code_1(
    call: Callable, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    code, out, error = call("--input", source, "--output", target)
    assert (code, out) == (1, "")
    assert "line 2: prompt is 2; it must be text" in error.splitlines()
    assert "2 done, 0 skipped, 1 bad; " in error.splitlines()[-1]
    assert [entry["id"] for entry in entries(target.read_text())] == ["a", "line-2", "c"]


def test_resume_goes_on_and_options_are_the_defaults_of_lines(
    call: Callable, source: Path, tmp_path: Path
) -> None:
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "".join(
            json.dumps({"prompt": "One", "sampling": {"max_tokens": 2} if i % 2 else {}}) + "\n"
            for i in range(6)
        )
    )
    sampled = ("--input", source, "--temperature", "1", "--seed", "3")
    assert call(*sampled, "--output", whole)[0] == 0
    found = entries(whole.read_text())
    assert [len(entry["outputs"][0]["token_ids"]) for entry in found] == [3, 2] * 3
    assert len({str(entry["outputs"][0]["token_ids"]) for entry in found}) > 2
    torn = whole.read_bytes()[: whole.stat().st_size // 2]
    target.write_bytes(torn)
    code, _, error = call(*sampled, "--output", target, "--resume")
    assert code == 0
    assert "dropped a torn last line" in error
    assert "skipped, 0 bad" in error
    assert entries(target.read_text()) == found
    content = target.read_bytes()
    assert call(*sampled, "--output", target, "--resume")[0] == 0
    assert target.read_bytes() == content
    assert call(*sampled, "--output", target, "--overwrite")[0] == 0
    assert entries(target.read_text()) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--input", "{source}", "--output", "{source}"), "is the input"),
        (("--input", "{source}", "--output", "{source}", "--resume"), "is the input"),
        (("--input", "/no/such/file"), "/no/such/file"),
        (("--input", "{source}", "--output", "/no/such/directory/out"), "/no/such/directory/out"),
        (
            ("--input", "{source}", "--output", "{report}"),
            "exists: --resume goes on",
        ),
        (("--input", "{source}", "--output", "{report}", "--resume"), "cannot be resumed"),
        (("--input", "{source}", "--output", "x", "--resume", "--overwrite"), "ask for one"),
        (("--input", "{source}", "--resume"), "need --output FILE"),
        (("--input", "{source}", "--output", "-", "--overwrite"), "need --output FILE"),
        (("--output", "x"), "--output needs --input"),
        (("--resume",), "--resume needs --input"),
        (("--input", "{source}", "--prompts", "a"), "--prompts has no meaning beside --input"),
        (("--input", "{source}", "--stream"), "--stream has no meaning beside --input"),
        (("--input", "{source}", "--json", "x"), "--json has no meaning beside --input"),
        (("--input", "{source}", "--no-chat"), "--chat has no meaning beside --input"),
        (("--input", "{source}", "--top-p", "7"), "top_p is 7"),
        (("--input", "{source}", "--seed", "-1"), "seed is -1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    call: Callable, source: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    report = tmp_path / "report"
    report.write_text("[]\n")
    before = source.read_bytes()
    code, out, error = call(*(option.format(source=source, report=report) for option in options))
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert source.read_bytes() == before
    assert report.read_text() == "[]\n"


@pytest.fixture
def process_command(text_directory: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """A job of minutes as a command, and its output file."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as file:
        for i in range(50_000):
            file.write(json.dumps({"id": i, "prompt_token_ids": [5, i % 100]}) + "\n")
    files = ["--input", str(source), "--output", str(target)]
    return [sys.executable, str(SCRIPT), "--model", str(text_directory), *LIMITS, *files], target


def wait_for(process: subprocess.Popen, target: Path, size: int) -> None:
    while process.poll() is None and (not target.exists() or target.stat().st_size < size):
        time.sleep(0.005)


def test_a_program_may_wait_for_each_entry(process_command: tuple[list[str], Path]) -> None:
    """And Ctrl-C ends it while it waits for a line that does not come."""
    command, _ = process_command
    with subprocess.Popen(
        [*command, "--input", "-", "--output", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for number in (1, 2):
            process.stdin.write(b'{"prompt": "One"}\n')
            assert json.loads(process.stdout.readline())["line"] == number
        time.sleep(0.3)  # so that it waits again
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        error = process.stderr.read().decode().splitlines()
    assert error[-2].startswith("2 done, ")
    assert error[-1] == "interrupted"


def test_ctrl_c_keeps_what_has_finished(process_command: tuple[list[str], Path]) -> None:
    command, target = process_command
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        wait_for(process, target, 1000)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        error = process.stderr.read().decode().splitlines()
        assert process.wait(timeout=60) == 130
    num_entries = len(target.read_text().splitlines())
    # One may have been written and not counted yet.
    summaries = [f"{num:,} done, 0 skipped, 0 bad; " for num in (num_entries, num_entries - 1)]
    assert error[-2].startswith(tuple(summaries))
    assert error[-1] == "interrupted"


def test_a_closed_standard_output_ends_it(process_command: tuple[list[str], Path]) -> None:
    command, _ = process_command
    with subprocess.Popen(
        [*command, "--output", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["outputs"]
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait(timeout=60) == 1
    assert error.splitlines()[-1] == "error: standard output was closed"
    assert "Traceback" not in error
    assert "Exception ignored" not in error


@pytest.mark.slow
def test_ten_thousand_lines_survive_three_kills(text_directory: Path, tmp_path: Path) -> None:
    """The command itself, killed from outside; sampled, so that seeds matter."""
    model, source, target, whole = (tmp_path / name for name in ("model", "in", "out", "whole"))
    shutil.copytree(text_directory, model)
    save_tiny("llama", model, num_hidden_layers=1)  # a vocabulary of 128: ids alone fit it
    draw = random.Random(1)
    lines = [
        {"id": i, "prompt_token_ids": [3, i % 100], "sampling": {"max_tokens": draw.randint(1, 2)}}
        for i in range(10_000)
    ]
    source.write_text("".join(json.dumps(one) + "\n" for one in lines))
    command = [sys.executable, str(SCRIPT), "--model", str(model), "--input", str(source)]
    command += ["--temperature", "1", "--max-model-len", "64", "--max-num-seqs", "64"]
    subprocess.run([*command, "--output", str(whole)], check=True)
    command += ["--output", str(target), "--resume"]
    for size in sorted(draw.randint(1, int(0.8 * whole.stat().st_size)) for _ in range(3)):
        with subprocess.Popen(command) as process:
            wait_for(process, target, size)
            process.kill()
            assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True)
    found = entries(target.read_text())
    assert [entry["id"] for entry in found] == list(range(10_000))
    assert found == entries(whole.read_text())
    assert len({str(entry["outputs"][0]["token_ids"]) for entry in found}) > 1000
