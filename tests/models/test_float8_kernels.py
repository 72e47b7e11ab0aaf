"""Kernels in float8: their values, both products, and what a file in float8 keeps of its own."""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.models.files.checkpoint import build_module, load_params, open_checkpoint
from folojax.models.files.save import save_pretrained
from folojax.models.quantized import row_rounding
from folojax.models.quantized.codes import dequantize
from folojax.models.quantized.float8_kernels import (
    Float8Kernel,
    multiply_few,
    multiply_narrow,
    multiply_wide,
    project_float8,
    quantize_float8,
    take_float8,
)
from folojax.models.quantized.int8_kernels import Int8Kernel, project_int8, quantize_int8
from folojax.models.quantized.quantize import quantization_of, quantize_params

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def _round(x: np.ndarray) -> np.ndarray:
    """Rows as they are in float8, by NumPy: what they mean."""
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448)
    return (x / np.where(scale == 0, 1, scale)).astype(E4M3).astype(np.float32) * scale


def _draw(number: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=shape).astype(np.float32)


def test_values_are_the_nearest_of_each_output() -> None:
    weights = _draw(0, 32, 48) * np.logspace(-6, 2, 32, dtype=np.float32)[:, None]
    weights[3] = 0
    kernel = quantize_float8(weights)
    assert (kernel.shape, kernel.values.dtype) == ((32, 48), E4M3)
    np.testing.assert_allclose(dequantize(kernel), _round(weights), rtol=1e-6)
    index = jnp.asarray([5, 31, 40, -1])
    expected = dequantize(kernel)[[5, 31, 31, 0]]
    np.testing.assert_allclose(take_float8(kernel, index), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_inputs_are_rounded_row_by_row_where_there_are_many(dtype: Any) -> None:
    kernel, x = quantize_float8(_draw(1, 32, 64)), _draw(2, 40, 64)
    x[7] *= 1e4  # of no consequence to the other rows
    given = jnp.asarray(x, dtype)
    found = np.asarray(multiply_narrow(given, kernel, dtype), np.float32)
    expected = _round(np.asarray(given, np.float32)) @ dequantize(kernel).T
    # Numbers of bfloat16 lie halfway between two of float8 often, and fall to either side.
    error = 1e-5 if dtype == jnp.float32 else 0.03
    largest = abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_allclose(found / largest, expected / largest, atol=error)


def test_few_rows_and_those_on_cpu_are_not_rounded() -> None:
    kernel, x = quantize_float8(_draw(1, 32, 64)), _draw(2, 40, 64)
    found = jax.jit(project_float8, static_argnums=2)(x, kernel, jnp.float32)
    np.testing.assert_allclose(found, x @ dequantize(kernel).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "is_narrow"), [(32, False), (33, True)])
def test_what_a_gpu_multiplies(rows: int, is_narrow: bool) -> None:
    """In a program for CUDA, which is lowered here and not compiled."""
    kernel = quantize_float8(_draw(1, 32, 64))
    x = jax.ShapeDtypeStruct((rows, 64), jnp.bfloat16)
    traced = jax.jit(lambda x: project_float8(x, kernel, jnp.bfloat16)).trace(x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (product,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert (product.count("f8E4M3FN") == 2) == is_narrow
    assert ("round_rows" in text) == is_narrow


def test_a_single_row_is_multiplied_as_eight_where_that_is_faster() -> None:
    kernel, x = quantize_float8(_draw(1, 32, 64)), jnp.asarray(_draw(2, 1, 64), jnp.bfloat16)
    found = multiply_few(x, *kernel)
    np.testing.assert_allclose(found, multiply_wide(x, *kernel), rtol=1e-5, atol=1e-5)
    for call in (project_float8, project_int8):
        given = kernel if call is project_float8 else quantize_int8(_draw(1, 32, 64))
        traced = jax.jit(functools.partial(call, dtype=jnp.bfloat16)).trace(x, given)
        assert "tensor<8x32x" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("dtype", "largest"), [(jnp.float8_e4m3fn, 448.0), (jnp.int8, 127.0)])
def test_rounding_as_one_kernel(dtype: Any, largest: float) -> None:
    x = jnp.asarray(_draw(3, 3, 96), jnp.bfloat16).at[1].set(0).at[2, 5].set(jnp.nan)
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        found = row_rounding.round_in_one(x, dtype=dtype, largest=largest)
    values, scale = row_rounding.round_rows(x, dtype, largest)
    np.testing.assert_array_equal(found[1], scale)
    np.testing.assert_array_equal(found[0][:2].astype(jnp.float32), values[:2].astype(jnp.float32))
    assert np.isnan(found[1][2, 0])
    assert scale[1, 0] == 1


def test_a_model_is_saved_and_loaded_in_its_bits(tiny_model: tuple, tmp_path: Path) -> None:
    module, params = tiny_model
    small = quantize_params(params, "fp8")
    assert quantization_of(small) == "fp8"
    assert isinstance(small["layers_0"]["qkv"], Float8Kernel)
    assert isinstance(small["embed"], Int8Kernel)
    save_pretrained(small, tmp_path, module.config)
    checkpoint = open_checkpoint(tmp_path)
    assert build_module(checkpoint.config) == module
    loaded = load_params(checkpoint, jnp.float32, "fp8")
    chex.assert_trees_all_equal(loaded["layers_1"], small["layers_1"])
    chex.assert_trees_all_close(loaded["embed"], small["embed"], rtol=1e-6)
    floats = load_params(checkpoint, jnp.float32)
    np.testing.assert_array_equal(floats["layers_0"]["down"], dequantize(small["layers_0"]["down"]))
