"""Kernels in eight bits, against NumPy's integers and against transformers with rounded layers."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

from folojax import LLM, SamplingParams, init_lora, log_likelihood, merge_lora
from folojax.layered import LayeredSteps
from folojax.models.checkpoint import build_module, load_params, open_checkpoint
from folojax.models.dense_attend import dense_attend
from folojax.models.int8_kernels import (
    Int8Kernel,
    has_int8_kernels,
    project_int8,
    quantize_kernel,
    quantize_params,
    take_int8,
)
from folojax.models.save import save_pretrained
from folojax.sampling import SamplingClass
from tests import reference
from tests.conftest import check_is_empty
from tests.families import save_family
from tests.text import make_letters_tokenizer

LIMITS: dict[str, Any] = reference.TINY_LIMITS | {"quantization": "int8"}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
PROMPTS = [list(range(5, 5 + length)) for length in (3, 40, 17, 60, 9)]


@pytest.fixture(scope="module")
def shared_llm(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, **LIMITS)


@pytest.fixture
def llm(shared_llm: LLM, tiny_model: tuple) -> Iterator[LLM]:
    shared_llm.update_params(tiny_model[1])
    yield shared_llm
    check_is_empty(shared_llm)


def round_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers of -127 to 127 and what they count in, row by row."""
    x = x.astype(np.float32)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.where(largest == 0, np.float32(1), largest * np.float32(1 / 127)).astype(np.float32)
    return np.rint(x / scale).astype(np.int64), scale


def multiply(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """What `project_int8` is to give, by NumPy's 64-bit integers."""
    (rows, row_scale), (columns, column_scale) = round_rows(x), round_rows(kernel)
    return (rows @ columns.T).astype(np.float32) * row_scale * column_scale.T


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_kernel_is_rounded_to_the_nearest() -> None:
    kernel = normal(24, 40)
    kernel[3] = 0
    found = quantize_kernel(jnp.asarray(kernel))
    chex.assert_shape(found, [(24, 40), (24,)])
    values, scale = round_rows(kernel)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.scale, scale[:, 0])
    back = np.asarray(found.values, np.float32) * np.asarray(found.scale)[:, None]
    assert (np.abs(back - kernel) <= 0.5001 * scale).all()
    assert (np.abs(found.values).max(axis=1)[np.arange(24) != 3] == 127).all()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 16, 32, 33, 130])
def test_products_are_those_of_integers_to_the_bit(num_rows: int) -> None:
    x, kernel = normal(num_rows, 96), normal(72, 96, seed=1)
    x[0, 0] = 500.0  # one row that is mostly rounded away
    found = jax.jit(project_int8)(jnp.asarray(x), quantize_kernel(jnp.asarray(kernel)))
    np.testing.assert_array_equal(found, multiply(x, kernel))


def test_a_row_is_the_same_whatever_the_rows_beside_it() -> None:
    x, kernel = jnp.asarray(normal(64, 96)), quantize_kernel(jnp.asarray(normal(72, 96, seed=1)))
    whole = np.asarray(jax.jit(project_int8)(x, kernel))
    for size in (1, 2, 7, 8, 16, 32):
        np.testing.assert_array_equal(jax.jit(project_int8)(x[:size], kernel), whole[:size])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(value: float) -> None:
    x = normal(3, 16)
    x[1, 4] = value
    kernel = quantize_kernel(jnp.asarray(normal(8, 16, seed=1)))
    found = np.asarray(jax.jit(project_int8)(jnp.asarray(x), kernel))
    assert np.isfinite(found).all(axis=1).tolist() == [True, False, True]
    assert not np.isfinite(found[1]).any()


def test_rows_of_an_embedding() -> None:
    table = normal(20, 8)
    values, scale = round_rows(table)
    found = take_int8(quantize_kernel(jnp.asarray(table)), jnp.asarray([4, 0, 99]))
    np.testing.assert_array_equal(found, (values * scale).astype(np.float32)[[4, 0, 19]])


