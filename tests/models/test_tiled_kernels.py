"""Four bits as a GPU has them: kernels are, interpreted, the product with what the codes mean."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.models.machine.triton import triton
from folojax.models.quantized import tiled_product
from folojax.models.quantized.codes import Codes, codes_of, dequantize, kernel_of_codes
from folojax.models.quantized.int8_kernels import Int8Kernel
from folojax.models.quantized.names import TILED
from folojax.models.quantized.quantize import (
    quantization_of,
    quantize_like,
    quantize_params,
    widened_bytes,
)
from folojax.models.quantized.tiled_kernels import (
    TiledKernel,
    fits_tiles,
    pack_tiles,
    project_tiles,
    quantize_tiles,
    take_tiles,
    unpack_tiles,
    widened,
)
from tests import ptx
from tests.random_numbers import normal


def _draw(number: int, *shape: int) -> Any:
    return normal(number, *shape)


def _kernel(group: int, outputs: int = 64, inputs: int = 512) -> tuple[Any, Any]:
    """One of any codes and groups, and the floats that it means, by NumPy."""
    rng = np.random.default_rng(group)
    codes = rng.integers(0, 16, (outputs, inputs), np.uint8)
    scale, offset = (
        jnp.asarray(rng.normal(0, 0.05, (outputs, inputs // group)), jnp.bfloat16) for _ in "so"
    )
    wide = [np.repeat(np.asarray(one, np.float32), group, axis=1) for one in (scale, offset)]
    return pack_tiles(codes, scale, offset), (codes.astype(np.float32) - 8) * wide[0] + wide[1]


@pytest.fixture
def interpreted() -> Any:
    """Kernels run on a CPU, operation by operation, assembly too."""
    interpreted = functools.partial(pl.pallas_call, interpret=True)
    with (
        mock.patch.object(pl, "pallas_call", interpreted),
        mock.patch.object(triton, "elementwise_inline_asm", ptx.elementwise_inline_asm),
    ):
        yield


@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
def test_codes_mean_what_they_meant_when_they_were_packed(group: int) -> None:
    kernel, floats = _kernel(group)
    assert (kernel.shape, kernel.group) == (floats.shape, group)
    np.testing.assert_array_equal(widened(kernel), floats)
    codes, scale, offset = unpack_tiles(kernel)
    again = pack_tiles(codes, scale.astype(jnp.bfloat16), offset.astype(jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, again, kernel)
    index = jnp.asarray([3, 0, 63, 99, -4])
    np.testing.assert_array_equal(take_tiles(kernel, index), floats[[3, 0, 63, 63, 0]])


def test_quantised_weights_are_within_half_a_step() -> None:
    weights = 0.02 * _draw(0, 64, 256)
    found = widened(quantize_tiles(weights)).reshape(64, 8, 32)
    grouped = weights.reshape(found.shape)
    step = (grouped.max(axis=-1) - grouped.min(axis=-1))[..., None] / 15
    # An offset is rounded to eight bits.
    assert (jnp.abs(found - grouped) < 0.56 * step).all()
    constant = jnp.full((64, 128), 0.5)
    np.testing.assert_array_equal(widened(quantize_tiles(constant)), constant)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("rows", "group", "outputs"), [(3, 64, 64), (11, 128, 128), (70, 32, 64), (40, 512, 192)]
)
def test_the_kernel_is_the_product_with_what_codes_mean(
    rows: int, group: int, outputs: int
) -> None:
    kernel, floats = _kernel(group, outputs)
    x = _draw(rows, rows, 512).astype(jnp.bfloat16)
    found = tiled_product.multiply_tiles(x, kernel.words, kernel.pairs, jnp.float32)
    weights = np.asarray(jnp.asarray(floats, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(found, np.asarray(x, np.float32) @ weights.T, rtol=1e-5, atol=1e-5)
    plain = project_tiles(x, kernel, jnp.float32)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_inputs_that_are_no_multiple_of_parts_have_fewer() -> None:
    kernel, floats = _kernel(32, inputs=384)
    x = _draw(5, 2, 384).astype(jnp.bfloat16)
    found = tiled_product.multiply_tiles(x, kernel.words, kernel.pairs, jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float32) @ floats.T
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0.02, atol=0.05)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("group", [32, 256])
def test_weights_are_widened_as_they_are_multiplied(group: int) -> None:
    kernel, floats = _kernel(group)
    found = tiled_product.widen_tiles(kernel.words, kernel.pairs)
    np.testing.assert_array_equal(found, jnp.asarray(floats, jnp.bfloat16))


def test_many_rows_are_multiplied_by_xla_and_few_by_the_kernel() -> None:
    """In a program for CUDA, which is lowered here and not compiled."""
    kernel, _ = _kernel(32)
    for rows, name in ((1, "multiply_tiles"), (256, "multiply_tiles"), (257, "widen_tiles")):
        x = jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16)
        traced = jax.jit(lambda x: project_tiles(x, kernel, jnp.bfloat16)).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert name in text
        assert ("stablehlo.dot_general" in text) == (rows == 257)


@pytest.mark.parametrize("group", [32, 128, 256])
def test_codes_of_files_are_kept_in_their_groups(group: int) -> None:
    rng = np.random.default_rng(0)

    def part(outputs: int) -> Codes:
        scale, zero = (
            rng.integers(1, 15, (outputs, 256 // group)).astype(np.float32) for _ in range(2)
        )
        values = rng.integers(0, 16, (outputs, 256), np.uint8)
        return Codes(values, scale / 64, zero, group, 4)

    parts = [part(64), part(128)]
    kernel = kernel_of_codes("qkv", parts, TILED)
    assert isinstance(kernel, TiledKernel)
    assert (kernel.shape, kernel.group) == ((192, 256), group)
    meant = [
        (one.values - np.repeat(one.zero, group, axis=1)) * np.repeat(one.scale, group, axis=1)
        for one in parts
    ]
    np.testing.assert_array_equal(dequantize(kernel), np.concatenate(meant))
    # Written in groups of 32, they are the same.
    again = codes_of(kernel)
    assert again is not None
    assert again.group == 32
    same = kernel_of_codes("qkv", [again], TILED)
    assert same is not None
    np.testing.assert_array_equal(dequantize(same), dequantize(kernel))


def test_what_becomes_tiles() -> None:
    """Linear layers; embeddings, and what cannot be cut, have eight bits. New floats likewise."""
    weights = 0.02 * _draw(0, 128, 256)
    layer = {"qkv": weights, "o": weights[:100], "attn_norm": weights[0]}
    params = quantize_params({"embed": weights, "layers_0": layer}, TILED)
    kinds = [type(params["embed"]), *map(type, params["layers_0"].values())]
    assert kinds == [Int8Kernel, TiledKernel, Int8Kernel, type(weights)]
    assert quantization_of(params) == "int4"
    assert widened_bytes(params) == 2 * 128 * 256
    grouped = quantize_params({"qkv": weights}, "int4")
    moved = quantize_params(grouped, TILED)["qkv"]
    assert isinstance(moved, TiledKernel)
    np.testing.assert_allclose(dequantize(moved), dequantize(grouped["qkv"]), atol=1e-3)
    wide, _ = _kernel(128, 64, 256)
    assert jax.tree.map(jnp.shape, quantize_like(wide, weights[:64])) == jax.tree.map(
        jnp.shape, wide
    )


def test_shapes_that_cannot_be_cut() -> None:
    assert fits_tiles((64, 128))
    assert fits_tiles((64, 128), group=64)
    assert not fits_tiles((32, 128))
    assert not fits_tiles((64, 96))
    assert not fits_tiles((64, 128), group=16)
    assert not fits_tiles((64, 128, 2))
    assert fits_tiles((64, 256), group=256)
