"""Kernels for rows are, interpreted, what plain JAX computes, and stand once in a GPU's program."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.attention import paged_decode
from folojax.models.core import layers, linear, row_kernels
from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama, init_params
from folojax.models.core.dense_attend import dense_attend
from tests.random_numbers import normal

QWEN3 = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=64,
    rope_theta=1e4,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    qkv_bias=False,
    qk_norm=True,
    tie_embeddings=True,
)


def _draw(number: int, *shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return normal(number, *shape, dtype=dtype)


@pytest.fixture
def interpreted() -> Any:
    """Kernels run on a CPU, operation by operation."""
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 96), (5, 256)])
def test_a_sum_and_its_norm(rows: int, width: int, dtype: Any) -> None:
    args = _draw(0, rows, width, dtype=dtype), _draw(1, rows, width, dtype=dtype)
    weight = _draw(2, width, dtype=dtype)
    total, normed = row_kernels.add_norm(*args, weight, 1e-6)
    np.testing.assert_array_equal(total, args[0] + args[1])
    expected = layers.norm(total, weight, None, QWEN3)
    np.testing.assert_allclose(_wide(normed), _wide(expected), rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 16), (14, 2, 64), (3, 1, 32)])
def test_norm_and_rotation_of_heads(heads: int, kv_heads: int, dim: int) -> None:
    qkv = _draw(0, 3, heads + 2 * kv_heads, dim)
    weights = _draw(1, dim), _draw(2, dim)
    angles = 3 * _draw(3, 3, 1, dim // 2, dtype=jnp.float32)
    rotary = jnp.cos(angles), jnp.sin(angles)
    *given, value = row_kernels.norm_rotate(qkv, *weights, *rotary, heads, kv_heads, 1e-6)
    np.testing.assert_array_equal(_wide(value), _wide(qkv[:, heads + kv_heads :]))
    parts = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    for out, part, weight in zip(given, parts, weights, strict=True):
        expected = layers.rotate(layers.norm(part, weight, None, QWEN3), *rotary)
        np.testing.assert_allclose(_wide(out), _wide(expected), rtol=0.01, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (3, 64)])
def test_a_gate(rows: int, width: int) -> None:
    both = 3 * _draw(0, rows, 2 * width)
    with mock.patch.object(row_kernels, "_MOST_GATED", 32):
        found = row_kernels.gated_silu(both)
    expected = linear.gated(both.astype(jnp.float32))
    np.testing.assert_allclose(_wide(found), _wide(expected), rtol=0.01, atol=1e-6)


def test_gradients_are_those_of_the_plain_way() -> None:
    args = _draw(0, 2, 16), _draw(1, 2, 16), _draw(2, 16)

    def loss(stream: Any, update: Any, weight: Any) -> Any:
        total, normed = layers.add_and_norm(stream, update, weight, None, QWEN3)
        return _wide_sum(total) + _wide_sum(normed)

    def plain(stream: Any, update: Any, weight: Any) -> Any:
        total = stream + update
        return _wide_sum(total) + _wide_sum(layers.norm(total, weight, None, QWEN3))

    given, expected = (jax.grad(f, argnums=(0, 1, 2))(*args) for f in (loss, plain))
    for one, other in zip(given, expected, strict=True):
        np.testing.assert_allclose(_wide(one), _wide(other), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("platform", "dtype", "num_kernels"),
    [("cuda", jnp.bfloat16, 4), ("cuda", jnp.float32, 0), ("cpu", jnp.bfloat16, 0)],
)
def test_programs_hold_a_kernel_once_for_all_layers(  # and that of the final norm
    platform: str, dtype: Any, num_kernels: int
) -> None:
    model = Llama(QWEN3, dtype)
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    token = jax.ShapeDtypeStruct((4,), jnp.int32)

    def run(params: Any, token: Any) -> Any:
        return model.apply({"params": params}, token, token, None, dense_attend)

    lowered = jax.jit(run).trace(params, token).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == num_kernels


def test_without_triton_nothing_is_a_kernel() -> None:
    assert row_kernels.is_taken(jnp.bfloat16, 128)
    assert paged_decode.is_taken(128, 4, 64, 9.0)
    with mock.patch.object(row_kernels, "triton", None):
        assert not row_kernels.is_taken(jnp.bfloat16, 128)
    with mock.patch.object(paged_decode, "triton", None):
        assert not paged_decode.is_taken(128, 4, 64, 9.0)


def _wide_sum(x: Any) -> Any:
    return x.astype(jnp.float32).sum()


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))
