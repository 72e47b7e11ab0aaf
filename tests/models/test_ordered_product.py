"""Products whose sums have an order of their own, interpreted, against NumPy and bit by bit."""

import functools
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.models.core import ordered_product
from folojax.models.core.linear import project
from tests.random_numbers import normal


@pytest.fixture(autouse=True)
def interpreted() -> Any:
    """Kernels run on a CPU, operation by operation."""
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        yield


def draw(rows: int, outputs: int, inputs: int) -> Any:
    shapes = (rows, inputs), (outputs, inputs)
    return tuple(normal(rows + i, *one, dtype=jnp.bfloat16) for i, one in enumerate(shapes))


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    # Two segments for few rows and for several tiles of them; one, with a rest that is no block.
    [(5, 70, 512), (130, 64, 512), pytest.param(300, 140, 200, marks=pytest.mark.slow)],
)
def test_it_is_the_product(rows: int, outputs: int, inputs: int) -> None:
    x, kernel = draw(rows, outputs, inputs)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    found = ordered_product.product(x, kernel, jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)
    rounded = ordered_product.product(x, kernel, jnp.bfloat16)
    np.testing.assert_array_equal(rounded, found.astype(jnp.bfloat16))


def test_segments_are_added_in_one_order_in_one_program_or_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, kernel = draw(20, 64, 1024)
    assert ordered_product.num_segments(64, 1024) == 4
    several = ordered_product.product(x, kernel, jnp.float32)
    monkeypatch.setattr(ordered_product, "_ENOUGH", 0)
    np.testing.assert_array_equal(ordered_product.product(x, kernel, jnp.float32), several)
    # And it is not the order of one segment.
    monkeypatch.setattr(ordered_product, "_MOST_SEGMENTS", 1)
    assert (ordered_product.product(x, kernel, jnp.float32) != several).any()


@pytest.mark.parametrize(
    ("outputs", "inputs", "count"),
    [
        (4096, 4096, 2),
        (24576, 4096, 1),
        (4096, 12288, 2),
        (1024, 2048, 8),
        (1024, 3072, 8),
        (64, 255, 1),  # four blocks are the least
        (64, 576, 1),  # nine cannot be halved
    ],
)
def test_segments_depend_on_the_kernel_alone(outputs: int, inputs: int, count: int) -> None:
    assert ordered_product.num_segments(outputs, inputs) == count


def test_on_a_cpu_it_is_the_product_of_default_mode() -> None:
    x, kernel = draw(20, 64, 128)
    for is_rounded in (False, True):
        plain, ordered = (project(x, kernel, is_rounded, is_it) for is_it in (False, True))
        np.testing.assert_array_equal(plain, ordered)
