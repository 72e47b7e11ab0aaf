"""A program that waits for masks, and tells the tokens that it has sampled with them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.machine import compiler, cuda
from folojax.sampling.rows import SampleInputs, StepOutput, greedy_rows
from folojax.steps import mail
from folojax.steps.mail import Box, no_mail, open_mail, receive, send

ROWS, VOCAB = 3, 100


@pytest.fixture(autouse=True, scope="module")
def skip_without_compiler() -> None:
    """Programs wait by a function in C++."""
    problem = open_mail(None)
    if problem is not None:
        pytest.skip(problem)


@jax.jit
def program(lines: Any, logits: Any) -> Any:
    rows = jnp.arange(ROWS)
    given = receive(SampleInputs(rows, rows, greedy_rows(ROWS)), lines, logits, VOCAB)
    assert given.mask is not None
    tokens = given.mask.sum(axis=1).astype(jnp.int32)
    nothing = jnp.zeros((ROWS, 0))
    out = StepOutput(tokens, logits, rows, logits < 1, nothing.astype(jnp.int32), nothing)
    return given.mask, send(out, lines).tokens


def test_masks_come_and_tokens_go() -> None:
    pool = ThreadPoolExecutor(1)
    box = Box(ROWS + 2, -(-VOCAB // 32), None)
    for number in range(3):
        turn, lines = box.next_turn(ROWS)
        # On CPU JAX may run a small program in the thread that calls it.
        found = pool.submit(program, lines, np.array([0, 0, 1], np.float32))
        assert box.await_tokens(turn, 0.01) is None  # the program waits
        box.masks[:] = np.arange(number, number + box.masks.size).reshape(box.masks.shape)
        box.tell(turn)
        tokens = box.await_tokens(turn, 10.0)
        assert tokens is not None
        masks, own = (np.asarray(one) for one in found.result())
        np.testing.assert_array_equal(masks, box.masks[:ROWS])
        np.testing.assert_array_equal(own, masks.sum(axis=1))
        np.testing.assert_array_equal(tokens[:ROWS], [*own[:2], -1])  # the last is not valid


def test_who_waits_goes_on_with_any_later_turn() -> None:
    box = Box(ROWS, -(-VOCAB // 32), None)
    (first, lines), (second, _) = box.next_turn(ROWS), box.next_turn(ROWS)
    assert second > first
    box.tell(second)
    box.tell(first)  # changes nothing
    program(lines, np.zeros(ROWS, np.float32))
    assert box.await_tokens(first, 10.0) is not None
    assert box.await_tokens(second, 0.0) is None


def test_who_tells_tokens_late_takes_none_back() -> None:
    """A program of a state that was given up may run beside those of the next."""
    box = Box(ROWS, -(-VOCAB // 32), None)
    (_, early), (second, lines) = box.next_turn(ROWS), box.next_turn(ROWS)
    box.tell(second)
    assert not box.is_idle
    program(lines, np.zeros(ROWS, np.float32))
    program(early, np.zeros(ROWS, np.float32))
    assert box.await_tokens(second, 10.0) is not None
    assert box.is_idle


def test_turns_of_a_box_follow_each_other_whatever_others_do() -> None:
    """They are compared as if the later one were less than half of them away."""
    box, other = (Box(ROWS, -(-VOCAB // 32), None) for _ in range(2))
    turns = [box.next_turn(ROWS)[0]]
    for _ in range(5):
        other.next_turn(ROWS)
    turns.append(box.next_turn(ROWS)[0])
    assert turns == [1, 2]


def test_without_a_box_everything_is_allowed() -> None:
    masks, _ = program(no_mail(ROWS), np.zeros(ROWS, np.float32))
    assert (np.asarray(masks) == 0xFFFFFFFF).all()


def test_python_goes_on_while_somebody_waits() -> None:
    box = Box(ROWS, -(-VOCAB // 32), None)
    turn, lines = box.next_turn(ROWS)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(box.await_tokens(turn, 30.0)))
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    box.tell(turn)
    program(lines, np.zeros(ROWS, np.float32))
    thread.join(30)
    assert found[0].tolist() == [0] * ROWS


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "register", lambda *args, **more: "no compiler")
    assert mail.open_mail.__wrapped__(None) == "no compiler"
    monkeypatch.setattr(compiler, "register", lambda *args, **more: None)
    monkeypatch.setattr(cuda, "find_nvrtc", lambda: None)
    assert mail.open_mail.__wrapped__((0,)) == cuda.WITHOUT_NVRTC


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a driver is there")
def test_a_gpu_that_is_not_there_is_told() -> None:
    library = mail._library()
    why = mail.ctypes.create_string_buffer(256)
    size = mail.ctypes.c_size_t(len(why))
    assert library.open_device(0, b"libnvrtc.so", why, size) == 1
    assert b"libcuda" in why.value
