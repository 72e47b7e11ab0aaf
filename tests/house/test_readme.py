"""The examples of the README and of docs run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


# Other people's packages warn of what is not ours to mend.
ADAPTERS = (pytest.mark.adapters, pytest.mark.filterwarnings("default"))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("README.md", 2),
        ("docs/using.md", 11),
        ("docs/coming_from_vllm.md", 1),
        ("docs/research.md", 8),
        ("docs/lora.md", 1),
        ("docs/weights.md", 7),
        pytest.param("docs/adapters.md", 2, marks=ADAPTERS),
    ],
)
def test_the_examples_run_one_after_the_other(name: str, count: int) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    assert len(examples) == count
    names: dict[str, object] = {}
    for code in examples:
        exec(compile(code, name, "exec"), names)


def test_the_two_commands_are_there() -> None:
    for command in ("make demo", "make test"):
        assert command in README
