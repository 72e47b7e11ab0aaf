"""Products of a few rows in loops over the other operand, against NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.machine.row_sums import MOST_AT_ONCE, REORDERED, sum_products

run = functools.partial(jax.jit, compiler_options=REORDERED)(sum_products)


@pytest.mark.parametrize("num_rows", [1, 2, 7, MOST_AT_ONCE, MOST_AT_ONCE + 1, 24])
def test_of_floats_they_are_products_of_matrices(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    rows = rng.normal(size=(5, num_rows, 40)).astype(np.float32)
    array = rng.normal(size=(5, 30, 40)).astype(np.float32)
    expected = rows.astype(np.float64) @ array.astype(np.float64).swapaxes(1, 2)
    for function in (run, sum_products):
        got = function(jnp.asarray(rows), jnp.asarray(array))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 3, 2 * MOST_AT_ONCE])
def test_of_integers_they_are_exact(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    rows = rng.integers(-127, 128, (num_rows, 5_000)).astype(np.int32)
    rows[0] = 127
    array = rng.integers(-127, 128, (9, 5_000)).astype(np.int8)
    array[0] = -127
    np.testing.assert_array_equal(run(rows, array), rows @ array.astype(np.int32).T)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_number_that_is_none_stays_where_it_is(num_rows: int) -> None:
    rows = np.ones((2, num_rows, 8), np.float32)
    array = np.ones((2, 4, 8), np.float32)
    array[1, 2, 3], array[0, 1, 5] = np.nan, np.inf
    got = np.asarray(run(rows, array))
    expected = np.full((2, num_rows, 4), 8.0)
    expected[1, :, 2], expected[0, :, 1] = np.nan, np.inf
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_nothing_of_the_size_of_the_array_is_stored(num_rows: int, dtype: Any) -> None:
    array = jax.ShapeDtypeStruct((512, 1024), dtype)
    rows = jax.ShapeDtypeStruct((num_rows, 1024), np.int32 if dtype == np.int8 else np.float32)
    memory: Any = run.lower(rows, array).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 512 * 1024 / 8


def test_a_loop_over_steps_converts_nothing_beforehand() -> None:
    def steps(rows: jax.Array, array: jax.Array) -> jax.Array:
        def step(rows: jax.Array, _: None) -> tuple[jax.Array, None]:
            return sum_products(rows, array) >> 8, None

        return jax.lax.scan(step, rows, None, length=4)[0]

    size = 256
    rows = jax.ShapeDtypeStruct((2, size), np.int32)
    array = jax.ShapeDtypeStruct((size, size), np.int8)
    memory: Any = jax.jit(steps).lower(rows, array).compile().memory_analysis()
    assert memory.temp_size_in_bytes < size * size
