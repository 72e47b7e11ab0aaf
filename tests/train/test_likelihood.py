"""Log-likelihood and its gradients, against PyTorch's on the same weights."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folojax import LLM, init_lora, log_likelihood, merge_lora
from tests import dense
from tests.families import save_family
from tests.reference import TINY_LIMITS, load_model, save_tiny

LENGTHS = (9, 5, 12)
SHAPE = (len(LENGTHS), 12)


def make_batch() -> tuple[np.ndarray, np.ndarray]:
    """Right-padded sequences, and a mask of their last tokens: the prompts have three."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 128, SHAPE)
    column, length = np.arange(SHAPE[1])[None, :], np.array(LENGTHS)[:, None]
    return tokens, (column >= 3) & (column < length)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """One of our modules, its parameters, and the same model of transformers."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, directory, tie_word_embeddings=request.param == "llama")
    return *dense.load(directory), load_model(directory)


def reference_logprobs(torch_model: Any, temperature: float = 1.0) -> Any:
    import torch

    tokens, mask = make_batch()
    ids = torch.tensor(tokens)
    logprobs = torch.log_softmax(torch_model(ids).logits / temperature, -1)
    picked = logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return picked * torch.tensor(mask[:, 1:])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_are_those_of_transformers(pair: tuple, temperature: float) -> None:
    module, params, torch_model = pair
    tokens, mask = make_batch()
    found = dense.likelihood(params, tokens, mask, model=module, temperature=temperature)
    expected = reference_logprobs(torch_model, temperature).detach().numpy()
    np.testing.assert_allclose(found[:, 1:], expected, atol=2e-5)
    assert not found[:, 0].any()


def test_gradients_are_those_of_torch(pair: tuple) -> None:
    """Of a loss with another weight on every token, by the arrays that both sides have alike."""
    import torch

    module, params, torch_model = pair
    tokens, mask = make_batch()
    weight = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)

    @jax.jit
    def loss(params: Any) -> jax.Array:
        found = log_likelihood(params, jnp.array(tokens), jnp.array(mask), model=module)
        return (found * weight).sum()

    grads = jax.grad(loss)(params)
    torch_model.zero_grad()
    (reference_logprobs(torch_model) * torch.tensor(weight[:, 1:])).sum().backward()
    layer, ours = torch_model.model.layers[1], grads["layers_1"]
    names = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    expected = {
        "embed": torch_model.model.embed_tokens.weight.grad,
        "final_norm": torch_model.model.norm.weight.grad,
        "qkv": torch.cat([name.weight.grad for name in names]),
        "down": layer.mlp.down_proj.weight.grad,
        "attn_norm": layer.input_layernorm.weight.grad,
    }
    for name, grad in expected.items():
        found = grads[name] if name in grads else ours[name]
        scale = float(grad.abs().max())
        assert scale > 1e-3, f"{name} has no gradient to compare"
        np.testing.assert_allclose(found, grad.numpy(), atol=2e-5 * max(scale, 1), err_msg=name)


def test_experts_have_the_values_and_gradients_of_torch(tmp_path: Path) -> None:
    torch_model = save_family("mixtral", tmp_path)
    module, params = dense.load(tmp_path)
    tokens, mask = map(jnp.array, make_batch())

    def total(params: Any) -> tuple[jax.Array, jax.Array]:
        found = log_likelihood(params, tokens, mask, model=module)
        return found.sum(), found

    (_, found), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    expected = reference_logprobs(torch_model)
    np.testing.assert_allclose(found[:, 1:], expected.detach().numpy(), atol=2e-5)
    torch_model.zero_grad()
    expected.sum().backward()
    grad = torch_model.model.layers[1].mlp.experts.down_proj.grad
    assert float(grad.abs().max()) > 1e-3
    ours = grads["layers_1"]["experts_down"].transpose(0, 2, 1)
    np.testing.assert_allclose(ours, grad.numpy(), atol=5e-5)


def test_padding_and_what_is_not_masked_change_nothing(tiny_model: tuple) -> None:
    module, params = tiny_model
    tokens, mask = make_batch()
    behind = np.arange(SHAPE[1])[None, :] >= np.array(LENGTHS)[:, None]
    other = np.where(behind, 7, tokens)
    assert (other != tokens).any()

    def scores(tokens: np.ndarray) -> jax.Array:
        return dense.likelihood(params, tokens, mask, model=module)

    np.testing.assert_array_equal(scores(tokens), scores(other))
    assert (np.asarray(scores(tokens)) != 0).sum() == mask.sum()


def test_vmap_and_leading_axes_are_the_same(tiny_model: tuple) -> None:
    module, params = tiny_model
    tokens, mask = map(jnp.array, make_batch())

    def score(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return dense.likelihood(params, tokens, mask, model=module)

    whole = score(tokens, mask)
    np.testing.assert_allclose(jax.vmap(score)(tokens, mask), whole, atol=1e-5)
    np.testing.assert_allclose(score(tokens[0], mask[0]), whole[0], atol=1e-5)
    grouped = score(tokens[:, None], mask[:, None])
    np.testing.assert_allclose(grouped[:, 0], whole, atol=1e-5)


def test_the_engine_scores_alike(tiny_model: tuple) -> None:
    """What a trainer computes is what `LLM.score` reports, to rounding."""
    module, params = tiny_model
    llm = LLM(tiny_model, **TINY_LIMITS)
    tokens, mask = make_batch()
    (output,) = llm.score([tokens[2, :3].tolist()], [tokens[2, 3:].tolist()], use_tqdm=False)
    found = dense.likelihood(params, tokens, mask, model=module)[2, 3:]
    np.testing.assert_allclose(found, output.logprobs, atol=2e-5)


def test_a_step_of_training_lowers_the_loss(tiny_model: tuple) -> None:
    module, params = tiny_model
    tokens, mask = map(jnp.array, make_batch())
    optimizer = optax.adam(1e-3)

    @jax.jit
    def train(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return -log_likelihood(params, tokens, mask, model=module).sum() / mask.sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(5):
        params, state, value = train(params, state)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


def test_an_adapter_beside_the_parameters_is_as_one_that_is_merged(pair: tuple) -> None:
    module, params, _ = pair
    tokens, mask = map(jnp.asarray, make_batch())
    rng = np.random.default_rng(1)
    fresh = init_lora(jax.random.key(0), params, 3)
    lora = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), fresh)

    def beside(lora: Any) -> Any:
        options: dict[str, Any] = {"model": module, "lora": lora, "lora_scale": 0.5}
        return log_likelihood(params, tokens, mask, **options).sum()

    def merged(lora: Any) -> Any:
        return log_likelihood(merge_lora(params, lora, 0.5), tokens, mask, model=module).sum()

    found, expected = (jax.jit(jax.value_and_grad(one))(lora) for one in (beside, merged))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4 * np.abs(other).max())
    with pytest.raises(ValueError, match="layers_9 is no layer of the model"):
        log_likelihood(params, tokens, mask, model=module, lora={"layers_9": {}})
