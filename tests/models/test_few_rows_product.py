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
from folojax.models.machine import compiler
from folojax.models.quantized import few_rows_product
from folojax.models.quantized.tiled_kernels import pack_tiles, project_tiles, widened
from tests.random_numbers import normal


def _kernel(group: int, outputs: int, inputs: int) -> Any:
    rng = np.random.default_rng(group)
    codes = rng.integers(0, 16, (outputs, inputs), np.uint8)
    scale, offset = (
        jnp.asarray(rng.normal(0, 0.05, (outputs, inputs // group)), jnp.bfloat16) for _ in "so"
    )
    return pack_tiles(codes, scale, offset)


def _lowered(rows: int) -> str:
    """A program for CUDA, which is not compiled here."""
    kernel = _kernel(32, 64, 256)
    x = jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16)
    jax.clear_caches()  # programs of either way are traced here
    traced = jax.jit(lambda x: project_tiles(x, kernel, jnp.bfloat16)).trace(x)
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
    kernel = _kernel(group, outputs, inputs)
    x = (normal(rows, rows, inputs) + 0.2).astype(jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(widened(kernel), np.float64).T
    for dtype, error in ((jnp.float32, 3e-3), (jnp.bfloat16, 4e-2), (jnp.float16, 6e-3)):
        product = jax.jit(lambda x, dtype=dtype: project_tiles(x, kernel, dtype))
        found = product(x)
        assert found.dtype == dtype
        size = np.abs(expected).mean()  # the largest are some four times it
        assert np.abs(np.asarray(found, np.float64) - expected).max() < error * size
        np.testing.assert_array_equal(found, product(x))
