"""Products of rows with adapters of their own, in C++ and in XLA, against NumPy."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.models.core import adapted, low_rank_kernels
from folojax.models.core.adapted import Stack, add_low_rank

SHAPES = {
    "parts": (9, 64, (64, 32, 32), 3, 8),
    "odd sizes": (5, 67, (33,), 3, 5),
    "one row": (1, 64, (96, 96), 2, 16),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("way", ["cpp", "xla"])
def test_a_row_has_the_update_of_its_own_adapter(
    case: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows, width, widths, slots, rank = SHAPES[case]
    assert adapted._problem() is None, "the machine of the tests has a compiler"
    if way == "xla":
        monkeypatch.setattr(adapted, "_problem", lambda: "none today")
    rng = np.random.default_rng(0)
    x, base = rng.normal(size=(num_rows, width)), rng.normal(size=(num_rows, sum(widths)))
    a = rng.normal(size=(len(widths), slots, rank, width))
    b = [rng.normal(size=(slots, rank, one)) for one in widths]
    slot = rng.integers(0, slots + 1, num_rows)
    expected = base.copy()
    for row, mine in enumerate(slot):
        if mine < slots:
            inner = a[:, mine] @ x[row]
            expected[row] += np.concatenate(
                [z @ one[mine] for z, one in zip(inner, b, strict=True)]
            )
    arrays = [jnp.asarray(one, jnp.float32) for one in (x, base, a, *b)]
    stack, where = Stack(arrays[2], tuple(arrays[3:])), jnp.asarray(slot, jnp.int32)
    call = jax.jit(lambda *args: add_low_rank(*args))
    found = call(arrays[0], arrays[1], stack, where)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)
    if way == "cpp":  # the same bits alone, and in another slot
        turned = Stack(jnp.roll(stack.a, 1, 1), tuple(jnp.roll(one, 1, 0) for one in stack.b))
        moved = jnp.where(where < slots, (where + 1) % slots, slots)
        for row in range(num_rows):
            one = call(arrays[0][row:][:1], arrays[1][row:][:1], turned, moved[row:][:1])
            np.testing.assert_array_equal(one[0], found[row])


def test_what_does_not_fit_is_an_error() -> None:
    stack = Stack(jnp.zeros((1, 2, 4, 8)), (jnp.zeros((2, 4, 6)),))
    slot = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="does not fit adapters of"):
        add_low_rank(jnp.zeros((3, 9)), jnp.zeros((3, 6)), stack, slot)


@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("num_rows", [5, 300])
def test_a_kernel_of_a_gpu_adds_and_gates(num_rows: int, is_ordered: bool) -> None:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    a, b = draw(2, 3, 8, 64), (draw(3, 8, 32), draw(3, 8, 32))
    x, out = draw(num_rows, 64), draw(num_rows, 64).astype(jnp.float32)
    slot = jnp.asarray(rng.integers(0, 4, num_rows), jnp.int32)
    options: Any = {"dtype": jnp.bfloat16, "is_ordered": is_ordered}
    interpreted = functools.partial(pl.pallas_call, interpret=True)
    with mock.patch.object(pl, "pallas_call", interpreted):
        add: Any = functools.partial(low_rank_kernels.add_by_kernels, **options)
        both, found = (add(x, out, slot, a, *b, is_gated=gated) for gated in (False, True))
        one = add(x[:1], out[:1], slot[:1], a, *b, is_gated=True)
    gate, up = jnp.split(both.astype(jnp.float32), 2, axis=1)
    expected = (jax.nn.silu(gate) * up).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(found), np.float32(expected))
    if is_ordered or num_rows < 256:  # else the reduction of many rows is XLA's
        np.testing.assert_array_equal(np.float32(one[0]), np.float32(found[0]))


@pytest.mark.parametrize(
    ("num_rows", "width", "widths", "slots", "rank", "dtype"),
    [
        (9, 1100, (64, 32, 32), 3, 8, "float32"),
        (80, 300, (96, 96), 2, 16, "bfloat16"),
        (1, 64, (48,), 2, 32, "bfloat16"),
        (300, 64, (64, 32), 3, 16, "bfloat16"),  # many
    ],
)
def test_kernels_of_a_gpu_add_what_xla_adds(
    num_rows: int, width: int, widths: tuple[int, ...], slots: int, rank: int, dtype: str
) -> None:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    a, b = draw(len(widths), slots, rank, width), [draw(slots, rank, one) for one in widths]
    x, out = draw(num_rows, width), draw(num_rows, sum(widths)).astype(jnp.float32)
    slot = jnp.asarray(rng.integers(0, slots + 1, num_rows), jnp.int32)
    assert low_rank_kernels.is_taken(a, tuple(b))
    interpreted = functools.partial(pl.pallas_call, interpret=True)
    with mock.patch.object(pl, "pallas_call", interpreted):
        found = low_rank_kernels.add_by_kernels(x, out, slot, a, *b, dtype=dtype)
        # A row by itself, among no other rows: the same bits.
        one = low_rank_kernels.add_by_kernels(x[:1], out[:1], slot[:1], a, *b, dtype=dtype)
    expected = adapted._add_by_xla(x, out, slot, a, *b, dtype=dtype)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=2e-2, atol=2.0)
    np.testing.assert_array_equal(np.float32(one[0]), np.float32(found[0]))
