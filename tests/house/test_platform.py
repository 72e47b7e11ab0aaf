"""The platform is asked for in one room: `folojax/backend/`."""

import ast
from collections.abc import Iterator

import pytest

from tests.house.test_imports import ROOT, package_files


def questions(text: str) -> Iterator[int]:
    """The lines that ask JAX for its platform."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Attribute(attr="default_backend"):
                yield node.lineno
            case ast.Attribute(attr="platform", value=ast.Name(id="sys")):
                pass  # Python's, which is the operating system
            case ast.Attribute(attr="platform"):
                yield node.lineno
            case (
                ast.Constant(value="compute_capability")
                | ast.Attribute(attr="compute_capability" | "device_kind")
            ):
                yield node.lineno


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import jax\nname = jax.default_backend()", 1),
        ("import jax\nis_cpu = jax.devices()[0].platform == 'cpu'", 1),
        ("import sys\nis_linux = sys.platform == 'linux'", 0),
        ("import platform\nmachine = platform.machine()", 0),
        ("float(device.compute_capability)", 1),
    ],
)
def test_a_question_is_found(text: str, count: int) -> None:
    assert len(list(questions(text))) == count


def test_only_the_backend_asks_for_the_platform() -> None:
    backend = ROOT / "folojax" / "backend"
    asked = [
        f"{path.relative_to(ROOT)}:{line}: {path.read_text().splitlines()[line - 1].strip()}"
        for path in package_files()
        if not path.is_relative_to(backend)
        for line in questions(path.read_text())
    ]
    assert asked == [], "only folojax/backend/ may; hand down what it has chosen"
