"""Kernels in eight bits, against NumPy's integers and against transformers with rounded layers."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.quantized.int8_kernels import project_int8, quantize_int8, take_int8
from tests.rounded_layers import CASES, check_case


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
    found = quantize_int8(jnp.asarray(kernel))
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
    found = jax.jit(project_int8)(jnp.asarray(x), quantize_int8(jnp.asarray(kernel)))
    np.testing.assert_array_equal(found, multiply(x, kernel))


def test_a_row_is_the_same_whatever_the_rows_beside_it() -> None:
    x, kernel = jnp.asarray(normal(64, 96)), quantize_int8(jnp.asarray(normal(72, 96, seed=1)))
    whole = np.asarray(jax.jit(project_int8)(x, kernel))
    for size in (1, 2, 7, 8, 16, 32):
        np.testing.assert_array_equal(jax.jit(project_int8)(x[:size], kernel), whole[:size])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(value: float) -> None:
    x = normal(3, 16)
    x[1, 4] = value
    kernel = quantize_int8(jnp.asarray(normal(8, 16, seed=1)))
    found = np.asarray(jax.jit(project_int8)(jnp.asarray(x), kernel))
    assert np.isfinite(found).all(axis=1).tolist() == [True, False, True]
    assert not np.isfinite(found[1]).any()


def test_rows_of_an_embedding() -> None:
    table = normal(20, 8)
    values, scale = round_rows(table)
    found = take_int8(quantize_int8(jnp.asarray(table)), jnp.asarray([4, 0, 99]))
    np.testing.assert_array_equal(found, (values * scale).astype(np.float32)[[4, 0, 19]])


@pytest.mark.parametrize("case", CASES)
def test_families_against_transformers_with_rounded_layers(tmp_path: Path, case: str) -> None:
    def table(rows: np.ndarray) -> np.ndarray:
        values, scale = round_rows(rows)
        return (values * scale).astype(np.float32)

    check_case(tmp_path, case, "int8", lambda _, x, kernel: multiply(x, kernel), table, share=0.99)
