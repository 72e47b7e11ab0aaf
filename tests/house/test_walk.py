"""The walk from `LLM.generate` to the first call of a compiled program, as docs/request_life.md."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from folojax import LLM, SamplingParams
from folojax.compile import programs

ROOT = Path(__file__).parents[2]
MOST_FILES = 20
MOST_FRAMES = 8


def frames_of(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def own_file(frame: FrameType) -> str | None:
    """The file of the package that a frame is in; None for all others."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT):
        return None
    parts = path.relative_to(ROOT).parts
    parts = parts[1:] if parts[:2] in (("folojax", "models"), ("folojax", "sched")) else parts
    return "/".join(parts) if parts[0] in ("folojax", "models", "sched") else None


@pytest.fixture(scope="module")
def walk(shared_letters_llm: LLM) -> tuple[list[str], list[str]]:
    """The files in the order in which they are entered, and the functions that are on the stack.

    It ends where a program is called (`folojax.compile.programs`). What Python makes of a
    comprehension counts as part of the function that it is in.
    """
    llm, params = shared_letters_llm, SamplingParams(temperature=0, max_tokens=2)
    llm.generate("The sea is", params, use_tqdm=False)
    llm.step()  # reports the last finished ids
    files: dict[str, None] = {}
    stack: list[str] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or stack:
            return
        name = own_file(frame)
        if frame.f_code in (programs.run.__code__, programs.Program.__call__.__code__):
            own = [one.f_code.co_qualname for one in frames_of(frame.f_back) if own_file(one)]
            stack.extend(name for name in reversed(own) if not name.endswith("comp>"))
        elif name is not None and frame.f_code.co_filename != programs.__file__:
            files.setdefault(name)  # (JAX tells those how long it has compiled, at any time.)

    sys.setprofile(profile)
    try:
        llm.generate("The sea is", params, use_tqdm=False)
    finally:
        sys.setprofile(None)
    return list(files), stack


def test_it_is_short(walk: tuple[list[str], list[str]]) -> None:
    files, stack = walk
    assert stack[0] == "LLM.generate"
    assert len(files) <= MOST_FILES, files
    assert len(stack) <= MOST_FRAMES, stack


def test_the_page_tells_it(walk: tuple[list[str], list[str]]) -> None:
    """The section of the page names the files and the functions in their order."""
    page = (ROOT / "docs" / "request_life.md").read_text()
    section = page.split("\n## The walk")[1].split("\n## ")[0]
    files, stack = walk
    assert re.findall(r"^\| `([\w/.]+)` \|", section, re.M) == files
    assert re.findall(r"^\d+\. `([\w.]+)`", section, re.M) == stack
