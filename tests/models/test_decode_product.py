"""Rows of decode steps on Hopper in CUDA C++: what decides for it, and, on a card, its results."""

import ctypes
import logging
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.backend import choose_backend
from folojax.models.core.linear import gated, project, project_gated
from folojax.models.machine import compiler, decode_product
from folojax.models.machine.decode_product import Cut, cut_of
from folojax.models.quantized.float8_kernels import quantize_float8
from folojax.models.quantized.quantize import project_quantized
from folojax.models.quantized.tiled_kernels import pack_tiles, widened
from tests.random_numbers import normal

_WIDTH, _INNER = 1024, 2048


@pytest.fixture
def taken() -> Any:
    """Programs are made as for a machine that has it; they are not compiled here."""
    jax.clear_caches()  # of programs that were traced without
    with mock.patch.object(decode_product, "has_product", return_value=True):
        yield
    jax.clear_caches()


def _lowered(function: Any, rows: int, outputs: int, dtype: Any = jnp.bfloat16) -> str:
    x = jax.ShapeDtypeStruct((rows, _WIDTH), dtype)
    kernel = jax.ShapeDtypeStruct((outputs, _WIDTH), dtype)
    traced = jax.jit(function).trace(x, kernel)
    return str(traced.lower(lowering_platforms=("cuda",)).as_text())


def _gate(x: Any, kernel: Any) -> Any:
    return project_gated(x, kernel, "silu", x.dtype, is_ordered=False)


@pytest.mark.usefixtures("taken")
def test_rows_of_a_decode_step_are_its_own() -> None:
    for rows, is_own in ((1, False), (2, True), (256, True), (257, False)):
        assert ("decode_product" in _lowered(project, rows, _INNER)) == is_own
    assert "decode_product" in _lowered(project, 64, _INNER, jnp.float16)
    assert "decode_product" not in _lowered(project, 64, _INNER, jnp.float32)
    assert "decode_product" not in _lowered(project, 64, 512)
    ordered = _lowered(lambda x, k: project(x, k, is_ordered=True), 64, _INNER)
    assert "decode_product" not in ordered


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("bits", [4, 8])
def test_so_are_those_of_few_bits(bits: int) -> None:
    kernel, _ = _tiles(32, 1216, 1152) if bits == 4 else _float8(1216, 1152)
    for call in (project, _gate):
        for rows, is_own in ((8, False), (9, True), (256, True), (257, False)):
            x = jax.ShapeDtypeStruct((rows, 1152), jnp.bfloat16)
            traced = jax.jit(call).trace(x, kernel)
            text = str(traced.lower(lowering_platforms=("cuda",)).as_text())
            assert ("decode_product" in text) == is_own
            assert ("is_gated = true" in text) == (is_own and call is _gate)
            assert ("gated_silu" in text) == (not is_own and call is _gate)


@pytest.mark.usefixtures("taken")
def test_it_gates_what_it_multiplies() -> None:
    text = _lowered(_gate, 64, 2 * _INNER)
    assert "is_gated = true" in text
    assert "gated_silu" not in text
    assert "gated_silu" in _lowered(_gate, 1, 2 * _INNER)


def test_without_the_driver_xla_multiplies(caplog: pytest.LogCaptureFixture) -> None:
    decode_product.has_product.cache_clear()
    jax.clear_caches()
    with (
        mock.patch.object(decode_product.cuda, "DRIVER", "libnone.so"),
        caplog.at_level(logging.WARNING),
    ):
        assert "decode_product" not in _lowered(project, 64, _INNER)
    assert not caplog.text  # most machines are of no use to it
    decode_product.has_product.cache_clear()


def test_what_does_not_compile_is_told() -> None:
    library = compiler.load(decode_product._SOURCE)
    why = ctypes.create_string_buffer(256)
    assert library.compile_product(b"libnone.so", b"", 16, 32, 1, 1, b".", why, len(why)) == 1
    assert b"cannot be loaded" in why.value


@pytest.mark.usefixtures("taken")
def test_gradients_are_those_of_the_plain_way() -> None:
    x, kernel = (normal(seed, *shape) for seed, shape in ((0, (16, 1024)), (1, (1024, 1024))))
    given = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)

    def loss(call: Any) -> Any:
        return jax.grad(lambda *args: call(*args).astype(jnp.float32).sum(), argnums=(0, 1))

    def plain(x: Any, kernel: Any) -> Any:
        return gated((x @ kernel.T).astype(x.dtype), dtype=x.dtype)

    for one, other in zip(loss(_gate)(*given), loss(plain)(*given), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0.05, atol=0.5
        )


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "cut"),
    [
        (64, 4096, 4096, Cut(1, 2)),  # 64 blocks would leave half of the processors idle
        (64, 4096, 24576, Cut(3, 1)),  # 128 large blocks
        (256, 4096, 24576, None),  # those would need more registers than there are
        (64, 1024, 2048, Cut(1, 2)),
        (64, 4096, 151936, None),
        (64, 1020, 4096, None),
        (64, 4096, 4104, None),
    ],
)
def test_how_products_are_cut(rows: int, inputs: int, outputs: int, cut: Cut | None) -> None:
    assert cut_of(rows, inputs, outputs) == cut


