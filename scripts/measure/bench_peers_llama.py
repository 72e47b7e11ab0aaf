"""llama.cpp as a peer: continuous batching over its low-level interface.

Prompts come in chunks that share a batch with decoding rows, a sequence that ends frees its slot
for the next request, and tokens are the argmax of the logits. The settings are the quickest of
those tried: nothing else is assumed about what this machine likes.
"""

import ctypes
import dataclasses
import heapq
import importlib.util
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_metrics import Trace, host_peak_memory_gib, serving_metrics
from bench_peers_common import best_order, check_workload, quickest, sample_of
from bench_workloads import BenchRequest, Workload

_CELLS = 256
"""llama.cpp rounds the room of a sequence up to a multiple of this."""


def is_llama_cpp_there() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """How llama.cpp is told to run.

    Attributes:
        has_flash: Fused attention.
        is_unified: One buffer of keys and values for all sequences, of which every row's attention
            reads everything; otherwise each sequence has its own.
        most_tokens: Of one call, prompts and decoding rows together.
        most_at_once: Of those, how many are computed at once.
    """

    has_flash: bool
    is_unified: bool
    most_tokens: int = 512
    most_at_once: int = 512

    def __str__(self) -> str:
        return (
            f"{'flash' if self.has_flash else 'no flash'}, "
            f"{'unified' if self.is_unified else 'split'}, "
            f"{self.most_tokens}/{self.most_at_once}"
        )


_SIZES = [(512, 512), (128, 128), (2048, 2048)]


