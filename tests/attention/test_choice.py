"""Which attention kernel the layers of each family use: the table of docs/gpu.md."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import transformers

from folojax.attention import cudnn, kernels_of
from folojax.backend.backend import CPU, GPU, Backend
from folojax.models.families.families import FAMILIES as ARCHITECTURES
from folojax.models.files.hf_config import config_from_hf
from tests.families import FAMILIES, config_of

HOPPER = dataclasses.replace(GPU, capability=9.0)
DOCS = Path(__file__).parents[2] / "docs" / "gpu.md"


@pytest.fixture(autouse=True)
def with_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one; nothing is compiled for it."""
    monkeypatch.setattr(cudnn, "problem", lambda: None)


def kernels(config: Any, backend: Backend, dtype: Any) -> tuple[set[str], set[str]]:
    """The kernels of all layers, and the reasons of those without the preferred one."""
    layers, reasons = kernels_of(config, backend.kv_layout(config, dtype, 4, 64))
    return set(layers), set(reasons)


@pytest.mark.parametrize("case", FAMILIES)
def test_families_attend_as_the_table_says(case: str) -> None:
    config = config_from_hf(config_of(case, transformers))
    (row,) = re.findall(rf"^\| `{config.architecture}` \| (.*?) \|", DOCS.read_text(), re.M)
    assert kernels(config, HOPPER, jnp.bfloat16)[0] == set(row.split(", "))


def test_the_table_has_every_architecture() -> None:
    kinds = "cudnn|latent|reference"
    rows = re.findall(rf"^\| `(\w+)` \| (?:{kinds})[\w, ]* \|", DOCS.read_text(), re.M)
    assert sorted(rows) == sorted(ARCHITECTURES)


def test_float32_on_a_gpu_says_why_it_is_slow() -> None:
    config = config_from_hf(config_of("llama", transformers))
    names, reasons = kernels(config, HOPPER, jnp.float32)
    assert names == {"reference"}
    assert reasons == {"cudnn takes bfloat16 and float16"}


def test_another_call_in_jax_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "problem", lambda: "is called otherwise in JAX 0.99")
    config = config_from_hf(config_of("llama", transformers))
    assert kernels(config, HOPPER, jnp.bfloat16) == (
        {"reference"},
        {"cudnn is called otherwise in JAX 0.99"},
    )


@pytest.mark.parametrize(
    ("case", "reason"),
    [("gemma2", "native does not cap scores"), ("gpt-oss", "native knows no sinks")],
)
def test_what_goes_another_way_on_cpu_too(case: str, reason: str) -> None:
    config = config_from_hf(config_of(case, transformers))
    assert kernels(config, CPU, jnp.float32) == ({"reference"}, {reason})
