"""A stand-in for llama-cpp-python's low-level interface: sequences in slots, and a rule for tokens.

The next token is the sum of all tokens of a sequence, each times its position plus one, modulo the
vocabulary: it is only right if every token is in its sequence's cache, once and in its place.
"""

import ctypes
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

NUM_TOKENS = 50

LLAMA_FLASH_ATTN_TYPE_ENABLED, LLAMA_FLASH_ATTN_TYPE_DISABLED = 1, 0


def next_token(tokens: Sequence[int]) -> int:
    """What follows."""
    return sum(token * (place + 1) for place, token in enumerate(tokens)) % NUM_TOKENS


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens after a prompt."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class llama_batch(ctypes.Structure):  # noqa: N801 (the library's name)
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Context:
    """The caches of all slots, and what was decoded last.

    Attributes:
        params: As given.
        cells: Tokens by slot.
        sizes: Tokens and wanted logits of each call.
    """

    made: list["Context"] = []  # noqa: RUF012 (a record of the whole process, for tests)

    def __init__(self, params: Any) -> None:
        self.params = params
        self.cells: dict[int, list[int]] = {}
        self.sizes: list[tuple[int, int]] = []
        self.logits = np.zeros((0, NUM_TOKENS), np.float32)
        self.is_free = False
        self.made.append(self)


def llama_backend_init() -> None: ...


def llama_model_default_params() -> Any:
    return SimpleNamespace()


def llama_model_load_from_file(path: bytes, params: Any) -> Any:
    return None if b"missing" in path else "model"


def llama_model_free(model: Any) -> None: ...


def llama_model_get_vocab(model: Any) -> Any:
    return "vocab"


def llama_vocab_n_tokens(vocab: Any) -> int:
    return NUM_TOKENS


def llama_context_default_params() -> Any:
    return SimpleNamespace()


def llama_init_from_model(model: Any, params: Any) -> Context:
    return Context(params)


def llama_free(context: Context) -> None:
    context.is_free = True


def llama_get_memory(context: Context) -> Context:
    return context


def llama_memory_seq_rm(memory: Context, slot: int, start: int, stop: int) -> bool:
    assert (start, stop) == (-1, -1)
    del memory.cells[slot]
    return True


def llama_decode(context: Context, batch: llama_batch) -> int:
    assert not context.is_free
    assert 0 < batch.n_tokens <= context.params.n_batch
    rows = []
    for place in range(batch.n_tokens):
        assert batch.n_seq_id[place] == 1
        slot = batch.seq_id[place][0]
        assert 0 <= slot < context.params.n_seq_max
        cells = context.cells.setdefault(slot, [])
        assert batch.pos[place] == len(cells)
        cells.append(batch.token[place])
        if batch.logits[place]:
            rows.append(np.eye(NUM_TOKENS, dtype=np.float32)[next_token(cells)])
    assert sum(map(len, context.cells.values())) <= context.params.n_ctx
    context.sizes.append((batch.n_tokens, len(rows)))
    context.logits = np.array(rows, np.float32)
    return 0


def llama_get_logits(context: Context) -> Any:
    return context.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def llama_detokenize(
    vocab: Any, tokens: Any, count: int, text: Any, size: int, remove: bool, unparse: bool
) -> int:
    text.value = bytes(65 + token % 26 for token in tokens)
    return count
