"""What the host and a program that is running tell each other, through memory that both can read.

What a grammar allows depends on the token before, which the device samples at the end of one
program, and which decides what it may sample at the end of the next. So that the host need not wait
in between, that program is called as soon as any other: it computes its logits, waits for the masks
of its turn, and tells the tokens of that turn at once, before anything is copied.

    device   logits n ── masks n? ─> sample n ─┬─> logits n + 1 ── masks n + 1? ─> sample n + 1
                             ^                 v                         ^
    host          masks n ───┘             tokens n ─> masks n + 1 ──────┘

The memory is a box (`mail.cc`); which one, and whose turn it is, are inputs of the program.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, UInt32

from folojax.models.machine import compiler as native
from folojax.models.machine import cuda
from folojax.sampling.rows import SampleInputs, StepOutput

_SOURCE = Path(__file__).with_suffix(".cc")
_RECEIVE, _SEND = "folojax_receive_masks", "folojax_send_tokens"


class Box:
    """Memory for the masks and the tokens of B rows, one turn after the other.

    Attributes:
        masks: What each row may sample next, 32 tokens a word, as `allow_only` takes it.
    """

    def __init__(self, num_rows: int, num_words: int, gpu: int | None) -> None:
        """Allocates it, for good.

        Args:
            num_rows: B.
            num_words: Of a row's mask.
            gpu: Number of a GPU that is to read it; None: programs on CPU are.

        Raises:
            MemoryError: there is no room.
        """
        places, why = (ctypes.c_uint64 * 3)(), ctypes.create_string_buffer(256)
        sizes = ctypes.c_int64(num_rows), ctypes.c_int64(num_words)
        device = -1 if gpu is None else gpu
        if _library().make_box(*sizes, device, places, why, ctypes.c_size_t(len(why))):
            raise MemoryError(f"no memory to tell programs masks: {why.value.decode()}")
        self._address, tokens_at, masks_at = places
        self._turn = 0  # the latest; one that has been is never begun again
        self._tokens = _array(tokens_at, (num_rows,), ctypes.c_int32)
        self.masks: UInt32[np.ndarray, "B _"] = _array(
            masks_at, (num_rows, num_words), ctypes.c_uint32
        )

    def next_turn(self, num_rows: int) -> tuple[int, Int32[np.ndarray, "N 3"]]:
        """The next number, and the `CallInputs.mail` of a program of N rows whose turn it is."""
        self._turn = turn = (self._turn + 1) % 2**32
        line = np.array([turn, self._address % 2**32, self._address >> 32], np.uint32)
        return turn, np.tile(line.view(np.int32), (num_rows, 1))

    def tell(self, turn: int) -> None:
        """Says that the masks of a turn are there; all turns before may go on, too."""
        _library().tell_masks(ctypes.c_uint64(self._address), ctypes.c_uint32(turn))

    @property
    def is_idle(self) -> bool:
        """Whether the program of the latest turn has told its tokens: it reads nothing any more."""
        return self.await_tokens(self._turn, 0.0) is not None

    def await_tokens(self, turn: int, most_seconds: float) -> Int32[np.ndarray, " B"] | None:
        """The tokens of a turn, -1 for a row without one; None if they take longer."""
        args = ctypes.c_uint64(self._address), ctypes.c_uint32(turn)
        is_there = _library().await_tokens(*args, ctypes.c_double(most_seconds))
        return self._tokens.copy() if is_there else None


def no_mail(num_rows: int) -> Int32[np.ndarray, "N 3"]:
    """The `CallInputs.mail` of a program that waits for nobody, and may sample everything."""
    return np.zeros((num_rows, 3), np.int32)


@functools.cache
def open_mail(gpus: Sequence[int] | None) -> str | None:
    """Lets programs be told masks while they run; None, or why that cannot be.

    Args:
        gpus: Numbers of the GPUs that these programs run on, in a tuple; None: they run on CPU.
    """
    ending, platform = ("", "cpu") if gpus is None else ("Cuda", "CUDA")
    for name, handler in ((_RECEIVE, "ReceiveMasks"), (_SEND, "SendTokens")):
        problem = native.register(_SOURCE, name, handler + ending, platform=platform)
        if problem is not None:
            return problem
    nvrtc = cuda.find_nvrtc()
    if gpus is not None and nvrtc is None:
        return cuda.WITHOUT_NVRTC
    why = ctypes.create_string_buffer(1024)
    for gpu in gpus or ():
        if _library().open_device(gpu, str(nvrtc).encode(), why, ctypes.c_size_t(len(why))):
            return why.value.decode()
    return None


def receive(
    sampling: SampleInputs, mail: Int[Array, "B 3"] | None, logits: Any, vocab_size: int
) -> SampleInputs:
    """The inputs of a sampler with the masks of its turn; inside of a jitted function.

    Args:
        sampling: Without them.
        mail: Of `CallInputs`; None: they are there, or there are none.
        logits: Or what these are made of: it is there before anything is waited for.
        vocab_size: V.
    """
    if mail is None:
        return sampling
    shape: Any = jax.ShapeDtypeStruct((mail.shape[0], -(-vocab_size // 32)), jnp.uint32)
    mask: Any = jax.ffi.ffi_call(_RECEIVE, shape)(mail, jax.tree.leaves(logits)[0])
    return sampling._replace(mask=mask)


def send(out: StepOutput, mail: Int[Array, "B 3"] | None) -> StepOutput:
    """The same report, whose tokens the host has been told; inside of a jitted function."""
    if mail is None:
        return out
    shape: Any = jax.ShapeDtypeStruct(out.tokens.shape, jnp.int32)
    tokens: Any = jax.ffi.ffi_call(_SEND, shape)(mail, out.tokens, out.is_valid)
    return out._replace(tokens=tokens)


@functools.cache
def _library() -> ctypes.CDLL:
    return native.load(_SOURCE)


def _array(address: int, shape: tuple[int, ...], kind: Any) -> Any:
    size = int(np.prod(shape))
    return np.ctypeslib.as_array((kind * size).from_address(address)).reshape(shape)
