"""What a start imports: nothing that it does not need yet."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import folojax
from tests.house.test_imports import ROOT

SLOW = ("jax", "numpy", "flax", "transformers", "torch", "optax", "gguf")


def slow_imports(code: str) -> list[str]:
    """Which of the slow packages a program has imported at its end; it may print to stderr."""
    told = f"import sys\n{code}\nprint(*(name for name in {SLOW} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", told],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.stdout.splitlines()[-1].split()


def test_type_checkers_and_python_know_the_same_names() -> None:
    tree = ast.parse((ROOT / "folojax" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: f"folojax.{module}" for name, module in folojax._HOMES.items()}
    assert told == homes
    assert folojax.__all__ == sorted(homes)


def test_every_public_name_is_there() -> None:
    assert all(getattr(folojax, name) is not None for name in folojax.__all__)
    assert set(folojax.__all__) < set(dir(folojax))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(folojax, "no_such_name")
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from folojax import no_such_name")


@pytest.mark.parametrize(
    "code",
    [
        "import folojax",
        "from folojax import EngineConfig, SamplingParams; SamplingParams(top_p=0.9)",
    ],
)
def test_options_need_no_jax(code: str) -> None:
    assert slow_imports(code) == []


RIGHT = ("--help", "--version", "generate --help", "bench --help", "plan --help")
WRONG = (
    "generate --unknown",
    "generate --max-tokens 0",
    "generate --n 3",
    "generate --max-num-seqs 0",
    "generate --dtype int3",
    "generate --prompts-file /no/such/file",
    "generate --json /no/such/directory/out",
    "generate --stream --compare-sequential",
    "bench --rounds 0",
    "bench --top-p 7",
    "plan --page-size 0",
)


def test_help_and_mistakes_do_not_wait_for_jax() -> None:
    code = f"""
from folojax.cli.main import main
for options in {RIGHT}:
    try: main(options.split())
    except SystemExit as stop: assert stop.code == 0
for options in {WRONG}:
    assert main(options.split()) == 2, options
"""
    assert slow_imports(code) == []


def test_files_of_a_job_are_looked_at_before_jax_is_imported(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("{}\n")
    target.write_text("{}\n")
    options = ["generate", "--input", str(source), "--output", str(target)]
    code = f"from folojax.cli.main import main\nassert main({options!r}) == 2"
    assert "jax" not in slow_imports(code)
