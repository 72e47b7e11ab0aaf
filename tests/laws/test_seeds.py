"""A seeded request gives the same tokens wherever and with whomever it runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folojax import LLM, SamplingParams
from tests import dense
from tests.reference import MORE_LIMITS

ROOT = Path(__file__).parents[2]

# Kept as JSON: another process reads it too.
REQUESTS: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2, "temperature": 0.7, "top_k": 20},
    {"seed": 3, "top_p": 0.9, "min_p": 0.01},
    {"seed": 4, "frequency_penalty": 1.0, "repetition_penalty": 1.2},
]


def prompt(index: int) -> list[int]:
    return np.random.default_rng(index).integers(3, 128, 5 + 7 * index).tolist()


def params(fields: dict[str, Any]) -> SamplingParams:
    return SamplingParams(max_tokens=40, ignore_eos=True, **fields)


def generate(llm: LLM, requests: list[dict[str, Any]]) -> list[list[int]]:
    prompts = [prompt(index) for index in range(len(requests))]
    outputs = llm.generate(prompts, [params(fields) for fields in requests], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def make_llm(model: Any, **options: Any) -> LLM:
    return LLM(model, **MORE_LIMITS | options)


@pytest.fixture(scope="module")
def alone(tiny_model: tuple) -> list[list[int]]:
    llm = make_llm(tiny_model)
    return [
        llm.generate(prompt(index), params(fields), use_tqdm=False)[0].outputs[0].token_ids
        for index, fields in enumerate(REQUESTS)
    ]


def test_in_a_batch_of_30(tiny_model: tuple, alone: list[list[int]]) -> None:
    """Among others with other lengths, parameters and seeds, of a page each."""
    llm = make_llm(tiny_model, max_num_seqs=32, max_num_batched_tokens=512)
    others = [
        SamplingParams(temperature=0.1 * i, top_p=1 - i / 64, seed=i, max_tokens=5)
        for i in range(26)
    ]
    prompts = [prompt(i) for i in range(4)] + [prompt(3)[i % 5 : 8] for i in range(26)]
    mixed = [*(params(fields) for fields in REQUESTS), *others]
    outputs = llm.generate(prompts, mixed, use_tqdm=False)
    assert llm.metrics().num_preemptions == 0
    assert [output.outputs[0].token_ids for output in outputs[:4]] == alone


def test_in_another_process(tiny_directory: Path, alone: list[list[int]]) -> None:
    """The same checkpoint, read again; run from this file."""
    command = [sys.executable, "-m", "tests.laws.test_seeds", str(tiny_directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == alone


def _main(directory: str) -> None:
    print(json.dumps(generate(make_llm(dense.load(Path(directory))), REQUESTS)))


if __name__ == "__main__":
    _main(sys.argv[1])
