"""Steps whose sums are in order: what they take, how they draw, and engines of them on a CPU."""

import dataclasses
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams
from folojax.backend.backend import GPU
from folojax.engine import build
from folojax.models.core.config import ModelConfig
from folojax.sampling.logit_edits import ANY_TOKEN, NUM_RECENT, EditRows, init_edits
from folojax.sampling.rows import SampleInputs, SamplingRows, SlotState
from folojax.sampling.sampler import SamplingSpec
from folojax.sampling.sampling_class import SamplingClass
from folojax.steps import ordered, step
from tests.reference import MORE_LIMITS

HOPPER = dataclasses.replace(GPU, capability=9.0)
QWEN3 = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position=64,
    rope_theta=1e4,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    qkv_bias=False,
    qk_norm=True,
    tie_embeddings=True,
)
EXPERTS = {"num_experts": 4, "num_experts_per_token": 2, "expert_size": 8}


@pytest.mark.parametrize(
    ("changes", "dtype", "capability", "quantization", "words"),
    [
        ({}, jnp.bfloat16, 9.0, None, None),
        ({"qk_norm": False, "qkv_bias": True}, jnp.float16, 9.0, None, None),
        ({}, jnp.float32, 9.0, None, "takes bfloat16 and float16"),
        ({}, jnp.bfloat16, 8.0, None, "Hopper generation"),
        ({}, jnp.bfloat16, 10.0, None, "Hopper generation"),
        ({}, jnp.bfloat16, 9.0, "int8", "quantised"),
        (EXPERTS, jnp.bfloat16, 9.0, None, "experts"),
        ({"norm": "layer"}, jnp.bfloat16, 9.0, None, "norms"),
        ({"is_qk_norm_joint": True}, jnp.bfloat16, 9.0, None, "norms"),
        ({"has_post_norm": True}, jnp.bfloat16, 9.0, None, "norms"),
        ({"head_dim": 24}, jnp.bfloat16, 9.0, None, "head dims"),
        ({"attention_softcap": 30.0}, jnp.bfloat16, 9.0, None, "cap"),
        ({"has_sinks": True}, jnp.bfloat16, 9.0, None, "sinks"),
    ],
)
def test_what_is_not_taken_goes_in_rows(
    changes: dict[str, Any],
    dtype: Any,
    capability: float,
    quantization: str | None,
    words: str | None,
) -> None:
    config = dataclasses.replace(QWEN3, **changes)
    backend = dataclasses.replace(GPU, capability=capability)
    reason = backend.not_ordered(config, dtype, quantization)
    found = backend.deterministic(config, dtype, quantization)
    if words is None:
        assert "adapters" in (backend.not_ordered(config, dtype, quantization, True) or "")
        assert reason is None
        assert (found.steps, found.kernels) == ("ordered", ("ordered",))
    else:
        assert reason is not None
        assert words in reason
        assert (found.steps, found.kernels) == ("rows", ("alike",))


@pytest.mark.slow
def test_draws_in_blocks_are_those_of_all_rows_at_once() -> None:
    """Of 40 rows, two of them banned a token and one slot with a penalty."""
    count, size, slots = 40, 200, 64
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (count, size)), jnp.float32)
    edits = init_edits(slots, size)
    edits = edits._replace(history=edits.history.at[5, :50].set(2))
    state = SlotState(jnp.zeros(slots, jnp.int32), edits)
    likeliest = jnp.argmax(logits, axis=1)
    bans = np.full((3, 2 + NUM_RECENT), ANY_TOKEN, np.int32)
    bans[:, 0] = 3, 37, count  # two rows and padding
    bans[:2, 1] = likeliest[jnp.array([3, 37])]
    slot = jnp.arange(count, dtype=jnp.int32) + 10
    ones = jnp.ones(count)
    inputs = SampleInputs(
        slot,
        jnp.arange(count),
        SamplingRows(
            temperature=jnp.asarray(rng.integers(0, 2, count), jnp.float32),
            top_k=jnp.full(count, 20),
            top_p=ones * 0.9,
            min_p=ones * 0,
            seed=jnp.asarray(rng.integers(0, 99, (count, 2)), jnp.uint32),
        ),
        EditRows(slot.at[7].set(5), ones, ones * 0.5, ones * 0.5, jnp.asarray(bans)),
    )
    spec = SamplingSpec(SamplingClass.EDITED, num_logprobs=3, has_record=True)
    expected, out = step.draw_and_note(state, logits, inputs, spec)
    found, in_blocks = ordered.draw_in_blocks(state, logits, inputs, spec)
    assert out.tokens[3] != likeliest[3]
    assert out.tokens[37] != likeliest[37]
    chex.assert_trees_all_close(in_blocks, out, atol=1e-5)
    chex.assert_trees_all_equal(found, expected)


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0.8, "top_p": 0.9, "seed": 1, "repetition_penalty": 1.2},
]


def test_rows_that_ask_for_other_sampling_are_sampled_apart(
    tiny_model: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone or with all others: the same tokens, from executables of the plan alone."""
    exact = dataclasses.replace(
        GPU,
        steps="ordered",
        exact_steps="ordered",
        memory_fraction=None,
        default_dtype="float32",
        kernels=("reference",),
        warms_up=False,
    )
    monkeypatch.setattr(build, "choose_backend", lambda device: exact)
    llm = LLM(tiny_model, strict=True, **MORE_LIMITS)
    assert llm.engine.runner.steps.kind == "ordered"
    prompts = [[5 + i, 9, 11 + 3 * i] for i in range(4)]
    params = [SamplingParams(max_tokens=9, ignore_eos=True, **kind) for kind in KINDS]
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, asked, expected in zip(prompts, params, together, strict=True):
        (alone,) = llm.generate([prompt], asked, use_tqdm=False)
        assert alone.outputs[0].token_ids == expected.outputs[0].token_ids
    third = together[2].outputs[0]
    assert third.logprobs is not None
    (score,) = llm.score([prompts[2]], [list(third.token_ids)], use_tqdm=False)
    both = zip(third.logprobs, third.token_ids, strict=True)
    logprobs = [one[token].logprob for one, token in both]
    np.testing.assert_allclose(score.logprobs, logprobs, atol=1e-5)
    # Draws are calls of their own; what is plainly greedy is part of the step.
    kinds = {(one.kind, one.spec and one.spec.needed.name) for one in llm.engine.runner.gate.passed}
    assert ("decode", None) in kinds
    assert ("decode", "TRUNCATED") not in kinds
    (alone,) = llm.generate([prompts[0]], params[0], use_tqdm=False)
    assert ("decode", "GREEDY") in {
        (one.kind, one.spec and one.spec.needed.name) for one in llm.engine.runner.gate.passed
    }
