"""Few rows times four bits in CUDA C++: what decides for it, and, on a card, what it computes."""

import ctypes
import logging
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.backend import choose_backend
from folojax.models.core.linear import gated, project_gated
from folojax.models.machine import compiler
from folojax.models.quantized import few_rows_product
from folojax.models.quantized.quantize import project_quantized
from folojax.models.quantized.tiled_kernels import project_tiles, widened
from tests.random_numbers import normal
from tests.random_tiles import random_tiles


def _project(x: Any, kernel: Any) -> Any:
    return project_tiles(x, kernel, jnp.bfloat16)


def _gate(x: Any, kernel: Any, is_ordered: bool = False) -> Any:
    return project_gated(x, kernel, "silu", x.dtype, is_ordered)


def _lowered(rows: int, function: Any = _project, dtype: Any = jnp.bfloat16) -> str:
    """A program for CUDA, which is not compiled here."""
    kernel = random_tiles(32, 64, 256)
    x = jax.ShapeDtypeStruct((rows, 256), dtype)
    jax.clear_caches()  # programs of either way are traced here
    traced = jax.jit(lambda x: function(x, kernel)).trace(x)
    return str(traced.lower(lowering_platforms=("cuda",)).as_text())


def test_the_source_compiles_without_a_card() -> None:
    library = compiler.load(few_rows_product._SOURCE)
    assert library.most_rows() == few_rows_product.MOST_ROWS
    why = ctypes.create_string_buffer(256)
    assert library.open_product(b"libnone.so", b"", why, len(why)) == 1
    assert b"cannot be loaded" in why.value


def test_without_the_driver_triton_multiplies(caplog: pytest.LogCaptureFixture) -> None:
    few_rows_product.has_product.cache_clear()
    with (
        mock.patch.object(few_rows_product.cuda, "DRIVER", "libnone.so"),
        caplog.at_level(logging.WARNING),
    ):
        assert not few_rows_product.has_product()
        assert "there is no NVIDIA driver (libnone.so)" in caplog.text
        assert "multiply_tiles" in _lowered(1)
    few_rows_product.has_product.cache_clear()


def test_few_rows_are_its_own_and_more_are_not() -> None:
    with mock.patch.object(few_rows_product, "has_product", return_value=True):
        assert "few_rows_product" in _lowered(1)
        assert "few_rows_product" in _lowered(8)
        assert "multiply_tiles" in _lowered(9)


def test_it_gates_few_rows_of_bfloat16() -> None:
    with mock.patch.object(few_rows_product, "has_product", return_value=True):
        assert "is_gated = false" in _lowered(1)
        for rows in (1, 8):
            text = _lowered(rows, _gate)
            assert "is_gated = true" in text
            assert "gated_silu" not in text
        for text in (
            _lowered(9, _gate),
            _lowered(8, _gate, jnp.float16),
            _lowered(8, lambda x, kernel: _gate(x, kernel, is_ordered=True)),
        ):
            assert "is_gated = true" not in text
            assert "gated_silu" in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_tiles_that_gate_are_the_gate_of_the_product(dtype: Any) -> None:
    kernel, x = random_tiles(32, 192, 256), normal(0, 3, 256).astype(dtype)
    found = project_quantized(x, kernel, dtype, is_gated=True)
    assert found.dtype == dtype
    expected = gated(project_quantized(x, kernel, dtype), dtype=dtype)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(TypeError, match="cannot be differentiated through"):
        jax.grad(lambda x: project_quantized(x, kernel, dtype, is_gated=True).sum())(x)


@pytest.fixture
def on_card() -> None:
    """Skips where there is no card, or no way to compile for it."""
    if choose_backend().name != "gpu" or not few_rows_product.has_product():
        pytest.skip("runs on an NVIDIA GPU")


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize(
    ("group", "outputs", "inputs"),
    [
        (32, 64, 128),
        (32, 6144, 1024),
        (32, 24576, 384),
        (64, 192, 640),
        (128, 4096, 1024),
        (384, 64, 768),
        (2048, 320, 2048),
    ],
)
def test_the_kernel_is_the_product_with_what_codes_mean(
    rows: int, group: int, outputs: int, inputs: int
) -> None:
    kernel = random_tiles(group, outputs, inputs)
    x = (normal(rows, rows, inputs) + 0.2).astype(jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(widened(kernel), np.float64).T
    for dtype, error in ((jnp.float32, 3e-3), (jnp.bfloat16, 4e-2), (jnp.float16, 6e-3)):
        product = jax.jit(lambda x, dtype=dtype: project_tiles(x, kernel, dtype))
        found = product(x)
        assert found.dtype == dtype
        size = np.abs(expected).mean()  # the largest are some four times it
        assert np.abs(np.asarray(found, np.float64) - expected).max() < error * size
        np.testing.assert_array_equal(found, product(x))


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize(
    ("group", "outputs", "inputs"),
    [
        # Blocks of an H200 have 16 gates of the first two, then 32, 48, 64 and of the last two 96;
        # of the fourth, fifth and seventh the last block has less of its own.
        (32, 64, 128),
        (64, 320, 2048),
        (32, 6144, 1024),
        (2048, 12352, 2048),
        (128, 16064, 640),
        (32, 24576, 384),
        (384, 18752, 768),
    ],
)
def test_what_the_kernel_gates_is_the_gate_of_its_product(
    rows: int, group: int, outputs: int, inputs: int
) -> None:
    kernel = random_tiles(group, outputs, inputs)
    x = (normal(rows, rows, inputs) + 0.2).astype(jnp.bfloat16)
    gate = jax.jit(_gate)
    found = gate(x, kernel)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, gate(x, kernel))
    exact = np.asarray(x, np.float64) @ np.asarray(widened(kernel), np.float64).T
    for both, most in ((exact, 0.25), (_project(x, kernel), 0.02)):
        # Other sums, or those of another order, are at times rounded to a neighbour.
        wanted = gated(jnp.asarray(both, jnp.bfloat16), dtype=jnp.bfloat16)
        assert (found != wanted).mean() < most
        one, other = (np.asarray(each, np.float64) for each in (found, wanted))
        np.testing.assert_allclose(one, other, rtol=0.03, atol=0.02 * np.abs(other).mean())
