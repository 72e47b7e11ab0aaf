"""The decoder's laws, on which every caller leans."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import init_params
from folojax.models.core.dense_attend import dense_attend
from folojax.models.core.interface import Attend, Scoring
from folojax.models.core.linear import project
from folojax.models.files.checkpoint import build_module, load_params, open_checkpoint
from tests import reference

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=128,
    rope_theta=10_000.0,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
)


@functools.cache
def tiny():
    module = build_module(TINY, jnp.float32)
    return module, jax.jit(init_params, static_argnums=0)(module, jax.random.key(0))


def dense_logits(module, params, tokens, first_position=0):
    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jnp.arange(len(tokens), dtype=jnp.int32) + first_position
    return _dense_logits(module, params, tokens, positions)


@functools.partial(jax.jit, static_argnums=0)
def _dense_logits(module, params, tokens, positions):
    hidden, _ = module.apply({"params": params}, tokens, positions, None, dense_attend)
    return module.apply({"params": params}, hidden, method="logits")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_near_float32(dtype, tmp_path):
    model = reference.save_tiny("qwen3", tmp_path)
    tokens = np.random.default_rng(0).integers(0, 128, 64).tolist()
    checkpoint = open_checkpoint(tmp_path)
    params = load_params(checkpoint, dtype)
    chex.assert_tree_all_finite(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}

    ours = dense_logits(build_module(checkpoint.config, dtype), params, tokens)

    assert ours.dtype == jnp.float32
    theirs = reference.logits(model, tokens)
    error = np.sqrt(np.mean((np.asarray(ours) - theirs) ** 2)) / theirs.std()
    assert error < (0.05 if dtype == jnp.bfloat16 else 0.01)


def test_fused_parameters_are_few():
    module = build_module(TINY, jnp.float32)
    shapes = jax.eval_shape(functools.partial(init_params, module), jax.random.key(0))
    layers = [shapes.pop(f"layers_{layer}") for layer in range(TINY.num_layers)]
    assert {name: leaf.shape for name, leaf in shapes.items()} == {
        "embed": (64, 32),
        "final_norm": (32,),
        "lm_head": (64, 32),
    }
    for layer in layers:
        assert {name: leaf.shape for name, leaf in layer.items()} == {
            "attn_norm": (32,),
            "qkv": ((4 + 2 * 2) * 8, 32),
            "qkv_bias": ((4 + 2 * 2) * 8,),
            "q_norm": (8,),
            "k_norm": (8,),
            "o": (32, 4 * 8),
            "mlp_norm": (32,),
            "gate_up": (2 * 48, 32),
            "down": (32, 48),
        }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 12, 15, 16, 64, 65])
def test_a_linear_layer_is_the_same_in_either_order_of_its_product(num_tokens, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(num_tokens, 48)), dtype)
    kernel = jnp.asarray(rng.normal(size=(80, 48)), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    got = jax.jit(project)(x, kernel)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_attend_is_called_once_a_layer_and_threads_the_cache():
    module, params = tiny()
    tokens = jnp.arange(5, dtype=jnp.int32)

    def counting(cache, layer, query, key, value, scoring):
        _, out = dense_attend(None, layer, query, key, value, scoring)
        return (*cache, (layer, query.shape, key.shape, value.shape)), out

    assert isinstance(counting, Attend)
    calls = []
    jax.eval_shape(
        lambda: calls.extend(module.apply({"params": params}, tokens, tokens, (), counting)[1])
    )
    assert calls == [(layer, (5, 4, 8), (5, 2, 8), (5, 2, 8)) for layer in range(2)]


def test_later_tokens_do_not_change_earlier_ones():
    module, params = tiny()
    tokens = np.random.default_rng(0).integers(0, 64, 24)
    other = np.concatenate([tokens[:16], tokens[:8]])
    first, second = (dense_logits(module, params, row) for row in (tokens, other))
    chex.assert_trees_all_equal(first[:16], second[:16])
    assert not np.allclose(first[16:], second[16:])


def test_only_differences_of_positions_matter():
    module, params = tiny()
    near, far = (dense_logits(module, params, np.arange(12), first) for first in (0, 50))
    chex.assert_trees_all_close(near, far, atol=1e-4)


def test_padding_tokens_outside_the_vocabulary_stay_finite():
    module, params = tiny()
    chex.assert_tree_all_finite(dense_logits(module, params, [-1, 3, 64, 2**31 - 1]))


def test_a_sink_takes_its_part_of_the_weights():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((5, heads, 8), np.float32) for heads in (4, 2, 2))
    sinks = np.array([-1.0, 0.0, 1.0, 2.0], np.float32)
    scoring = Scoring(has_sinks=True, window=3)
    given = {
        "query": jnp.asarray(query),
        "key": jnp.asarray(key),
        "value": jnp.asarray(value),
        "sinks": jnp.asarray(sinks),
    }
    _, out = dense_attend(None, 0, **given, scoring=scoring)
    for token, head in np.ndindex(5, 4):
        seen = slice(max(0, token - 2), token + 1)
        masses = np.exp(key[seen, head // 2] @ query[token, head] / np.sqrt(8))
        expected = masses @ value[seen, head // 2] / (masses.sum() + np.exp(sinks[head]))
        np.testing.assert_allclose(out[token, head], expected, rtol=1e-4, atol=1e-6)
