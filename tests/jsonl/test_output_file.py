"""The output of a JSON Lines job: resumed, torn, somebody else's."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from folojax import SamplingParams
from folojax.jsonl.file_job import JsonlJob
from folojax.jsonl.lines import dump
from folojax.jsonl.output_file import open_output
from tests.jsonl_runs import entries, line, run
from tests.stub_llm import FAILING_PROMPT, StubLLM

Stub: Any = StubLLM


def test_a_line_torn_at_any_byte_is_done_again(target: Path, tmp_path: Path) -> None:
    lines = [line("a"), line("b", FAILING_PROMPT), b"not JSON\n", line("d")]
    whole = tmp_path / "whole"
    run(lines, whole)
    content = whole.read_bytes()
    for size in range(len(content) + 1):
        target.write_bytes(content[:size])
        with open_output(target, resume=True) as output:
            kept = content[:size].rfind(b"\n") + 1
            assert output.num_dropped_bytes == size - kept
            assert target.read_bytes() == content[:kept]
            JsonlJob(Stub(), output, SamplingParams(max_tokens=4)).run(lines)
        assert entries(target) == entries(whole)


def test_resuming_what_is_finished_changes_nothing(target: Path) -> None:
    lines = [line("a"), line("a"), line(), b"[]\n", line("long", "x" * 101), b"\n", line(7)]
    first = run(lines, target)
    assert (first.num_done, first.num_skipped, first.num_bad) == (3, 0, 3)
    content = target.read_bytes()
    for _ in range(2):
        llm = StubLLM()
        again = run(lines, target, llm=llm)
        assert (again.num_done, again.num_skipped, again.num_bad) == (0, 6, 0)
        assert again.num_bad_before == 3
        assert llm.most_queued == 0
        assert target.read_bytes() == content


def test_a_line_that_was_mended_is_done(target: Path) -> None:
    """Its old entry has no id, so it does not stand for the line any more."""
    run([b"{\n", line("b")], target)
    summary = run([line("a"), line("b")], target)
    assert (summary.num_done, summary.num_skipped, summary.num_bad_before) == (1, 1, 1)


def test_entries_of_another_input_are_counted(target: Path) -> None:
    run([line("a"), line("b")], target)
    summary = run([line("c"), line("b")], target)
    assert (summary.num_done, summary.num_skipped, summary.num_foreign) == (1, 1, 1)
    assert "1 entries of the output are of no line" in str(summary)


@pytest.mark.parametrize(
    "content",
    [
        b"precious\n",
        b"precious",
        b'{"id": "a"}\n',
        b'{"id": "a", "line": 1, "outputs": 5}\n',
        b'{"line": 1, "id": "a", "error": ""}\n',
        dump({"id": "a", "line": 1, "error": "x"}) + b'{"id": "b"\n',
    ],
)
def test_a_file_that_is_no_output_is_left_alone(content: bytes, target: Path) -> None:
    target.write_bytes(content)
    with pytest.raises(ValueError, match=f"{target} cannot be resumed: line "):
        run([line("a")], target)
    assert target.read_bytes() == content


def test_what_is_there_is_kept_unless_asked(target: Path) -> None:
    run([line("a")], target, resume=False)
    with pytest.raises(ValueError, match=r"exists: --resume goes on after .* --overwrite drops it"):
        run([line("b")], target, resume=False)
    with (
        pytest.raises(ValueError, match="ask for one of them"),
        open_output(target, resume=True, overwrite=True),
    ):
        pass
    with open_output(target, overwrite=True) as output:
        JsonlJob(Stub(), output).run([line("c")])
    assert [entry["id"] for entry in entries(target)] == ["c"]
    target.write_bytes(b"")
    run([line("d")], target, resume=False)  # nothing is lost


def test_two_jobs_cannot_write_one_file(target: Path) -> None:
    with open_output(target), pytest.raises(ValueError, match="another job"):
        run([line("a")], target)
    run([line("a")], target)


def test_a_pipe_is_written_and_never_resumed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is no file"):
        run([line("a")], pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run([line("a")], pipe, resume=False)
    assert json.loads(os.read(reader, 10_000))["id"] == "a"
    os.close(reader)
