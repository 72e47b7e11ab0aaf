"""A linear layer has a way for each platform, and a program holds the one that it is for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.core.linear import project

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)


def rows(count: int, dtype: Any = jnp.float32) -> Any:
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, 8)), dtype)


@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize(("platform", "num_barriers"), [("cpu", 1), ("cuda", 0)])
def test_a_lowered_program_holds_one_way(
    platform: str, num_barriers: int, is_rounded: bool
) -> None:
    """Ten rows are turned on CPU only."""
    traced = jax.jit(project, static_argnums=2).trace(rows(10), KERNEL, is_rounded)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == 1
    assert text.count("stablehlo.optimization_barrier") == num_barriers


def test_a_compiled_program_has_no_branch() -> None:
    text = jax.jit(project).lower(rows(10), KERNEL).compile().as_text()
    assert text is not None
    assert "conditional" not in text


@pytest.mark.parametrize("count", [1, 2, 10, 64, 65])
def test_ways_agree(count: int) -> None:
    np.testing.assert_allclose(project(rows(count), KERNEL), rows(count) @ KERNEL.T, atol=1e-5)


@pytest.mark.parametrize(("is_rounded", "dtype"), [(False, jnp.float32), (True, jnp.bfloat16)])
def test_the_dtype_is_what_is_asked_for(is_rounded: bool, dtype: Any) -> None:
    for count in (1, 10, 65):
        found = project(rows(count, jnp.bfloat16), KERNEL.astype(jnp.bfloat16), is_rounded)
        assert found.dtype == dtype


def test_it_has_derivatives_and_is_mapped() -> None:
    def loss(x: Any, kernel: Any) -> Any:
        return (project(x, kernel) ** 2).sum()

    x, kernel = rows(10), KERNEL
    for argument in (0, 1):
        found = jax.jit(jax.grad(loss, argument))(x, kernel)
        expected = jax.grad(lambda x, kernel: ((x @ kernel.T) ** 2).sum(), argument)(x, kernel)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    many = jnp.stack([x, 2 * x, -x])
    found = jax.jit(jax.vmap(project, (0, None)))(many, kernel)
    np.testing.assert_allclose(found, many @ kernel.T, atol=1e-4)
