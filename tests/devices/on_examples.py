"""The examples of docs/several_devices.md run as they stand, but for the model."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from folojax import LLM, SamplingParams, log_likelihood, outputs_to_arrays
from tests import mixed_requests
from tests.house.test_imports import ROOT

DEVICES = jax.devices()


def run_example(number: int, directory: Path) -> dict[str, Any]:
    """What an example of the page has defined, run with a model of ours."""
    page = (ROOT / "docs" / "several_devices.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 3
    code = examples[number].replace('"Qwen/Qwen3-8B"', repr(str(directory)))
    names: dict[str, Any] = {}
    exec(compile(code, "several_devices.md", "exec"), names)
    return names


@pytest.mark.slow
def test_an_engine_on_each_device(text_directory: Path) -> None:
    names = run_example(1, text_directory)
    places = [one.runner.params["embed"].devices() for one in names["llm"].engines]
    assert places == [{device} for device in DEVICES]
    asked = SamplingParams(seed=1, max_tokens=16)
    known = LLM(text_directory, max_model_len=256).generate(names["prompts"], asked, False)
    mixed_requests.check_same(names["outputs"], known)


@pytest.mark.slow
def test_the_recipe_of_the_page_runs(text_directory: Path, capsys: Any) -> None:
    names = run_example(2, text_directory)
    assert names["llm"].weights_version == 3
    assert names["llm"].config.tensor_parallel_size == len(DEVICES)
    assert len(capsys.readouterr().out.splitlines()) == 3
    # What samples now is what was trained.
    outputs = names["llm"].generate(
        names["prompts"], SamplingParams(seed=9, max_tokens=8, record=True), use_tqdm=False
    )
    arrays: Any = outputs_to_arrays(outputs)
    found = log_likelihood(names["params"], arrays.tokens, arrays.mask, model=names["module"])
    np.testing.assert_allclose(found, arrays.record.raw, atol=1e-4)