class LlamaCpp:
    """llama.cpp on a GGUF file.

    Attributes:
        name: In the table.
    """

    def __init__(self, name: str, path: Path, most_rows: int, num_threads: int = 0) -> None:
        """Loads the file.

        Args:
            name: In the table.
            path: A GGUF file.
            most_rows: Sequences at once.
            num_threads: 0: as many as there are cores for this process.

        Raises:
            RuntimeError: llama.cpp cannot load it.
        """
        # Said before the import, which sets a log function of its own up.
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        import llama_cpp

        start = time.perf_counter()
        self.name = name
        self._library = llama_cpp
        self._rows = most_rows
        self._num_threads = num_threads or _num_cores()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._context: _Context | None = None
        self._load_s = time.perf_counter() - start

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """Tries the settings, and keeps the quickest.

        Raises:
            ValueError: the workload has samples or waits that this cannot do.
        """
        check_workload(workload)
        start = time.perf_counter()
        self._rows = min(self._rows, len(workload.requests))
        longest = max(workload.longest, _CELLS)
        sample = sample_of(workload.requests, self._rows)

        def seconds(settings: Settings) -> float:
            self._open(settings, longest)
            self._serve(sample[:1])  # the first call is slower
            return self._serve(sample)[1]

        attention = quickest([Settings(True, False), Settings(False, False)], seconds)
        # Together: which buffers are quicker depends on the sizes of calls.
        caches = [
            Settings(attention.has_flash, is_unified, tokens, at_once)
            for is_unified in (False, True)
            for tokens, at_once in _SIZES
        ]
        best = quickest(caches, seconds)
        self._open(best, longest)
        return {
            "load_s": self._load_s,
            "warm_up_s": time.perf_counter() - start,
            "batch_size": self._rows,
            "settings": str(best),
        }

    def run(self, workload: Workload) -> dict[str, Any]:
        """One timed round."""
        sequences, duration_s = self._serve(best_order(workload.requests))
        metrics = serving_metrics([sequence.trace for sequence in sequences], duration_s)
        return metrics | {"peak_memory_gib": host_peak_memory_gib()}

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The first tokens after each prompt."""
        requests = [BenchRequest(tuple(prompt), num_tokens) for prompt in prompts]
        sequences, _ = self._serve(requests)
        by_prompt = {sequence.request.prompt: sequence.tokens for sequence in sequences}
        return [by_prompt[request.prompt] for request in requests]

    def close(self) -> None:
        """Frees what Python does not."""
        if self._context is not None:
            self._context.close()
        self._library.llama_model_free(self._model)

    def _open(self, settings: Settings, longest: int) -> None:
        if self._context is not None:
            self._context.close()
        self._context = _Context(
            self._library, self._model, settings, self._rows, longest, self._num_threads
        )

    def _serve(self, requests: Iterable[BenchRequest]) -> tuple[list["_Sequence"], float]:
        """Runs requests, which come in the order of their arrival, to their last token."""
        context = self._context
        assert context is not None
        waiting, ended = deque(requests), []
        running: dict[int, _Sequence] = {}
        free = list(range(self._rows))
        start = now = time.perf_counter()
        while waiting or running:
            while waiting and free and waiting[0].arrival_s <= now - start:
                # The lowest slot: with buffers apart, rows without a gap between them are one call.
                running[heapq.heappop(free)] = _Sequence.of(waiting.popleft(), start)
            if not running:
                time.sleep(max(0.0, start + waiting[0].arrival_s - time.perf_counter()))
                now = time.perf_counter()
                continue
            in_order = dict(sorted(running.items()))
            slots = context.step(in_order)
            now = time.perf_counter()
            for slot in slots:
                sequence = running[slot]
                sequence.trace.token_times_s[0].append(now)
                if len(sequence.tokens) == sequence.request.output_len:
                    context.forget(slot)
                    context.text(sequence.tokens)
                    sequence.trace.finish_s = time.perf_counter()
                    heapq.heappush(free, slot)
                    ended.append(running.pop(slot))
        return ended, time.perf_counter() - start


@dataclasses.dataclass
class _Sequence:
    """A request in a slot; `num_stored` of its tokens are in the cache."""

    request: BenchRequest
    trace: Trace
    tokens: list[int]
    num_stored: int = 0

    @classmethod
    def of(cls, request: BenchRequest, start: float) -> "_Sequence":
        trace = Trace(start + request.arrival_s, len(request.prompt), request.label, [[]])
        return cls(request, trace, [])


class _Context:
    """A cache of keys and values, and the arrays of a batch."""

    def __init__(
        self,
        library: Any,
        model: Any,
        settings: Settings,
        num_slots: int,
        longest: int,
        num_threads: int,
    ) -> None:
        self._library = library
        params = library.llama_context_default_params()
        params.n_seq_max = num_slots
        params.n_ctx = num_slots * -(-longest // _CELLS) * _CELLS
        params.n_batch = max(settings.most_tokens, num_slots)
        params.n_ubatch = max(settings.most_at_once, num_slots)
        params.n_threads = params.n_threads_batch = num_threads
        params.kv_unified = settings.is_unified
        params.flash_attn_type = (
            library.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if settings.has_flash
            else library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.no_perf = True
        self._context = library.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {num_slots} sequences of {longest}")
        self._memory = library.llama_get_memory(self._context)
        self._vocab = library.llama_model_get_vocab(model)
        self._num_tokens = library.llama_vocab_n_tokens(self._vocab)
        self._most_tokens = params.n_batch
        # A batch is of pointers: these arrays are what they point to.
        self._slots = np.arange(num_slots, dtype=np.int32)
        self._token, self._position = (np.zeros(self._most_tokens, np.int32) for _ in range(2))
        self._num_ids = np.ones(self._most_tokens, np.int32)
        self._slot_address = np.zeros(self._most_tokens, np.uintp)
        self._is_wanted = np.zeros(self._most_tokens, np.int8)
        self._batch = library.llama_batch(
            0,
            _pointer(self._token, ctypes.c_int32),
            None,
            _pointer(self._position, ctypes.c_int32),
            _pointer(self._num_ids, ctypes.c_int32),
            _pointer(self._slot_address, ctypes.POINTER(ctypes.c_int32)),
            _pointer(self._is_wanted, ctypes.c_int8),
        )

    def step(self, sequences: dict[int, _Sequence]) -> list[int]:
        """Computes the next token of every row, and as much of prompts as there is room for.

        Args:
            sequences: By slot.

        Returns:
            The slots that have got a token.
        """
        # Rows that decode come first, so that prompts never keep them waiting.
        rows = {slot: one for slot, one in sequences.items() if one.tokens}
        tokens = [sequence.tokens[-1] for sequence in rows.values()]
        positions = [sequence.num_stored for sequence in rows.values()]
        slots, wanted = list(rows), [1] * len(rows)
        for sequence in rows.values():
            sequence.num_stored += 1
        for slot, sequence in sequences.items():
            room = self._most_tokens - len(tokens)
            if sequence.tokens or not room:
                continue
            first, prompt = sequence.num_stored, sequence.request.prompt
            chunk = prompt[first : first + room]
            sequence.num_stored += len(chunk)
            tokens += chunk
            positions += range(first, sequence.num_stored)
            slots += [slot] * len(chunk)
            wanted += [0] * (len(chunk) - 1) + [int(sequence.num_stored == len(prompt))]
        chosen = self._decode(tokens, positions, slots, wanted)
        got = list(itertools.compress(slots, wanted))
        for slot, token in zip(got, chosen, strict=True):
            sequences[slot].tokens.append(token)
        return got

    def forget(self, slot: int) -> None:
        """Empties a slot."""
        self._library.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def text(self, tokens: Sequence[int]) -> str:
        """What they say."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        buffer = ctypes.create_string_buffer(64 * len(tokens))
        size = self._library.llama_detokenize(
            self._vocab, ids, len(tokens), buffer, len(buffer), False, True
        )
        return buffer.raw[: max(size, 0)].decode(errors="replace")

    def close(self) -> None:
        """Frees it."""
        self._library.llama_free(self._context)

    def _decode(
        self, tokens: list[int], positions: list[int], slots: list[int], wanted: list[int]
    ) -> list[int]:
        """The likeliest token after each one that is wanted."""
        count = len(tokens)
        self._token[:count] = tokens
        self._position[:count] = positions
        self._slot_address[:count] = self._slots.ctypes.data + 4 * np.asarray(slots)
        self._is_wanted[:count] = wanted
        self._batch.n_tokens = count
        status = self._library.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {count} tokens")
        if not any(wanted):
            return []
        shape = (sum(wanted), self._num_tokens)
        logits = np.ctypeslib.as_array(self._library.llama_get_logits(self._context), shape)
        return logits.argmax(axis=1).tolist()


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
