"""Layers that keep a state: chunks of rows against the recurrence, token by token, in NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.core.recurrence import (
    CHUNK,
    Rows,
    convolve_rows,
    count_before,
    recur_rows,
)

K, H, D, Z, X, W = 2, 4, 8, 6, 10, 4
NUM_SLOTS = 3
LENGTHS = (150, 61, 9)
"""Tokens of each sequence, one a slot."""

convolve = jax.jit(convolve_rows)
recur = jax.jit(recur_rows)


@functools.cache
def sequences() -> list[dict[str, np.ndarray]]:
    """What recurrence and convolution read of each sequence."""
    rng = np.random.default_rng(0)
    found = []
    for length in LENGTHS:
        key = rng.normal(size=(length, K, D))
        found.append(
            {
                "query": rng.normal(size=(length, K, D)),
                "key": key / np.linalg.norm(key, axis=-1, keepdims=True),
                "value": rng.normal(size=(length, H, Z)),
                # Some forget at once, some hardly ever.
                "decay": -np.exp(rng.normal(-2, 2, size=(length, H))),
                "beta": rng.uniform(0.05, 1, size=(length, H)),
                "x": rng.normal(size=(length, X)),
            }
        )
    return found


KERNEL = np.random.default_rng(1).normal(size=(X, W))


def by_token(sequence: dict[str, np.ndarray], is_delta: bool) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence as it is written down, in float64: what is read, and the last state."""
    state = np.zeros((H, D, Z))
    out = []
    for t in range(len(sequence["x"])):
        query, key = (np.repeat(sequence[name][t], H // K, axis=0) for name in ("query", "key"))
        value = sequence["value"][t]
        state = state * np.exp(sequence["decay"][t])[:, None, None]
        if is_delta:
            value = (value - np.einsum("hd,hdz->hz", key, state)) * sequence["beta"][t][:, None]
        state = state + key[:, :, None] * value[:, None, :]
        out.append(np.einsum("hd,hdz->hz", query, state))
    return np.stack(out), state


def by_channel(sequence: dict[str, np.ndarray]) -> np.ndarray:
    padded = np.concatenate((np.zeros((W - 1, X)), sequence["x"]))
    return np.stack([np.convolve(padded[:, i], KERNEL[i, ::-1], "valid") for i in range(X)], axis=1)


def make_rows(columns: int, most_rows: int, is_decode: bool) -> list[list[tuple[int, int, int]]]:
    """Calls that compute all sequences side by side: (slot, first, length) of their rows."""
    done, calls = [0] * NUM_SLOTS, []
    while any(a < b for a, b in zip(done, LENGTHS, strict=True)):
        rows: list[tuple[int, int, int]] = []
        for slot, length in enumerate(LENGTHS):
            budget = 1 if is_decode else most_rows // NUM_SLOTS + (slot == 0)
            while done[slot] < length and budget and len(rows) < most_rows:
                count = min(columns, length - done[slot])
                rows.append((slot, done[slot], count))
                done[slot] += count
                budget -= 1
        rows += [(NUM_SLOTS, 0, 0)] * (most_rows - len(rows))
        calls.append(rows)
    return calls


def pick(name: str, rows: list[tuple[int, int, int]], columns: int) -> Any:
    """An array by rows, NaN in what is padding."""
    shape = sequences()[0][name].shape[1:]
    array = np.full((len(rows), columns, *shape), np.nan, np.float32)
    for i, (slot, first, length) in enumerate(rows):
        if length:
            array[i, :length] = sequences()[slot][name][first : first + length]
    return array


_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("columns", "most_rows", "is_decode", "is_delta"),
    [
        (1, 3, True, True),
        (7, 5, False, False),
        (16, 4, False, True),
        (2 * CHUNK, 4, False, True),
        pytest.param(1, 3, True, False, marks=_SLOW),
        pytest.param(1, 7, False, False, marks=_SLOW),
        pytest.param(1, 7, False, True, marks=_SLOW),
        pytest.param(7, 5, False, True, marks=_SLOW),
        pytest.param(2 * CHUNK, 4, False, False, marks=_SLOW),
    ],
)
def test_rows_give_what_tokens_give(
    columns: int, most_rows: int, is_decode: bool, is_delta: bool
) -> None:
    """To 1e-5 however sequences are cut; slots hold rubbish before, and padding is NaN."""
    memory = jnp.full((NUM_SLOTS + 1, H, D, Z), jnp.nan)
    conv = jnp.full((NUM_SLOTS + 1, W - 1, X), jnp.nan)
    read: list[list[np.ndarray]] = [[] for _ in LENGTHS]
    summed: list[list[np.ndarray]] = [[] for _ in LENGTHS]
    for rows in make_rows(columns, most_rows, is_decode):
        slot, first, length = (jnp.array(one) for one in zip(*rows, strict=True))
        before = None if is_decode else count_before(slot, first, length)
        where = Rows(slot, first, length, before)
        names = ("query", "key", "value", "decay", *(("beta",) if is_delta else ()))
        memory, out = recur(memory, where, *(pick(name, rows, columns) for name in names))
        conv, sums = convolve(conv, where, pick("x", rows, columns), KERNEL.astype(np.float32))
        assert np.isfinite(out).all()
        for i, (row, _, count) in enumerate(rows):
            if count:
                read[row].append(np.asarray(out[i, :count]))
                summed[row].append(np.asarray(sums[i, :count]))
    for number, sequence in enumerate(sequences()):
        expected, state = by_token(sequence, is_delta)
        np.testing.assert_allclose(np.concatenate(read[number]), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(memory[number], state, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.concatenate(summed[number]), by_channel(sequence), atol=1e-5)
        np.testing.assert_array_equal(conv[number], sequence["x"][1 - W :].astype(np.float32))


def test_states_are_changed_in_place() -> None:
    """Neither a decode step nor a chunk copies the states of all slots."""
    memory = jax.ShapeDtypeStruct((64, H, 64, 64), jnp.float32)
    for count, columns in ((1, 1), (2, 1), (2, 16)):
        ints: Any = jax.ShapeDtypeStruct((count,), jnp.int32)
        keys, values, gates = (
            jax.ShapeDtypeStruct((count, columns, *shape), jnp.float32)
            for shape in ((K, 64), (H, 64), (H,))
        )
        before = ints if columns > 1 else None
        args = memory, Rows(ints, ints, ints, before), keys, keys, values, gates, gates
        compiled = jax.jit(recur_rows, donate_argnums=0).lower(*args).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        assert analysis.temp_size_in_bytes < 4 * 64 * H * 64 * 64 / 4, (count, columns)


@pytest.mark.slow
def test_gradients_go_through_chunks() -> None:
    """Those of a sum over what is read, against differences of it."""
    one = sequences()[1]
    given = {name: jnp.asarray(one[name], jnp.float32)[None] for name in one if name != "x"}
    length = given["value"].shape[1]
    padded = {
        name: jnp.pad(array, ((0, 0), (0, CHUNK - length), *[(0, 0)] * (array.ndim - 2)))
        for name, array in given.items()
    }
    rows = Rows(jnp.zeros(1, int), jnp.zeros(1, int), jnp.full(1, length))

    def read(scale: Any) -> Any:
        arrays = padded | {"key": padded["key"] * scale}
        _, out = recur_rows(jnp.zeros((1, H, D, Z)), rows, *arrays.values())
        return jnp.tanh(out).sum()

    slope = jax.jit(jax.grad(read))(1.0)
    difference = (read(1.01) - read(0.99)) / 0.02
    np.testing.assert_allclose(slope, difference, rtol=1e-2)


def test_little_decay_behind_much_keeps_its_digits() -> None:
    """As with rates of trained state spaces: a thousand in a chunk, and hundredths among them."""
    rng = np.random.default_rng(0)
    sequence = {
        "query": rng.normal(size=(CHUNK, K, D)),
        "key": rng.normal(size=(CHUNK, K, D)),
        "value": rng.normal(size=(CHUNK, H, Z)),
        "decay": -np.exp(rng.uniform(-6, 5, size=(CHUNK, H))),
        "x": np.zeros(CHUNK),
    }
    expected, state = by_token(sequence, is_delta=False)
    where = Rows(*(jnp.array([number]) for number in (0, 0, CHUNK)))
    given = [sequence[name].astype(np.float32)[None] for name in ("query", "key", "value", "decay")]
    memory, out = recur(jnp.zeros((2, H, D, Z)), where, *given)
    np.testing.assert_allclose(out[0], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(memory[0], state, rtol=0, atol=1e-5)
