"""The command as a function."""

from collections.abc import Callable
from pathlib import Path

import pytest

from folojax.cli.main import main


@pytest.fixture
def call(
    text_directory: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(*options: str) -> tuple[int, str, str]:
        limits = ("--max-model-len", "128", "--max-num-seqs", "4")
        code = main(["generate", "--model", str(text_directory), *limits, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
