"""Which experts tokens were sent to: recorded in rollouts, and forced on a trainer's pass."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams, log_likelihood, outputs_to_arrays
from tests import dense
from tests.conftest import check_is_empty
from tests.families import save_family
from tests.reference import TINY_LIMITS

CASES = {"mixtral": True, "qwen3-moe": True}
"""Families, and whether the weights of a token's experts sum to 1."""

REPLAYED: list[Any] = [
    {},
    pytest.param({"deterministic": True}, marks=pytest.mark.slow),
    pytest.param({"num_pages": 9, "max_num_batched_tokens": 24}, marks=pytest.mark.slow),
]

PROMPTS = [list(range(5, 45)), [70, 3, 9]]
PARAMS = SamplingParams(
    temperature=0, max_tokens=8, ignore_eos=True, routed_experts=True, record=True
)


def force(torch_model: Any, routing: np.ndarray, is_normed: bool) -> None:
    """Has the routers of transformers choose these experts, [N, L, M], by their own weights."""
    import torch

    for layer, block in enumerate(torch_model.model.layers):
        gate, expert = block.mlp.gate, torch.tensor(routing[:, layer], dtype=torch.long)

        def forward(hidden: Any, gate: Any = gate, expert: Any = expert) -> Any:
            scores = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
            weight = torch.softmax(scores.float(), -1).gather(-1, expert)
            weight = weight / weight.sum(-1, keepdim=True) if is_normed else weight
            return scores, weight, expert

        gate.forward = forward


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    directory: Path = tmp_path_factory.mktemp(request.param)
    torch_model = save_family(request.param, directory)
    return *dense.load(directory), torch_model, CASES[request.param]


def test_gradients_with_forced_routing_are_those_of_torch(case: tuple) -> None:
    import torch

    module, params, torch_model, is_normed = case
    rng = np.random.default_rng(0)
    count, num = module.config.num_experts, module.config.num_experts_per_token
    tokens = rng.integers(3, 128, (1, 11))
    chosen = [rng.permutation(count)[:num] for _ in range(11 * module.config.num_layers)]
    routing = np.array(chosen, np.int32).reshape(1, 11, -1, num)
    given = jnp.asarray(tokens), jnp.ones((1, 11), bool)

    def loss(params: Any) -> Any:
        options: dict[str, Any] = {"model": module, "routed_experts": jnp.asarray(routing)}
        found = log_likelihood(params, *given, **options)
        return found.sum(), found

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    force(torch_model, routing[0], is_normed)
    logprobs = torch.log_softmax(torch_model(torch.tensor(tokens)).logits, -1)
    expected = logprobs[0, :-1].gather(-1, torch.tensor(tokens)[0, 1:, None])[:, 0]
    np.testing.assert_allclose(found[0, 1:], expected.detach().numpy(), atol=5e-5)
    torch_model.zero_grad()
    expected.sum().backward()
    for layer, block in enumerate(torch_model.model.layers):
        ours = grads[f"layers_{layer}"]
        theirs = {
            "router": block.mlp.gate.weight.grad,
            "experts_gate_up": block.mlp.experts.gate_up_proj.grad.transpose(1, 2),
            "experts_down": block.mlp.experts.down_proj.grad.transpose(1, 2),
            "o": block.self_attn.o_proj.weight.grad,
        }
        for name, grad in theirs.items():
            scale = float(grad.abs().max())
            assert scale > 1e-3, f"{name} has no gradient to compare"
            np.testing.assert_allclose(
                ours[name], grad.numpy(), atol=1e-4 * max(scale, 1), err_msg=name
            )


def test_a_rollout_tells_its_experts_and_a_trainer_takes_them(case: tuple) -> None:
    module, params, *_ = case
    llm = LLM((module, params), **TINY_LIMITS)
    outputs = llm.generate(PROMPTS, PARAMS, False)
    plain = llm.generate(
        PROMPTS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), False
    )
    assert [one.outputs[0].routed_experts for one in plain] == [None, None]
    arrays = outputs_to_arrays(outputs)
    assert arrays.routed_experts is not None
    sizes = module.config.num_layers, module.config.num_experts_per_token
    for row, output in enumerate(outputs):
        one, length = output.outputs[0], len(PROMPTS[row]) + 8
        assert one.token_ids == plain[row].outputs[0].token_ids
        assert one.routed_experts is not None
        assert one.routed_experts.shape == (length - 1, *sizes)
        assert (arrays.routed_experts[row, length - 1 :] == -1).all()
    given = jnp.asarray(arrays.tokens), jnp.asarray(arrays.mask)
    free, forced, other = (
        log_likelihood(params, *given, model=module, routed_experts=routing)
        for routing in (
            None,
            jnp.asarray(arrays.routed_experts),
            jnp.asarray((arrays.routed_experts + 1) % module.config.num_experts),
        )
    )
    # The router chooses the same, so nothing changes; others would have changed it.
    np.testing.assert_allclose(forced, free, atol=1e-5)
    assert arrays.record is not None
    np.testing.assert_allclose(forced, arrays.record.raw, atol=1e-4)
    assert np.abs(other - free).max() > 1e-2