def rounded(model: Any) -> Any:
    """A model of transformers whose linear layers and embedding compute in eight bits."""
    import torch
    from transformers.pytorch_utils import Conv1D

    def linear(kernel: np.ndarray, bias: Any, x: Any) -> Any:
        flat = x.detach().numpy().reshape(-1, x.shape[-1])
        out = torch.from_numpy(multiply(flat, kernel)).reshape(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def embed(table: np.ndarray, ids: Any) -> Any:
        return torch.from_numpy(table)[ids]

    def instead(forward: Any, _: Any, args: tuple, __: Any) -> Any:
        return forward(*args)

    for name, layer in model.named_modules():
        is_router = name.endswith((".gate", ".router"))
        if isinstance(layer, torch.nn.Linear | Conv1D) and not is_router:
            kernel = layer.weight.detach().numpy()
            kernel = kernel.T if isinstance(layer, Conv1D) else kernel
            forward: Any = functools.partial(linear, kernel.copy(), layer.bias)
        elif isinstance(layer, torch.nn.Embedding) and "wpe" not in name:
            values, scale = round_rows(layer.weight.detach().numpy())
            forward = functools.partial(embed, (values * scale).astype(np.float32))
        else:
            continue
        layer.register_forward_hook(functools.partial(instead, forward))
    return model


@pytest.mark.parametrize(
    "case", ["llama", "qwen2", "qwen3", "gpt2", "olmo2", "granite", "qwen3-moe"]
)
def test_families_against_transformers_with_rounded_layers(tmp_path: Path, case: str) -> None:
    if case in ("llama", "qwen2", "qwen3"):
        model = reference.save_tiny(case, tmp_path, tie_word_embeddings=case != "llama")
    else:
        model = save_family(case, tmp_path)
    tokens = np.random.default_rng(0).integers(3, 120, 24).tolist()
    plain = reference.logits(model, tokens)
    expected = reference.logits(rounded(model), tokens)
    checkpoint = open_checkpoint(tmp_path)
    params = load_params(checkpoint, jnp.float32, is_int8=True)
    found = logits(build_module(checkpoint.config, jnp.float32), params, tokens)
    # A value on the border between two integers may fall to either side of it.
    difference = np.abs(found - expected)
    assert np.quantile(difference, 0.99) < 2e-4
    assert difference.max() < 0.1 * np.abs(plain - expected).max()


def logits(module: Any, params: Any, tokens: list[int]) -> np.ndarray:
    ids = jnp.asarray(tokens)
    hidden, _ = module.apply({"params": params}, ids, jnp.arange(len(tokens)), None, dense_attend)
    return np.asarray(module.apply({"params": params}, hidden, method="logits"))


def test_loading_is_quantize_params_of_what_is_loaded(
    tiny_directory: Path, tiny_model: tuple
) -> None:
    params = load_params(open_checkpoint(tiny_directory), jnp.float32, is_int8=True)
    chex.assert_trees_all_equal(params, quantize_params(tiny_model[1]))
    assert isinstance(params["layers_0"]["qkv"], Int8Kernel)
    assert params["layers_0"]["attn_norm"].dtype == jnp.float32
    chex.assert_trees_all_equal(quantize_params(params), params)
    assert has_int8_kernels(params)
    assert not has_int8_kernels(tiny_model[1])


def outputs(llm: LLM, prompts: list[list[int]]) -> list[tuple]:
    """Tokens and log-probabilities, computed afresh: cached pages may differ in their last bits."""
    llm.reset_prefix_cache()
    found = []
    for output in llm.generate(prompts, GREEDY, use_tqdm=False):
        (one,) = output.outputs
        assert one.logprobs is not None
        found.append((one.token_ids, [next(iter(x.values())).logprob for x in one.logprobs]))
    return found


def test_directories_and_pairs_give_the_same(tiny_directory: Path, tiny_model: tuple) -> None:
    module, params = tiny_model
    small = module, quantize_params(params)
    letters = make_letters_tokenizer()
    llms = [
        LLM(model, letters, dtype="float32", **LIMITS)
        for model in (tiny_model, tiny_directory, small)
    ]
    expected, *others = [outputs(llm, PROMPTS) for llm in llms]
    assert others == [expected, expected]
    bytes_of_floats = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for llm in llms:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(llm.params))
        assert llm.memory_plan.weights_bytes == size < 0.4 * bytes_of_floats


