"""What is built once in the user's cache: whole or not there, whoever else builds it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from folojax.models.machine.artefacts import build_once, cache_root


def test_an_interrupted_build_is_not_taken_for_complete(tmp_path):
    target = tmp_path / "artefacts" / "one"

    def interrupted(directory):
        (directory / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(target, interrupted)
    assert not list(target.parent.iterdir())

    assert build_once(target, lambda directory: (directory / "whole").touch()) == target
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_a_killed_build_is_not_taken_for_complete_and_is_removed_in_time(tmp_path):
    code = """
import os, pathlib, sys
from folojax.models.machine.artefacts import build_once
def killed(directory):
    (directory / "half").touch()
    os.kill(os.getpid(), 9)
build_once(pathlib.Path(sys.argv[1]), killed)
"""
    target = tmp_path / "artefacts" / "one"
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    [left] = target.parent.iterdir()
    assert left != target
    build_once(target, lambda directory: (directory / "whole").touch())
    assert left.exists(), "it might belong to a process that still runs"
    os.utime(left, (0, 0))
    build_once(target.with_name("two"), lambda directory: None)
    assert sorted(path.name for path in target.parent.iterdir()) == ["one", "two"]


def test_of_two_builds_at_once_the_first_to_finish_stays(tmp_path):
    target = tmp_path / "one"

    def slow(directory):
        build_once(target, lambda other: (other / "fast").touch())
        (directory / "slow").touch()

    assert build_once(target, slow) == target
    assert [path.name for path in target.iterdir()] == ["fast"]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_the_cache_is_the_users_unless_the_environment_names_another(monkeypatch):
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", "/some/where")
    assert cache_root() == Path("/some/where")
    monkeypatch.delenv("FOLOJAX_CACHE_DIR")
    assert cache_root().name == "folojax"