@pytest.mark.parametrize("options", REPLAYED, ids=str)
def test_scores_with_forced_experts_are_those_of_a_trainer(case: tuple, options: Any) -> None:
    """In chunks, beside rows that choose by themselves, and of a rollout: as these were sampled."""
    module, params, *_ = case
    llm = LLM((module, params), **TINY_LIMITS | options, check_integrity=True)
    outputs = llm.generate(PROMPTS, PARAMS, False)
    arrays = outputs_to_arrays(outputs)
    tokens = [one.outputs[0].token_ids for one in outputs]
    taken = [one.outputs[0].routed_experts for one in outputs]
    others = [(one + 1) % module.config.num_experts for one in taken if one is not None]
    free = llm.score(PROMPTS, tokens, False)
    replayed = llm.score(PROMPTS, tokens, False, routed_experts=taken)
    mixed = llm.score(PROMPTS, tokens, False, routed_experts=[others[0], None])
    for one, other, output in zip(free, replayed, outputs, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        raw = [entry.raw for entry in output.outputs[0].record or []]
        np.testing.assert_allclose(other.logprobs, raw, atol=1e-4)
        if options.get("deterministic"):
            assert one.logprobs == other.logprobs == raw
    routing = np.full_like(arrays.routed_experts, -1)
    routing[0, : len(others[0])] = others[0]
    given = jnp.asarray(arrays.tokens), jnp.asarray(arrays.mask)
    wanted = log_likelihood(params, *given, model=module, routed_experts=jnp.asarray(routing))
    for row, (score, one) in enumerate(zip(mixed, free, strict=True)):
        start = len(PROMPTS[row])
        np.testing.assert_allclose(score.logprobs, wanted[row, start : start + 8], atol=1e-4)
        assert (np.abs(np.subtract(score.logprobs, one.logprobs)).max() > 1e-2) == (row == 0)
    # What was computed by other experts is nobody else's.
    assert [one.logprobs for one in llm.score(PROMPTS, tokens, False)] == [
        one.logprobs for one in free
    ]
    check_is_empty(llm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"max_decode_steps": 4}, {"deterministic": True}, {"num_pages": 9}], ids=str
)
def test_the_record_is_the_same_in_every_kind_of_engine(case: tuple, options: Any) -> None:
    module, params, *_ = case
    prompts = [*PROMPTS, *PROMPTS]
    expected, found = (
        LLM((module, params), **TINY_LIMITS | more).generate(prompts, PARAMS, False)
        for more in [dict[str, Any](), options]
    )
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(
            one.outputs[0].routed_experts, other.outputs[0].routed_experts
        )


def test_what_is_refused(case: tuple, tiny_model: tuple) -> None:
    module, params, *_ = case
    dense_module, dense_params = tiny_model
    tokens, mask = jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    routing = jnp.zeros((1, 4, 2, 2), jnp.int32)
    with pytest.raises(
        ValueError, match=r"routed_experts is \[1, 4, 1, 2\]; it must be \[1, 4, 2, 2\]"
    ):
        log_likelihood(params, tokens, mask, model=module, routed_experts=routing[:, :, :1])
    with pytest.raises(ValueError, match="must be left out: the model has no experts"):
        log_likelihood(dense_params, tokens, mask, model=dense_module, routed_experts=routing)
    llm = LLM(tiny_model, **TINY_LIMITS)
    with pytest.raises(ValueError, match="the model has no experts: leave it out"):
        llm.generate([[5, 6]], SamplingParams(routed_experts=True), False)
    chosen = np.zeros((4, 2, 2), np.int32)
    with pytest.raises(ValueError, match="the model has no experts: leave it out"):
        llm.score([5, 6, 7], [[8, 9]], False, routed_experts=[chosen])
    llm = LLM((module, params), **TINY_LIMITS)
    cases: list[tuple[Any, str]] = [
        (chosen, "has 4 entries for 1 continuations"),
        ([chosen[:3]], r"is \[3, 2, 2\]; it must be \[4, 2, 2\], of all tokens but the last"),
        ([chosen + 99], "routed_experts holds 99; the model has experts 0 to"),
        ([chosen / 2], "holds float64; it must be an array of integers"),
    ]
    for given, told in cases:
        with pytest.raises(ValueError, match=told):
            llm.score([5, 6, 7], [[8, 9]], False, routed_experts=given)
    strict = LLM((module, params), **TINY_LIMITS, strict=True)
    with pytest.raises(ValueError, match="which no compile plan lists"):
        strict.score([5, 6, 7], [[8, 9]], False, routed_experts=[chosen])
