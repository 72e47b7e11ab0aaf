"""Runs of JSON Lines jobs on the stub, for tests."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from folojax import SamplingParams
from folojax.jsonl.file_job import JsonlJob, Summary
from folojax.jsonl.output_file import open_output
from tests.stub_llm import StubLLM


def line(line_id: Any = None, prompt: Any = "Hello", **sampling: Any) -> bytes:
    fields = {"prompt": prompt, "sampling": {"max_tokens": 2} | sampling}
    return json.dumps(fields | ({} if line_id is None else {"id": line_id})).encode() + b"\n"


def run(
    lines: Iterable[bytes | None],
    target: Path,
    *,
    resume: bool = True,
    llm: Any = None,
    **options: Any,
) -> Summary:
    defaults = options.pop("defaults", SamplingParams(max_tokens=4))
    stub: Any = llm or StubLLM()
    with open_output(target, resume=resume) as output:
        return JsonlJob(stub, output, defaults, **options).run(lines)


def entries(target: Path) -> list[dict[str, Any]]:
    """What is in an output file, in the order of the input."""
    found = [json.loads(raw) for raw in target.read_bytes().splitlines()]
    return sorted(found, key=lambda entry: entry["line"])
