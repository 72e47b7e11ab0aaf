"""Engines on processes of several devices: `tests/devices/`, run by a process that has four."""

import os
import subprocess
import sys

import pytest

from tests.house.test_imports import ROOT


def run_tests(*options: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    found = subprocess.run(
        [*command, *map(str, sorted((ROOT / "tests" / "devices").glob("on_*.py")))],
        env={**os.environ, "XLA_FLAGS": flags, "PYTEST_ADDOPTS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " passed" in found.stdout


def test_four_devices() -> None:
    run_tests()


@pytest.mark.slow
def test_four_devices_in_all_ways() -> None:
    run_tests("--slow", "-m", "slow")
