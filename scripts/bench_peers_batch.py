"""transformers' continuous batching as a peer: what `generate_batch` runs."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench_metrics import Trace, host_peak_memory_gib, serving_metrics
from bench_peers_common import best_order, check_workload, halves, quickest, sample_of
from bench_workloads import BenchRequest, Workload

_PAGE_SIZE = 256
_MOST_TOKENS = 512
"""Of a step, prompts and decoding rows together."""


class GenerateBatch:
    """The manager that `generate_batch` makes, with a length of its own for every request.

    `generate_batch` itself takes one length for all. The number of requests at once is the best
    one of those tried.

    Attributes:
        name: In the table.
    """

    def __init__(self, directory: Path, dtype: str, most_rows: int) -> None:
        """Loads the model; `directory` is in the Hugging Face layout."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        start = time.perf_counter()
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().to(device)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self.name = f"generate_batch {dtype}"
        self._most_rows = most_rows
        self._manager: Any = None
        self._load_s = time.perf_counter() - start

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """Tries numbers of requests at once, and keeps the best.

        Raises:
            ValueError: the workload has samples or waits that this cannot do.
        """
        check_workload(workload)
        start = time.perf_counter()
        sizes = sorted({min(size, len(workload.requests)) for size in halves(self._most_rows)})
        sample = sample_of(workload.requests, max(sizes))

        def seconds(rows: int) -> float:
            self._open(rows, workload.longest)
            self._serve(sample[:1])  # the first call is slower
            return self._serve(sample)[1]

        best = quickest(sizes, seconds)
        self._open(best, workload.longest)
        return {
            "load_s": self._load_s,
            "warm_up_s": time.perf_counter() - start,
            "batch_size": best,
        }

    def run(self, workload: Workload) -> dict[str, Any]:
        """One timed round."""
        ended, duration_s = self._serve(best_order(workload.requests))
        metrics = serving_metrics([trace for _, trace, _ in ended], duration_s)
        return metrics | {"peak_memory_gib": host_peak_memory_gib()}

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The first tokens after each prompt."""
        ended, _ = self._serve([BenchRequest(tuple(prompt), num_tokens) for prompt in prompts])
        return [tokens for _, _, tokens in sorted(ended, key=lambda one: one[0])]

    def close(self) -> None:
        """Ends the thread that generates."""
        if self._manager is not None:
            self._manager.stop(block=True, timeout=5)
            self._manager.destroy()
            self._manager = None

    def _open(self, rows: int, longest: int) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.close()
        config = ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            num_blocks=rows * -(-(longest + 1) // _PAGE_SIZE) + 1,
            max_batch_tokens=max(_MOST_TOKENS, rows),
            max_requests_per_batch=rows,
            # Nothing is to be left from an earlier round.
            allow_block_sharing=False,
        )
        self._manager = self._model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1), config
        )
        self._manager.warmup()
        self._manager.start()

    def _serve(
        self, requests: Iterable[BenchRequest]
    ) -> tuple[list[tuple[int, Trace, list[int]]], float]:
        """Runs requests, which come in the order of their arrival, to their last token.

        Returns:
            Place, trace and tokens of each, and the seconds that all of it took.

        Raises:
            RuntimeError: a request fails, or the manager's thread does.
        """
        waiting = deque(enumerate(requests))
        open_traces: dict[str, Trace] = {}
        ended = []
        start = now = time.perf_counter()
        while waiting or open_traces:
            while waiting and waiting[0][1].arrival_s <= now - start:
                place, request = waiting.popleft()
                arrival = start + request.arrival_s
                open_traces[str(place)] = Trace(
                    arrival, len(request.prompt), request.label, [], arrival
                )
                self._manager.add_request(
                    list(request.prompt),
                    str(place),
                    max_new_tokens=request.output_len,
                    record_timestamps=True,
                    eos_token_id=-1,
                )
            due = start + waiting[0][1].arrival_s - now if waiting else 1.0
            result = self._manager.get_result(timeout=max(due, 1e-3))
            now = time.perf_counter()
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError(f"{self.name}: the thread that generates has ended")
                continue
            if result.error is not None:
                raise RuntimeError(f"{self.name}: {result.error}")
            tokens = result.generated_tokens
            self._tokenizer.decode(tokens, skip_special_tokens=True)
            trace = open_traces.pop(result.request_id)
            trace.token_times_s = [result.timestamps]
            trace.finish_s = now
            ended.append((int(result.request_id), trace, tokens))
        return ended, time.perf_counter() - start
