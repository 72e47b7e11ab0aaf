"""Adapters beside all else that a request may ask for: records, taps, experts; over few bits."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams, log_likelihood, merge_lora, outputs_to_arrays
from folojax.models.quantized.codes import dequantize
from folojax.models.quantized.names import QUANTIZATIONS
from folojax.models.quantized.quantize import is_quantized
from folojax.steps.layers import read_residuals
from tests import dense
from tests.conftest import check_is_empty
from tests.families import save_family
from tests.laws.test_lora import PROMPTS, ROOM, tree_of
from tests.reference import TINY_LIMITS

SCALE = 0.5
MEAN_ERROR = {"int8": 0.1, "int4": 0.15, "fp8": 0.03}
"""Of log-probabilities, by the rounding of inputs alone; an adapter moves them by 0.3 to 0.6."""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=str)
def test_records_taps_experts_and_scores(options: dict[str, Any], tmp_path: Path) -> None:
    """Of a row with an adapter they are those of the merged model, of its neighbour the base's."""
    save_family("qwen3-moe", tmp_path)
    module, params = dense.load(tmp_path)
    llm = LLM((module, params), **TINY_LIMITS, **ROOM, **options, activation_taps=[0, 1])
    tree = tree_of(llm, 0)
    mine = llm.load_lora("mine", tree, SCALE)
    asked = SamplingParams(
        temperature=0,
        max_tokens=8,
        ignore_eos=True,
        record=True,
        prompt_logprobs=0,
        activations=True,
        routed_experts=True,
    )
    outputs = llm.generate([PROMPTS[0]] * 2, asked, False, [mine, None])
    said = [output.outputs[0].token_ids for output in outputs]
    assert said[0] != said[1]
    arrays = outputs_to_arrays(outputs)
    tokens, everything = jnp.asarray(arrays.tokens), jnp.ones(arrays.tokens.shape, bool)
    experts = jnp.asarray(arrays.routed_experts)
    length = len(PROMPTS[0])
    scores = llm.score(
        [PROMPTS[0]] * 2,
        said,
        False,
        [mine, None],
        [one.outputs[0].routed_experts for one in outputs],
    )
    for row, weights in enumerate((merge_lora(params, tree, SCALE), params)):
        one = outputs[row].outputs[0]
        wanted = log_likelihood(weights, tokens, everything, model=module)[row]
        raw = [entry.raw for entry in one.record or []]
        np.testing.assert_allclose(raw, wanted[length:], atol=1e-4)
        told = (outputs[row].prompt_logprobs or [])[1:]
        prompt = [next(iter((entry or {}).values())).logprob for entry in told]
        np.testing.assert_allclose(prompt, wanted[1:length], atol=1e-4)
        np.testing.assert_allclose(scores[row].logprobs, raw, atol=1e-4)
        assert not options or scores[row].logprobs == raw
        streams = read_residuals(weights, tokens[row, :-1], (0, 1), model=module)
        assert one.activations is not None
        for layer in (0, 1):
            np.testing.assert_allclose(one.activations[layer], streams[layer], atol=2e-4)
        lora: dict[str, Any] = {} if row else {"lora": tree, "lora_scale": SCALE}
        beside = log_likelihood(
            params, tokens, everything, model=module, routed_experts=experts, **lora
        )
        np.testing.assert_allclose(raw, beside[row, length:], atol=1e-4)
    check_is_empty(llm)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_over_a_base_in_few_bits(quantization: str, tiny_model: tuple) -> None:
    """What a quantised kernel gives, and the update in floats: neither merged nor rounded."""
    module, params = tiny_model
    llm = LLM(tiny_model, **TINY_LIMITS, **ROOM, quantization=quantization)
    trees = [tree_of_floats(llm, params, seed) for seed in (0, 1)]
    loras = [None, *(llm.load_lora(f"{i}", tree, SCALE) for i, tree in enumerate(trees))]
    asked = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, record=True)
    prompts = [PROMPTS[0]] * 3
    outputs = llm.generate(prompts, asked, False, loras)
    alone = [llm.generate(PROMPTS[0], asked, False, one)[0] for one in loras]
    rounded = jax.tree.map(
        lambda leaf: jnp.asarray(dequantize(leaf)) if is_quantized(leaf) else leaf,
        llm.params,
        is_leaf=is_quantized,
    )
    arrays = outputs_to_arrays(outputs)
    given = jnp.asarray(arrays.tokens), jnp.asarray(arrays.mask)
    assert arrays.record is not None
    start = len(PROMPTS[0])
    for row, tree in enumerate([None, *trees]):
        assert outputs[row].outputs[0].token_ids == alone[row].outputs[0].token_ids
        lora = {} if tree is None else {"lora": tree, "lora_scale": SCALE}
        beside = log_likelihood(llm.params, *given, model=module, **lora)[row, start:]
        # Rounded inputs are now and then rounded to the other side.
        np.testing.assert_allclose(arrays.record.raw[row, start:], beside, atol=2e-2)
        weights = rounded if tree is None else merge_lora(rounded, tree, SCALE)
        merged, plain = (
            dense.likelihood(one, *given, model=module)[row, start:] for one in (weights, rounded)
        )
        error = np.abs(arrays.record.raw[row, start:] - merged).mean()
        assert error < MEAN_ERROR[quantization]
        assert tree is None or np.abs(plain - merged).mean() > 0.3
    check_is_empty(llm)


def tree_of_floats(llm: LLM, params: Any, seed: int) -> Any:
    """A random adapter of the model's kernels before they were quantised."""
    rng = np.random.default_rng(seed)
    return {
        layer: {
            name: {
                "a": rng.normal(0, 0.1, (8, block[name].shape[1])).astype(np.float32),
                "b": rng.normal(0, 0.1, (block[name].shape[0], 8)).astype(np.float32),
            }
            for name in ("qkv", "o", "gate_up", "down")
        }
        for layer, block in params.items()
        if layer.startswith("layers_")
    }
