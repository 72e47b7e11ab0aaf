"""Kernels in few bits where several devices share each layer: the tokens of one device."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from folojax import LLM, RequestOutput, SamplingParams, join_params
from folojax.models.core.shards import cut_params
from folojax.models.quantized.quantize import quantize_params
from tests import dense
from tests.devices.on_all import check_close, over
from tests.families import save_family
from tests.reference import MORE_LIMITS, save_tiny

KINDS = ("int8", "int4", "int4 in tiles", "fp8")
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "head_dim": 64,
    "intermediate_size": 256,
    "vocab_size": 512,
}
ASKED = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1)
PROMPTS = [list(range(5, 17)), [70, 3, 9]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whose parts for two and four devices are whole groups."""
    directory = tmp_path_factory.mktemp("quantized")
    save_tiny("llama", directory, **SHAPE)
    return dense.load(directory)


@pytest.fixture(scope="module")
def floats(model: Any) -> list[RequestOutput]:
    return generate(model)[1]


def equal(one: Any, other: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_floats_and_join_to_the_whole(model: Any, kind: str) -> None:
    """On the host, as files are read."""
    module, params = model
    whole = jax.tree.map(np.asarray, quantize_params(params, kind))
    parts = cut_params(whole, module.config, 2)
    of_floats = quantize_params(cut_params(params, module.config, 2), kind)
    assert equal(parts["layers_0"]["qkv"], of_floats["layers_0"]["qkv"])
    assert equal(parts["layers_1"]["gate_up"], of_floats["layers_1"]["gate_up"])
    joined = join_params(parts, module.config)
    assert equal(joined, whole)
    assert all(isinstance(one, np.ndarray) for one in jax.tree.leaves(joined))


def generate(model: Any, **options: Any) -> tuple[LLM, list[RequestOutput]]:
    llm = LLM(model, **MORE_LIMITS, **options)
    return llm, llm.generate(PROMPTS, ASKED, use_tqdm=False)


def largest_gap(found: list[RequestOutput], known: list[RequestOutput]) -> float:
    """Among log-probabilities of the prompts' tokens."""
    gaps = []
    for one, other in zip(found, known, strict=True):
        for token, a, b in zip(
            one.prompt_token_ids[1:],
            (one.prompt_logprobs or [])[1:],
            (other.prompt_logprobs or [])[1:],
            strict=True,
        ):
            assert a is not None
            assert b is not None
            gaps.append(abs(a[token].logprob - b[token].logprob))
    return max(gaps)


@pytest.mark.parametrize(
    ("quantization", "count"),
    [
        ("int4", 2),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("int4", 4), ("fp8", 2), ("fp8", 4), ("int8", 2), ("int8", 4))
        ),
    ],
)
def test_results_are_those_of_one_device(
    model: Any, floats: list[RequestOutput], quantization: str, count: int
) -> None:
    """To rounding of floats in float8, of inputs in four bits, of inputs by device in eight."""
    alone, known = generate(model, quantization=quantization)
    llm, found = generate(model, quantization=quantization, tensor_parallel_size=count)
    if quantization != "int8":
        tokens = [[one.outputs[0].token_ids for one in some] for some in (found, known)]
        assert tokens[0] == tokens[1]
    gap, of_bits = largest_gap(found, known), largest_gap(known, floats)
    assert gap < {"int4": 0.1, "fp8": 0.001, "int8": 1.5}[quantization] * of_bits
    assert equal(join_params(jax.device_get(llm.params), model[0].config), alone.params)
    part = alone.memory_plan.weights_bytes / llm.memory_plan.weights_bytes
    assert 0.85 * count < part <= count


@pytest.mark.slow
def test_new_weights_are_rounded_likewise(model: Any, tmp_path: Path) -> None:
    module, params = model
    options: dict[str, Any] = {"quantization": "int4"}
    alone, _ = generate(model, **options)
    llm, known = generate(model, **options, tensor_parallel_size=2)
    assert llm.engine.weights == alone.engine.weights
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    llm.update_params(over(jax.tree.map(lambda leaf: leaf * 1.25, params), mesh))
    alone.update_params(jax.tree.map(lambda leaf: leaf * 1.25, params))
    found = [one.generate(PROMPTS, ASKED, use_tqdm=False) for one in (llm, alone)]
    assert largest_gap(*found) < 0.1
    assert llm.engine.weights == alone.engine.weights
    llm.update_params(jax.tree.map(np.asarray, params))
    check_close(llm.generate(PROMPTS, ASKED, use_tqdm=False), known)
    llm.save_pretrained(tmp_path)
    again, _ = generate(tmp_path, **options, tensor_parallel_size=2)
    assert equal(again.params["layers_0"], llm.params["layers_0"])
    _, shared = generate((module, llm.params), **options, mesh=mesh)
    check_close(shared, known)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("qwen2-moe", "int8"),
        ("deepseek-v3", "int8"),
        ("gpt2", "int8"),
        ("gpt2", "fp8"),
        ("qwen2", "fp8"),
    ],
)
def test_families(family: str, quantization: str, tmp_path: Path) -> None:
    save_family(family, tmp_path)
    model = dense.load(tmp_path)
    _, floats = generate(model)
    _, known = generate(model, quantization=quantization)
    _, found = generate(model, quantization=quantization, tensor_parallel_size=2)
    most = {"int8": 1.5, "fp8": 0.001}[quantization]
    assert largest_gap(found, known) < most * largest_gap(known, floats)


@pytest.mark.slow
def test_codes_of_a_file_are_kept() -> None:
    """Of the packaged model, which has nine heads."""
    options: dict[str, Any] = {"quantization": "int4", "max_model_len": 64, "max_num_seqs": 2}
    alone, llm = (LLM(None, **options, tensor_parallel_size=count) for count in (1, 3))
    joined = join_params(jax.device_get(llm.params), llm.model_config)
    assert equal(joined, alone.params)
