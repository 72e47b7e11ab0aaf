"""Broken and hostile checkpoints: each is a clear error, within bounds of memory and time."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.letters import make_letters_tokenizer
from tests.malformed import CASES, MARKER


@pytest.fixture(scope="module")
def outcome(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process of its own says to all of them, and the folder it did so in."""
    root = tmp_path_factory.mktemp("malformed")
    base, work = root / "base", root / "work"
    shutil.copytree(tiny_directory, base)
    tokenizer = make_letters_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(base)
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.malformed", str(base), str(work)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"FOLOJAX_CACHE_DIR": str(root / "cache")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), work


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40


def test_the_model_they_were_made_from_is_good(outcome: Any) -> None:
    assert outcome[0]["errors"]["good"] == "none"


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_checkpoint_is_a_clear_error(outcome: Any, case: str) -> None:
    assert re.search(CASES[case][1], outcome[0]["errors"][case], re.DOTALL)


def test_no_code_was_run(outcome: Any) -> None:
    assert not (outcome[1] / MARKER).exists()


def test_no_engine_is_left_half_built(outcome: Any) -> None:
    assert outcome[0]["engines"] == 0
