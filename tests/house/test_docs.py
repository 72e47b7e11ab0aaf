"""What the pages of docs/ say of the tree is so: links, paths, rooms and records."""

import importlib
import re
from pathlib import Path

import pytest

from tests.house.test_imports import ROOMS, ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    roots = "folojax|models|sched|scripts|tests|docs"
    paths = re.findall(rf"(?<![\w/.-])((?:{roots})/[\w/.-]*[\w/])", text)
    gone = [path for path in paths if not (ROOT / path).exists() and path != "docs/log.md"]
    assert gone == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_modules_that_a_page_names_are_there(page: Path) -> None:
    for name in set(re.findall(r"\bfolojax(?:\.\w+)+", page.read_text())):
        path = ROOT.joinpath(*name.split("."))
        is_module = path.with_suffix(".py").is_file() or path.is_dir()
        module, _, attribute = name.rpartition(".")
        if not is_module and not name.startswith("folojax.adapters"):
            assert hasattr(importlib.import_module(module), attribute), name


def test_the_index_has_every_page() -> None:
    listed = re.findall(r"^\d+\. \[(.+?)\]", (DOCS / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(
        path.name for path in DOCS.glob("*.md") if path.stem != "README"
    )


def test_the_rooms_are_those_of_the_imports() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \| .+? \| (.+?) \|$", (DOCS / "house.md").read_text(), re.M)
    told = {room: set(re.findall(r"`([\w/]+)`", imports)) for room, imports in rows}
    assert told == ROOMS
    assert list(told) == list(ROOMS)[::-1]


def test_every_decision_has_a_date_and_a_status() -> None:
    text = (DOCS / "decisions.md").read_text().split("## Reversed")[0]
    records = re.findall(r"^### (.*)\n(.*)", text, re.M)
    assert records
    for heading, status in records:
        assert re.match(r"\d{4}-\d\d-\d\d: ", heading), heading
        assert re.match(r"Status: (holds|superseded)", status), heading