def test_every_token_is_the_likeliest_of_the_plain_module(llm: LLM, tiny_model: tuple) -> None:
    module, _ = tiny_model
    for prompt, (tokens, logprobs) in zip(PROMPTS, outputs(llm, PROMPTS), strict=True):
        found = logits(module, llm.params, prompt + tokens)[len(prompt) - 1 : -1]
        assert found.argmax(axis=1).tolist() == tokens
        expected = jax.nn.log_softmax(found)[np.arange(len(tokens)), np.array(tokens)]
        np.testing.assert_allclose(logprobs, expected, atol=2e-3)


def test_alone_or_in_a_batch_deterministic_mode_keeps_every_bit(tiny_model: tuple) -> None:
    llm = LLM(tiny_model, **LIMITS, deterministic=True)
    together = outputs(llm, PROMPTS)
    assert [outputs(llm, [prompt])[0] for prompt in PROMPTS] == together
    texts = [one[0] for one in together]
    scores = llm.score(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        [{"prompt_token_ids": tokens} for tokens in texts],
        use_tqdm=False,
    )
    for score, (_, logprobs) in zip(scores, together, strict=True):
        assert list(score.logprobs) == logprobs


def test_in_bfloat16_and_several_steps_a_call(tiny_directory: Path) -> None:
    letters = make_letters_tokenizer()
    llms = [
        LLM(tiny_directory, letters, dtype="bfloat16", **LIMITS, max_decode_steps=n) for n in (1, 4)
    ]
    found = [[tokens for tokens, _ in outputs(llm, PROMPTS)] for llm in llms]
    assert found[0] == found[1]
    # The kernels are those of bfloat16, and the module computes what lies between them in it.
    module, params = llms[0].engine.runner.model, llms[0].params
    assert params["layers_0"]["attn_norm"].dtype == module.dtype == jnp.bfloat16
    for prompt, tokens in zip(PROMPTS, found[0], strict=True):
        scores = logits(module, params, prompt + tokens)[len(prompt) - 1 : -1, : len(letters)]
        chosen = scores[np.arange(len(tokens)), np.array(tokens)]
        # Not all are the likeliest: an engine rounds what it has cached. Scores vary by 1.7.
        gap = scores.max(axis=1) - chosen
        assert (gap == 0).mean() > 0.8
        assert gap.max() < 0.25


def test_nothing_is_compiled_after_a_warm_up(tiny_model: tuple) -> None:
    llm = LLM(tiny_model, **LIMITS, strict=True)
    llm.warm_up([SamplingClass.GREEDY])
    assert len(outputs(llm, PROMPTS)) == len(PROMPTS)
    llm.update_params(tiny_model[1])
    assert len(outputs(llm, PROMPTS)) == len(PROMPTS)


