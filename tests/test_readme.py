"""The examples of the README run as they stand."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_examples_run_one_after_the_other() -> None:
    assert len(EXAMPLES) == 3
    names: dict[str, object] = {}
    for code in EXAMPLES:
        exec(compile(code, "README.md", "exec"), names)


def test_the_two_commands_are_there() -> None:
    for command in ("make demo", "make test"):
        assert command in README
