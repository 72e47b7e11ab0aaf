"""Laws of models that carry more than a stream from layer to layer: Gemma 4 and 3n.

Keys and values that layers share; heads of two sizes in one, residual streams in the other.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from folojax import LLM, ActivationEdit
from folojax.backend import backend
from folojax.models.quantized.quantize import is_quantized, quantize
from tests import dense
from tests.greedy_work import PARAMS, Work, begin, check_ends, generate, make_work
from tests.reference import TIGHT, TINY_LIMITS

pytestmark = pytest.mark.slow

LIMITS = TINY_LIMITS | {"max_num_batched_tokens": 32, "check_integrity": True}


@pytest.fixture(scope="module", params=["gemma4", "gemma3n"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return make_work(request.param, tmp_path_factory.mktemp("shared"), LIMITS)


@pytest.mark.parametrize(
    "options", [{"max_num_batched_tokens": 16}, {"max_decode_steps": 4}], ids=str
)
def test_options_and_whole_programs_change_no_token(
    shared: Work, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, expected = shared
    assert generate(LLM(model, **LIMITS | options), prompts) == expected
    monkeypatch.setattr(backend, "CPU", dataclasses.replace(backend.CPU, steps="whole"))
    assert generate(LLM(model, **LIMITS | options), prompts) == expected


def test_swaps_forks_and_snapshots_change_no_token(shared: Work) -> None:
    """Pages of all layers leave for the host and come back, as pages and as tokens."""
    model, prompts, expected = shared
    llm = LLM(model, **LIMITS | TIGHT | {"num_host_pages": 32, "min_swap_tokens": 1})
    assert generate(llm, prompts) == expected
    assert llm.metrics().num_preemptions > 0
    begin(llm, shared)
    snapshot = llm.snapshot("a")
    assert snapshot.kv is not None
    if model[0].config.full_head_dim:
        assert snapshot.kv.keys.shape[::2] == (1, 1), "layers differ, and lie side by side"
        assert snapshot.kv.keys.shape[3] == 2 * (2 * 16 + 2 * 32)
    llm.resume(snapshot, "c")
    check_ends(llm, shared)


def test_order_and_cached_pages_change_no_token(shared: Work) -> None:
    model, prompts, expected = shared
    llm = LLM(model, **LIMITS)
    assert generate(llm, prompts[::-1]) == expected[::-1]
    assert generate(llm, prompts) == expected
    (output,) = llm.generate([prompts[1]], PARAMS, use_tqdm=False)
    assert output.num_cached_tokens == 80
    assert list(output.outputs[0].token_ids) == expected[1]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_embeddings_by_layer_may_be_of_few_bits(shared: Work, quantization: str) -> None:
    (module, params), prompts, _ = shared
    table = quantize("layer_embed", params["layer_embed"], quantization)
    assert is_quantized(table)
    small = params | {"layer_embed": table}
    found, exact = (dense.logits(module, one, prompts[3]) for one in (small, params))
    assert 0 < np.abs(found - exact).mean() < 0.05
    llm = LLM((module, params), **LIMITS | {"quantization": quantization})
    assert len(generate(llm, prompts[:2])) == 2


def test_an_edited_stream_is_that_of_the_token_alone(shared: Work) -> None:
    """Of several streams the first is edited; that of others stays."""
    model, prompts, expected = shared
    edit = ActivationEdit(name="flip", layers=(1,), apply=lambda x, layer: -x)
    llm = LLM(model, **LIMITS, activation_edits=[edit])
    edited = dataclasses.replace(PARAMS, activation_edits=("flip",))
    outputs = llm.generate([prompts[2]] * 2, [PARAMS, edited], use_tqdm=False)
    plain, changed = (list(output.outputs[0].token_ids) for output in outputs)
    assert plain == expected[2]
    assert changed != plain


def test_streams_are_read_behind_layers(shared: Work) -> None:
    """What lies beside the stream is none of it."""
    (module, params), prompts, _ = shared
    llm = LLM((module, params), **LIMITS, activation_taps=(0, 2))
    wanted = dataclasses.replace(PARAMS, activations=True, max_tokens=1)
    (output,) = llm.generate([prompts[4]], wanted, use_tqdm=False)
    streams = dense.residuals(params, np.asarray(prompts[4]), layers=(0, 2), model=module)
    found = output.outputs[0].activations
    assert found is not None
    for layer, expected in zip((0, 2), streams, strict=True):
        np.testing.assert_allclose(np.asarray(found[layer]), expected, atol=1e-4)