def test_memory_is_measured_for_what_will_run(
    tiny_model: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that are lowered on the way take the parameters that the engine has."""
    lowered = []
    decode_calls = LayeredSteps.decode_calls

    def spy(steps: LayeredSteps, params: Any, *args: Any) -> list[Any]:
        lowered.append(params)
        return decode_calls(steps, params, *args)

    monkeypatch.setattr(LayeredSteps, "decode_calls", spy)
    fields = {name: value for name, value in LIMITS.items() if name != "num_pages"}
    llm = LLM(tiny_model, **fields, memory_fraction=0.01)
    assert llm.memory_plan.is_measured
    *_, params = lowered
    # Two layers are enough to know.
    kept = {name: leaf for name, leaf in llm.params.items() if name != "layers_2"}
    chex.assert_trees_all_equal_shapes_and_dtypes(params, kept)


def test_new_parameters_are_put_into_eight_bits(llm: LLM, tiny_model: tuple) -> None:
    before = outputs(llm, PROMPTS)
    changed = jax.tree.map(lambda leaf: leaf * 1.25, tiny_model[1])
    llm.update_params(changed)
    chex.assert_trees_all_equal(llm.params, quantize_params(changed))
    after = outputs(llm, PROMPTS)
    assert after != before
    llm.update_params(quantize_params(tiny_model[1]))
    assert outputs(llm, PROMPTS) == before
    llm.update_params(freeze(jax.tree.map(np.asarray, tiny_model[1])))
    assert outputs(llm, PROMPTS) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "embed",
            jnp.ones((128, 63)),
            r"embed is float32\[128, 63\], the model takes a float .*64",
        ),
        (
            "embed",
            jnp.ones((128, 64), jnp.int8),
            r"embed is int8\[128, 64\], the model takes a float",
        ),
        ("final_norm", jnp.ones((64,), jnp.bfloat16), r"final_norm is bfloat16\[64\]"),
        ("layers_0", {}, "layers_0/qkv/values is missing"),
        ("extra", jnp.ones((2, 2)), "extra is unknown"),
    ],
)
def test_parameters_that_do_not_fit_are_named(
    llm: LLM, tiny_model: tuple, name: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.update_params({**tiny_model[1], name: value})
    chex.assert_trees_all_equal(llm.params, quantize_params(tiny_model[1]))


def test_a_kernel_of_another_shape_is_refused(tiny_model: tuple) -> None:
    module, params = tiny_model
    wrong = {**params, "embed": jnp.ones((130, 64))}
    with pytest.raises(ValueError, match=r"embed is \(130, 64\), the model needs \(128, 64\)"):
        logits(module, quantize_params(wrong), [3, 4])


def test_derivatives_are_refused(llm: LLM, tiny_model: tuple) -> None:
    """Those of norms as well: they would be of the scales alone."""

    def loss(norm: Any) -> Any:
        params = {**llm.params, "final_norm": norm}
        tokens = jnp.asarray([PROMPTS[0], PROMPTS[0][::-1]])
        return log_likelihood(params, tokens, tokens > 0, model=tiny_model[0]).sum()

    assert np.isfinite(loss(llm.params["final_norm"]))
    with pytest.raises(TypeError, match="kernels in eight bits cannot be differentiated"):
        jax.grad(loss)(llm.params["final_norm"])


def test_a_likelihood_is_that_of_the_engine(llm: LLM, tiny_model: tuple) -> None:
    (prompt, *_), ((tokens, logprobs), *_) = PROMPTS, outputs(llm, PROMPTS)
    sequence = jnp.asarray(prompt + tokens)
    mask = jnp.arange(len(sequence)) >= len(prompt)
    found = log_likelihood(llm.params, sequence, mask, model=tiny_model[0])
    np.testing.assert_allclose(found[len(prompt) :], logprobs, atol=2e-3)


class Other(nn.Module):
    """A module that knows nothing of eight bits."""

    config: Any
    dtype: Any


def test_refusals(llm: LLM, tiny_model: tuple, tmp_path: Path) -> None:
    module, params = tiny_model
    small = quantize_params(params)
    without = {name: value for name, value in LIMITS.items() if name != "quantization"}
    with pytest.raises(ValueError, match='pass quantization="int8"'):
        LLM((module, small), **without)
    with pytest.raises(ValueError, match="the module a Other: kernels in eight bits are for"):
        LLM((Other(module.config, jnp.float32), params), **LIMITS)
    with pytest.raises(ValueError, match="quantization is 'int4'"):
        LLM(tiny_model, **without, quantization="int4")
    with pytest.raises(ValueError, match="eight bits"):
        llm.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="eight bits"):
        save_pretrained(small, tmp_path / "saved", module.config)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="eight bits"):
        init_lora(jax.random.key(0), small, 2)
    lora = init_lora(jax.random.key(0), params, 2)
    with pytest.raises(ValueError, match="layers_0/qkv is in eight bits"):
        merge_lora(small, lora)


def test_the_real_model_stays_close() -> None:
    """Mean divergence from float32, in nats a token; 0.03 when this was written."""
    checkpoint = open_checkpoint(None)
    module = build_module(checkpoint.config, jnp.float32)
    params = load_params(checkpoint, jnp.float32)
    text = (
        "The lighthouse keeper wrote every evening, whether or not a ship had passed: the wind, "
        "the height of the waves, and what the gulls were quarrelling about."
    )
    tokens = reference.embedded_tokenizer()(text)["input_ids"]
    plain = jax.nn.log_softmax(logits(module, params, tokens))
    params = load_params(checkpoint, jnp.float32, is_int8=True)
    small = jax.nn.log_softmax(logits(module, params, tokens))
    divergence = (np.exp(plain) * (plain - small)).sum(axis=1)
    assert 1e-4 < divergence.mean() < 0.1
