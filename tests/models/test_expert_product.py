"""The product by expert, interpreted, against XLA's own."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.models.core.expert_product import by_expert, multiply_tiles


@pytest.mark.parametrize(
    ("sizes", "width_in", "width_out"),
    [
        ([5, 0, 1, 20, 0, 16], 144, 200),  # runs of nothing, of one row, of whole tiles and more
        ([0, 0, 0, 0, 0, 3], 128, 64),
        pytest.param([150, 0, 130, 1, 0, 1], 128, 128, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_a_product_of_each_run(sizes: list[int], width_in: int, width_out: int) -> None:
    keys = jax.random.split(jax.random.key(0))
    rows = jax.random.normal(keys[0], (sum(sizes), width_in), jnp.bfloat16)
    kernels = jax.random.normal(keys[1], (len(sizes), width_in, width_out), jnp.bfloat16)
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        found = jax.jit(multiply_tiles)(rows, kernels, jnp.asarray(sizes))
    expert = np.repeat(np.arange(len(sizes)), sizes)
    wide: Any = [np.asarray(one, np.float32) for one in (rows, kernels)]
    expected = np.einsum("mi,mio->mo", wide[0], wide[1][expert])
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_derivatives_are_those_of_the_plain_product() -> None:
    rows, kernels = jnp.ones((4, 64), jnp.bfloat16), jnp.ones((2, 64, 8), jnp.bfloat16)
    gradient = jax.grad(lambda kernels: by_expert(rows, kernels, jnp.array([3, 1])).sum())(kernels)
    np.testing.assert_array_equal(gradient[:, 0, 0].astype(jnp.float32), [3, 1])
