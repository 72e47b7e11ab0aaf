"""Kernels in groups, against NumPy and against transformers with rounded layers."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.files.checkpoint import load_params, open_checkpoint
from folojax.models.machine import compiler as native
from folojax.models.quantized import group_kernels
from folojax.models.quantized.group_kernels import (
    GROUP,
    GroupKernel,
    fits_groups,
    multiply_by_xla,
    project_groups,
    quantize_groups,
    take_groups,
)
from folojax.models.quantized.int8_kernels import Int8Kernel
from folojax.models.quantized.quantize import quantize
from tests.rounded_layers import CASES, check_case

pytestmark = pytest.mark.usefixtures("optimised")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def round_weights(kernel: np.ndarray, bits: int) -> np.ndarray:
    """What a kernel becomes, as floats."""
    weights = kernel.astype(np.float32).reshape(kernel.shape[0], -1, GROUP)
    if bits == 4:
        least, most = weights.min(-1, keepdims=True), weights.max(-1, keepdims=True)
        scale = ((most - least) * np.float32(1 / 15)).astype(np.float16)
        offset = least.astype(np.float16)
    else:
        largest = np.abs(weights).max(-1, keepdims=True)
        scale = (largest * np.float32(1 / 127)).astype(np.float16)
        offset = -128 * scale
    scale, offset = scale.astype(np.float32), offset.astype(np.float32)
    codes = np.rint((weights - offset) / np.where(scale == 0, 1, scale))
    return (codes.clip(0, 2**bits - 1) * scale + offset).reshape(kernel.shape)


def round_inputs(x: np.ndarray) -> np.ndarray:
    """What inputs become, as floats."""
    groups = x.astype(np.float32).reshape(len(x), -1, GROUP)
    largest = np.abs(groups).max(-1, keepdims=True)
    rate = np.divide(127, largest, out=np.zeros_like(largest), where=largest > 0)
    return (np.rint(groups * rate).astype(np.float64) * largest / 127).reshape(x.shape)


def multiply(x: np.ndarray, kernel: np.ndarray, bits: int) -> np.ndarray:
    """What `project_groups` is to give, in float64."""
    return round_inputs(x) @ round_weights(kernel, bits).astype(np.float64).T


def floats(kernel: GroupKernel) -> np.ndarray:
    """A kernel as floats, through the product: rows of the identity are their own integers."""
    return np.asarray(multiply_by_xla(jnp.eye(kernel.shape[1]), kernel)).T


@pytest.mark.parametrize("bits", [4, 8])
def test_a_kernel_is_rounded_to_the_nearest(bits: int) -> None:
    kernel = normal(128, 96)
    kernel[3], kernel[4] = 0, 0.25
    found = quantize_groups(jnp.asarray(kernel), bits=bits)
    assert (found.bits, found.shape) == (bits, (128, 96))
    chex.assert_shape(found, [(2, 3, 256 * bits), (2, 3, 64), (2, 3, 64)])
    expected = round_weights(kernel, bits)
    np.testing.assert_allclose(floats(found), expected, rtol=1e-6, atol=1e-6)
    assert np.abs(expected - kernel).max() < (0.25 if bits == 4 else 0.02)
    np.testing.assert_array_equal(expected[3], kernel[3])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 17, 32, 130])
def test_products_are_those_of_rounded_numbers(num_rows: int, bits: int) -> None:
    x, kernel = normal(num_rows, 96), normal(192, 96, seed=1)
    x[0, 0] = 500.0  # a group that is mostly rounded away
    x[-1, 32:64] = 0
    small = quantize_groups(jnp.asarray(kernel), bits=bits)
    expected = multiply(x, kernel, bits)
    for way in (project_groups, multiply_by_xla):
        found = jax.jit(way)(jnp.asarray(x), small)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums_do_not_overflow(bits: int) -> None:
    """All codes and inputs at their ends, in groups of either sign."""
    x = np.full((3, 64), 127, np.float32)
    x[1] = -127
    kernel = np.zeros((64, 64), np.float32)
    kernel[:, 1:] = 15 if bits == 4 else 127
    kernel[1] *= -1
    small = quantize_groups(jnp.asarray(kernel), bits=bits)
    np.testing.assert_array_equal(jax.jit(project_groups)(jnp.asarray(x), small), x @ kernel.T)


def test_a_row_is_the_same_whatever_the_rows_beside_it() -> None:
    x = jnp.asarray(normal(64, 96))
    kernel = quantize_groups(jnp.asarray(normal(64, 96, seed=1)), bits=4)
    whole = np.asarray(jax.jit(project_groups)(x, kernel))
    for size in (1, 2, 7, 16, 33):
        np.testing.assert_array_equal(jax.jit(project_groups)(x[:size], kernel), whole[:size])
    by_row = jax.vmap(lambda row: project_groups(row[None], kernel)[0])(x)
    np.testing.assert_array_equal(by_row, whole)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(value: float) -> None:
    x = normal(3, 64)
    x[1, 4] = value
    kernel = quantize_groups(jnp.asarray(normal(64, 64, seed=1)), bits=4)
    for way in (project_groups, multiply_by_xla):
        found = np.asarray(jax.jit(way)(jnp.asarray(x), kernel))
        assert np.isfinite(found).all(axis=1).tolist() == [True, False, True]
        assert not np.isfinite(found[1]).any()


def test_rows_of_an_embedding() -> None:
    table = normal(192, 64)
    found = take_groups(quantize_groups(jnp.asarray(table), bits=8), jnp.asarray([70, 0, 999, -1]))
    np.testing.assert_array_equal(found, round_weights(table, 8)[[70, 0, 191, 0]])


def test_shapes_that_cannot_be_cut_get_eight_bits_by_output() -> None:
    assert fits_groups((64, 32))
    for shape in ((72, 64), (64, 40), (2, 64, 64)):
        assert not fits_groups(shape)
    assert isinstance(quantize("o", jnp.ones((72, 64)), "int4"), Int8Kernel)
    for name, bits in (("gate_up", 4), ("embed", 8), ("lm_head", 8)):
        kernel = quantize(name, jnp.ones((128, 64)), "int4")
        assert isinstance(kernel, GroupKernel)
        assert kernel.bits == bits
    norm = jnp.ones((64,))
    assert quantize("attn_norm", norm, "int4") is norm


def test_the_weights_of_the_packaged_file_come_back_exactly() -> None:
    """They are of four and eight bits there, in the same groups."""
    checkpoint = open_checkpoint(None)
    plain = load_params(checkpoint, jnp.float32)
    small = load_params(checkpoint, jnp.float32, "int4")
    rows = jnp.arange(0, 49_152, 11)
    np.testing.assert_array_equal(take_groups(small["embed"], rows), plain["embed"][rows])
    for name in ("qkv", "o", "gate_up", "down"):
        kernel = small["layers_17"][name]
        expected = plain["layers_17"][name]
        np.testing.assert_allclose(floats(kernel), expected, rtol=1e-6, atol=1e-6)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(small))
    assert size < sum(leaf.nbytes for leaf in jax.tree.leaves(plain)) / 5


@pytest.mark.parametrize("case", CASES)
def test_families_against_transformers_with_rounded_layers(tmp_path: Path, case: str) -> None:
    def by_groups(name: str, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        return multiply(x, kernel, 8 if name == "lm_head" else 4).astype(np.float32)

    check_case(tmp_path, case, "int4", by_groups, lambda rows: round_weights(rows, 8), share=0.6)


@pytest.mark.parametrize(
    ("compiler", "problem"), [("no-such-compiler", "cannot be run"), ("false", "false failed")]
)
def test_without_a_compiler_xla_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, problem: str
) -> None:
    x, kernel = jnp.asarray(normal(3, 64)), quantize_groups(jnp.asarray(normal(64, 64)), bits=4)
    expected = project_groups(x, kernel)
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(native, "register", functools.cache(native.register.__wrapped__))
    has_product = functools.cache(group_kernels.has_product.__wrapped__)
    monkeypatch.setattr(group_kernels, "has_product", has_product)
    with pytest.warns(RuntimeWarning, match=f"left to XLA.*{problem}.*install g.*CXX"):
        assert not has_product()
    traced = jax.jit(lambda x: project_groups(x, kernel)).lower(x)
    assert "custom_call" not in traced.as_text()
    np.testing.assert_allclose(project_groups(x, kernel), expected, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    kernel = quantize_groups(jnp.ones((64, 64)), bits=4)
    small = quantize_groups(jnp.ones((64, 32)), bits=4)
    for x, wrong in (
        (jnp.ones((2, 32)), kernel),
        (jnp.ones((2, 96)), kernel),
        (jnp.ones((2, 64)), kernel._replace(scale=small.scale)),
        (jnp.ones((2, 64)), kernel._replace(codes=kernel.codes[:, :, :512])),
    ):
        with pytest.raises(ValueError, match=r"x \[2, \d+\] does not fit a kernel in groups"):
            project_groups(x, wrong)
    assert project_groups(jnp.ones((0, 64)), kernel).shape == (0, 64)
    with pytest.raises(ValueError, match="quantization is 'int5', not one of int8, int4, fp8"):
        quantize("o", jnp.ones((64, 64)), "int5")
