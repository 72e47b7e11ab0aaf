"""Engines over the devices of several processes, which `jax.distributed` connects over loopback."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.devices import one_of_processes
from tests.house.test_imports import ROOT
from tests.reference import save_tiny

BOUND_S = 300
"""Far more than they need, and so long that a wait without end is told from them."""


@contextlib.contextmanager
def started(directory: Path, *serves: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two of them, which end here at the latest."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    processes = []
    for number in range(2):
        command = [sys.executable, "-u", one_of_processes.__file__, str(directory)]
        with output_of(directory, number).open("wb") as file:
            processes.append(
                subprocess.Popen(
                    [*command, port, "2", str(number), *serves],
                    env=env,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        yield processes
    finally:
        for one in processes:
            one.kill()
            one.wait()


def output_of(directory: Path, number: int) -> Path:
    return directory / f"output of {number}.txt"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    save_tiny("llama", made / "model")
    return made


@pytest.mark.slow
def test_every_process_has_the_outputs_of_one(directory: Path) -> None:
    with started(directory) as processes:
        ends = [one.wait(BOUND_S) for one in processes]
    assert ends == [0, 0], output_of(directory, 0).read_text()
    known: Any = json.loads(json.dumps(one_of_processes.results(directory, None)))
    for number in range(2):
        assert json.loads((directory / f"{number}.json").read_text()) == known
    saved = [directory / f"saved {one}" for one in ("0 of 1", "0 of 2", "1 of 2")]
    assert len({(one / "model.safetensors").read_bytes() for one in saved}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_who_is_left_ends_with_an_error(directory: Path, killed: int) -> None:
    """Whether the collective fails, or heartbeats are missing: it does not wait for ever."""
    with started(directory, "serve") as processes:
        outputs = [output_of(directory, number) for number in range(2)]
        while not all("served" in one.read_text() for one in outputs):
            assert [one.poll() for one in processes] == [None, None], outputs[0].read_text()
            time.sleep(0.1)
        processes[killed].kill()
        end = processes[1 - killed].wait(BOUND_S)
    text = outputs[1 - killed].read_text()
    assert end != 0
    assert "Connection closed by peer" in text or "another task died" in text
