"""A user's type checker: it accepts what is right and finds what is wrong."""

import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import get_type_hints

from folojax.config import EngineConfig, EngineOptions
from folojax.requests.vllm_names import LLM_ARGUMENTS

ROOT = Path(__file__).parents[2]

WRONG_CALLS = """\
LLM(dtype=16)
LLM("model", "tokenizer", "float32")
LLM(max_num_seqs="8")
LLM(max_seqs=8)
EngineConfig(max_num_seqs="8")
EngineConfig(max_seqs=8)
SamplingParams(0.7)
SamplingParams(temperature="hot")
SamplingParams(temprature=0.7)
SamplingParams(max_tokens=1.5)
SamplingParams(stop_token_ids=2)
SamplingParams(logit_bias={"the": 1.0})
params.temperature = "hot"
params.max_token = 5
llm.generate(5)
llm.generate([1.5])
llm.generate("text", 0.7)
llm.generate("text", max_tokens=5)
llm.chat("text")
llm.add_request(1, "text")
llm.stream("text").outputs
llm.score("text")
next(llm.stream("text")).text
llm.generate("text").outputs
llm.generate("text")[0].text
llm.generate("text")[0].outputs[0].logprobs[0]
llm.generate("text")[0].outputs[0].token_ids.upper()
number: int = llm.generate("text")[0].outputs[0].text
reason: str = llm.generate("text")[0].outputs[0].finish_reason
llm.unknown()
JsonlJob(llm, "out.jsonl")
"""

HEAD = """\
from folojax import LLM, EngineConfig, SamplingParams
from folojax.jsonl.file_job import JsonlJob
llm = LLM()
params = SamplingParams()
"""


def test_a_strict_checker_accepts_user_code_and_finds_wrong_calls(tmp_path: Path) -> None:
    """One run for both, since most of its time goes into reading the package.

    Without other packages' types: those of JAX take a minute to read, and say no more here.
    """
    wrong = tmp_path / "wrong_user_code.py"
    wrong.write_text(HEAD + WRONG_CALLS)
    right = ROOT / "tests" / "typed_user_code.py"
    options = ["--strict", "--no-site-packages", "--ignore-missing-imports", "--config-file="]
    # Errors inside the package are the business of its own check.
    options += ["--follow-imports=silent", "--no-error-summary", f"--cache-dir={tmp_path}"]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(right), str(wrong)],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert checked.stderr == ""
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]
    found = {int(m[1]) for e in errors if (m := re.match(rf"{wrong.name}:(\d+): error: ", e))}
    assert [error for error in errors if not error.startswith(wrong.name)] == []
    first = len(HEAD.splitlines()) + 1
    accepted = [
        call
        for number, call in enumerate(WRONG_CALLS.splitlines(), start=first)
        if number not in found
    ]
    assert not accepted


def test_keywords_of_the_llm_are_the_fields_of_its_config() -> None:
    keywords = get_type_hints(EngineOptions)
    own = get_type_hints(EngineConfig)
    assert {name: keywords.get(name) for name in own} == own
    others = keywords.keys() - own.keys()
    assert {"gpu_memory_utilization"} <= others <= LLM_ARGUMENTS.keys()


def test_the_package_says_that_it_is_typed() -> None:
    assert files("folojax").joinpath("py.typed").is_file()
