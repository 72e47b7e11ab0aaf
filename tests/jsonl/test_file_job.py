"""Laws of JSON Lines jobs: every line exactly once, whatever ends the process and however often."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from folojax import RequestOutput, SamplingParams
from tests.jsonl_runs import entries, line, run
from tests.stub_llm import MAX_NUM_SEQS, StubLLM

STUB = Path(__file__).parents[1] / "stub_llm.py"
NUM_LINES = 10_000


def test_ten_thousand_lines_survive_three_kills(tmp_path: Path) -> None:
    """SIGKILL from outside, at sizes of the output that fall anywhere in a line."""
    source, target, whole = (tmp_path / name for name in ("in", "out", "whole"))
    draw = random.Random(5)
    lines = [
        line(f"q{i}", f"prompt {i % 50}", max_tokens=draw.randint(1, 4)) for i in range(NUM_LINES)
    ]
    source.write_bytes(b"".join(lines))
    assert run(lines, whole).num_done == NUM_LINES
    sizes = sorted(draw.randint(1, int(0.9 * whole.stat().st_size)) for _ in range(3))
    command = [sys.executable, str(STUB), str(source), str(target)]
    for size in sizes:
        with subprocess.Popen([*command, "0.0005"]) as process:
            while process.poll() is None and (not target.exists() or target.stat().st_size < size):
                time.sleep(0.0005)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert size <= target.stat().st_size < whole.stat().st_size
    subprocess.run([*command, "0"], check=True)
    found = entries(target)
    assert [entry["id"] for entry in found] == [f"q{i}" for i in range(NUM_LINES)]
    assert found == entries(whole)


def test_a_lines_tokens_are_its_own(target: Path, tmp_path: Path) -> None:
    """Neither order nor neighbours nor the engine's room decide a seed."""
    lines = [line(i, "the same") for i in range(20)]
    run(lines, target)
    other = tmp_path / "other"
    run([*lines[::-1], line("more")], other, max_queued=1)
    by_id = {entry["id"]: entry["outputs"] for entry in entries(other)}
    assert all(entry["outputs"] == by_id[entry["id"]] for entry in entries(target))
    assert len({entry["outputs"][0]["seed"] for entry in entries(target)}) == 20
    other.unlink()
    run(lines, other, seed=1)
    assert entries(other) != entries(target)


def test_little_is_queued_and_read_at_once(target: Path) -> None:
    """Neither the input nor its requests are held in memory."""
    llm, num_read = StubLLM(), 0

    def lines() -> Iterable[bytes]:
        nonlocal num_read
        for i in range(500):
            num_read += 1
            assert num_read <= len(target.read_bytes().splitlines()) + 17
            yield line(i, n=1 + i % 2)

    summary = run(lines(), target, llm=llm, max_queued=2 * MAX_NUM_SEQS)
    assert summary.num_done == 500
    assert MAX_NUM_SEQS < llm.most_queued <= 2 * MAX_NUM_SEQS + 1
    assert llm.num_queued == 0


def test_a_line_that_is_late_holds_up_nothing(target: Path) -> None:
    def lines() -> Iterable[bytes | None]:
        yield None
        yield line("a")
        while not target.read_bytes():
            yield None
        yield b"{"
        yield None

    summary = run(lines(), target)
    assert (summary.num_done, summary.num_bad) == (1, 1)
    assert [entry["line"] for entry in entries(target)] == [1, 2]


def test_an_entry_is_written_before_the_next_step(target: Path) -> None:
    seen: list[Any] = []
    run(
        [line(i, max_tokens=1 + i) for i in range(3)],
        target,
        on_entry=lambda entry: seen.append((entry["id"], len(target.read_bytes().splitlines()))),
    )
    assert seen == [(0, 1), (1, 2), (2, 3)]


def test_what_interrupts_a_job_leaves_the_engine_empty(target: Path) -> None:
    llm = StubLLM()

    def interrupt(entry: object) -> None:
        raise KeyboardInterrupt

    lines = [line(i, max_tokens=1 + i) for i in range(9)]
    with pytest.raises(KeyboardInterrupt):
        run(lines, target, llm=llm, on_entry=interrupt)
    assert not llm.has_unfinished_requests()
    assert [entry["id"] for entry in entries(target)] == [0]
    assert run(lines, target, llm=llm).num_done == 8


def test_what_a_broken_step_aborts_is_taken_out_too(target: Path) -> None:
    """An LLM holds the outputs of what an interrupted step has lost until somebody steps again."""

    class Interrupted(StubLLM):
        num_held = 0

        def step(self) -> list[RequestOutput]:
            if self.num_held:
                self.num_held = 0
                return []
            self.num_held = len(self._requests)
            self.abort_request(list(self._requests))
            raise KeyboardInterrupt

        def abort_request(self, request_ids: str | Sequence[str]) -> None:
            super().abort_request([one for one in request_ids if one in self._requests])

        def has_unfinished_requests(self) -> bool:
            return bool(self.num_held) or super().has_unfinished_requests()

    llm = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run([line("a"), line("b")], target, llm=llm)
    assert not llm.has_unfinished_requests()
    assert target.read_bytes() == b""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda llm: {"defaults": SamplingParams(seed=3)}, "defaults.seed is 3"),
        (lambda llm: {"max_queued": 0}, "max_queued is 0"),
        (lambda llm: llm.add_request("x", {"prompt": "x"}, SamplingParams()) or {}, "unfinished"),
    ],
    ids=["seed", "max_queued", "busy"],
)
def test_a_job_refuses(
    change: Callable[[StubLLM], dict[str, Any]], message: str, target: Path
) -> None:
    llm = StubLLM()
    with pytest.raises(ValueError, match=message):
        run([line("a")], target, llm=llm, **change(llm))
    assert target.read_bytes() == b""