@pytest.mark.parametrize("rows", range(2, 257, 13))
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_cut_can_run(rows: int, bits: decode_product.Bits) -> None:
    for inputs in range(512, 16384, 1024):
        for outputs in range(512, 30000, 2032):
            cut = cut_of(rows, inputs, outputs, bits)
            if cut is not None:
                padded = 8 if rows <= 8 else -(-rows // 32) * 32
                assert decode_product._fits(padded, cut.groups, bits)
                assert cut.parts in (1, 2, 4, 8)  # the sizes of clusters that every card has


@pytest.fixture
def on_card() -> None:
    """Skips where there is no card, or no way to compile for it."""
    if choose_backend().name != "gpu" or not decode_product.has_product("bfloat16"):
        pytest.skip("runs on an NVIDIA GPU of the Hopper generation")


def _drawn(seed: int, rows: int, inputs: int, outputs: int, dtype: Any) -> tuple[Any, Any]:
    kernel = (0.05 * normal(seed, outputs, inputs)).astype(dtype)
    return (normal(seed + 1, rows, inputs) + 0.2).astype(dtype), kernel


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize("rows", [2, 8, 9, 32, 50, 64, 100, 128, 192, 255, 256])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(4096, 4096), (1000, 6160), (1024, 24576), (12288, 1024), (2056, 1040)]
)
def test_a_product_is_the_sum_in_float64(rows: int, inputs: int, outputs: int) -> None:
    for dtype, written, error in (
        (jnp.bfloat16, jnp.bfloat16, 2e-2),
        (jnp.bfloat16, jnp.float32, 1e-3),
        (jnp.float16, jnp.float16, 4e-3),
    ):
        x, kernel = _drawn(rows, rows, inputs, outputs, dtype)
        expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
        product = jax.jit(project, static_argnames="is_rounded")
        found = product(x, kernel, is_rounded=written == dtype)
        assert found.dtype == written
        differences = np.abs(np.asarray(found, np.float64) - expected)
        assert differences.max() < error * np.abs(expected).mean()
        np.testing.assert_array_equal(found, product(x, kernel, is_rounded=written == dtype))


def _tiles(group: int, outputs: int, inputs: int) -> tuple[Any, Any]:
    """A kernel of four bits and what it means."""
    rng = np.random.default_rng(group)
    codes = rng.integers(0, 16, (outputs, inputs), np.uint8)
    scale, offset = (
        jnp.asarray(rng.normal(0, 0.05, (outputs, inputs // group)), jnp.bfloat16) for _ in "so"
    )
    kernel = pack_tiles(codes, scale, offset)
    return kernel, widened(kernel).astype(jnp.bfloat16)


def _float8(outputs: int, inputs: int) -> tuple[Any, Any]:
    kernel = quantize_float8(0.05 * normal(7, outputs, inputs))
    return kernel, kernel.values.astype(jnp.float32) * kernel.scale[:, None]


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize("rows", [9, 40, 64, 128, 250])
@pytest.mark.parametrize(
    ("kind", "inputs", "outputs"),
    [
        (32, 4096, 1088),
        (64, 640, 6208),
        (128, 1024, 24576),
        (384, 12288, 1024),
        (2048, 2048, 1984),
        (8, 4096, 1088),
        (8, 2064, 6160),
        (8, 1024, 20480),
    ],
)
def test_weights_of_few_bits_are_multiplied_as_they_mean(
    kind: int, rows: int, inputs: int, outputs: int
) -> None:
    kernel, meant = _float8(outputs, inputs) if kind == 8 else _tiles(kind, outputs, inputs)
    x = (normal(rows, rows, inputs) + 0.2).astype(jnp.bfloat16)
    both = np.asarray(x, np.float64) @ np.asarray(meant, np.float64).T
    for dtype, error in ((jnp.bfloat16, 2e-2), (jnp.float32, 1e-3)):
        found = jax.jit(project_quantized, static_argnums=2)(x, kernel, dtype)
        differences = np.abs(np.asarray(found, np.float64) - both)
        assert differences.max() < error * np.abs(both).mean()
    expected = np.asarray(gated(jnp.asarray(both, jnp.bfloat16), dtype=jnp.float32), np.float64)
    differences = np.abs(np.asarray(jax.jit(_gate)(x, kernel), np.float64) - expected)
    assert differences.max() < 0.05 * np.abs(expected).mean()


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize("cut", [Cut(g, p) for g in (1, 2, 3, 4) for p in (1, 2, 4, 8)])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_cut_computes_the_same(cut: Cut, is_gated: bool, bits: decode_product.Bits) -> None:
    assert decode_product.has_product("bfloat16", bits)
    rows = 70 if cut.groups < 4 else 50
    x, kernel = _drawn(0, rows, 1152, 1216, jnp.bfloat16)
    arrays, meant = (kernel,), kernel
    if bits == 4:
        arrays, meant = _tiles(32, 1216, 1152)
    elif bits == 8:
        arrays, meant = _float8(1216, 1152)
    both = np.asarray(x, np.float64) @ np.asarray(meant, np.float64).T
    rounded = jnp.asarray(both, jnp.bfloat16)
    expected = np.asarray(gated(rounded, dtype=jnp.float32) if is_gated else both, np.float64)
    found = jax.jit(
        lambda x, k: decode_product.product(x, k, jnp.bfloat16, cut, is_gated=is_gated)
    )(x, tuple(arrays))
    differences = np.abs(np.asarray(found, np.float64) - expected)
    assert differences.max() < 0.05 * np.abs(expected).mean()
