"""Rows of decode steps on Hopper in CUDA C++: what decides for it, and, on a card, its results."""

import ctypes
import functools
import logging
from pathlib import Path
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
from folojax.models.quantized.tiled_kernels import widened
from tests.random_numbers import normal
from tests.random_tiles import random_tiles

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
    most = 256 if bits == 4 else 128
    for call in (project, _gate):
        for rows, is_own in ((9, True), (most, True), (most + 1, False)):
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


@pytest.fixture
def asked_anew() -> Any:
    """What the machine has is found out again, and forgotten."""
    decode_product._is_opened.cache_clear()
    jax.clear_caches()
    yield
    decode_product._is_opened.cache_clear()
    jax.clear_caches()


@pytest.mark.usefixtures("asked_anew")
def test_without_the_driver_xla_multiplies(caplog: pytest.LogCaptureFixture) -> None:
    with (
        mock.patch.object(decode_product.cuda, "DRIVER", "libnone.so"),
        caplog.at_level(logging.WARNING),
    ):
        assert "decode_product" not in _lowered(project, 64, _INNER)
    assert not caplog.text  # most machines are of no use to it


class _Driver:
    """CUDA's, of a machine with GPUs of these generations."""

    def __init__(self, *generations: int) -> None:
        self._generations = generations

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return flags

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self._generations)
        return 0

    def cuDeviceGetAttribute(self, value: Any, which: int, device: int) -> int:  # noqa: N802
        assert which == 75
        value._obj.value = self._generations[device]
        return 0


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize(
    ("generations", "is_told"), [((), False), ((8,), False), ((9, 8), False), ((9, 9), True)]
)
def test_only_where_it_could_be_used_a_missing_compiler_is_told(
    generations: tuple[int, ...], is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        mock.patch.object(decode_product.ctypes, "CDLL", return_value=_Driver(*generations)),
        mock.patch.object(decode_product.cuda, "find_nvrtc", return_value=Path("none")),
        mock.patch.object(compiler, "register", return_value="no c++ here"),
        caplog.at_level(logging.WARNING),
    ):
        assert not decode_product.has_product("bfloat16")
    assert ("slower kernels: no c++ here" in caplog.text) == is_told


def test_what_does_not_compile_is_told() -> None:
    library = compiler.load(decode_product._SOURCE)
    why = ctypes.create_string_buffer(256)
    size = ctypes.c_size_t(len(why))
    assert library.compile_product(b"libnone.so", b"", 16, 32, 1, 1, b".", why, size) == 1
    assert b"cannot be loaded" in why.value


@pytest.mark.usefixtures("taken")
def test_gradients_are_those_of_the_plain_way() -> None:
    x, kernel = (normal(seed, *shape) for seed, shape in ((0, (16, 1024)), (1, (1024, 1024))))
    given = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)

    def loss(call: Any) -> Any:
        return jax.grad(lambda *args: call(*args).astype(jnp.float32).sum(), argnums=(0, 1))

    def plain(x: Any, kernel: Any) -> Any:
        return gated((x @ kernel.T).astype(x.dtype), dtype=x.dtype)

    # A card rounds sums in other places.
    with jax.default_device(jax.devices("cpu")[0]):
        found, expected = loss(_gate)(*given), loss(plain)(*given)
    for one, other in zip(found, expected, strict=True):
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


@functools.lru_cache(2)
def _drawn(inputs: int, outputs: int, dtype: Any) -> Any:
    return (0.05 * normal(0, outputs, inputs)).astype(dtype)


def _rows(rows: int, inputs: int, dtype: Any) -> Any:
    return (normal(1, rows, inputs) + 0.2).astype(dtype)


def _multiplied(x: Any, kernel: Any) -> Any:
    return np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T


def _check_gated(found: Any, both: Any) -> None:
    """A gate and an up may be rounded to a neighbour, as their sums have another order."""
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(gated(jnp.asarray(both, jnp.bfloat16), dtype=jnp.float32), np.float64)
    atol = 0.02 * np.abs(expected).mean()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0.03, atol=atol)


def _check(found: Any, expected: Any) -> None:
    """Rounded once, of sums in float32."""
    rounding = {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11, jnp.float32: 2.0**-24}
    rtol = 1.01 * rounding[found.dtype.type]
    atol = 1e-3 * np.abs(expected).mean()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize(
    ("dtype", "written"),
    [
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float16),
    ],
)
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(4096, 4096), (1000, 6160), (1024, 12288), (12288, 1024), (2056, 1040)]
)
def test_a_product_is_the_sum_in_float64(
    inputs: int, outputs: int, dtype: Any, written: Any
) -> None:
    kernel = _drawn(inputs, outputs, dtype)
    product = jax.jit(project, static_argnames="is_rounded")
    for rows in (2, 8, 9, 32, 50, 64, 100, 128, 192, 255, 256):
        x = _rows(rows, inputs, dtype)
        found = product(x, kernel, is_rounded=written == dtype)
        assert found.dtype == written
        _check(found, _multiplied(x, kernel))
        np.testing.assert_array_equal(found, product(x, kernel, is_rounded=written == dtype))


def _tiles(group: int, outputs: int, inputs: int) -> tuple[Any, Any]:
    """A kernel of four bits and what it means."""
    kernel = random_tiles(group, outputs, inputs)
    return kernel, widened(kernel).astype(jnp.bfloat16)


def _float8(outputs: int, inputs: int) -> tuple[Any, Any]:
    kernel = quantize_float8(0.05 * normal(7, outputs, inputs))
    return kernel, kernel.values.astype(jnp.float32) * kernel.scale[:, None]


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize(
    ("kind", "inputs", "outputs"),
    [
        (32, 4096, 1088),
        (64, 640, 6208),
        (128, 1024, 12288),
        (384, 12288, 1024),
        (2048, 2048, 1984),
        (8, 4096, 1088),
        (8, 2064, 6160),
        (8, 1024, 12288),
    ],
)
def test_weights_of_few_bits_are_multiplied_as_they_mean(
    kind: int, inputs: int, outputs: int
) -> None:
    kernel, meant = _float8(outputs, inputs) if kind == 8 else _tiles(kind, outputs, inputs)
    for rows in (9, 40, 64, 128) if kind == 8 else (9, 40, 64, 128, 250):
        x = _rows(rows, inputs, jnp.bfloat16)
        both = _multiplied(x, meant)
        for dtype in (jnp.bfloat16, jnp.float32):
            _check(jax.jit(project_quantized, static_argnums=2)(x, kernel, dtype), both)
        _check_gated(jax.jit(_gate)(x, kernel), both)


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_cut_computes_the_same(is_gated: bool, bits: decode_product.Bits) -> None:
    assert decode_product.has_product("bfloat16", bits)
    arrays: tuple[Any, ...] = (_drawn(1152, 1216, jnp.bfloat16),)
    meant = arrays[0]
    if bits < 16:
        arrays, meant = _tiles(32, 1216, 1152) if bits == 4 else _float8(1216, 1152)
    for groups in (1, 2, 3, 4):
        x = _rows(70 if groups < 4 else 50, 1152, jnp.bfloat16)
        both = _multiplied(x, meant)
        for parts in (1, 2, 4, 8):
            how = jnp.bfloat16, Cut(groups, parts), is_gated
            found = jax.jit(lambda x, arrays, how=how: decode_product.product(x, arrays, *how))(
                x, tuple(arrays)
            )
            (_check_gated if is_gated else _check)(found, both)
