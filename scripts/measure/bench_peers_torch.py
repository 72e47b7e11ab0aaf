"""transformers as a peer: `generate` in static batches, and its own continuous batching."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_metrics import Trace, host_peak_memory_gib, serving_metrics
from bench_peers_common import best_order, check_workload, halves, quickest, sample_of
from bench_workloads import BenchRequest, Workload

_PAGE_SIZE = 256
_MOST_TOKENS = 512
"""Of a step, prompts and decoding rows together."""


def _load(directory: Path, dtype: str) -> tuple[Any, Any, float]:
    """Model and tokenizer of a directory in the Hugging Face layout, and the seconds it took."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return model.eval().to(device), tokenizer, time.perf_counter() - start


class Transformers:
    """`generate` of Hugging Face transformers in static batches, greedily.

    It is told every output length beforehand: batches are of requests with similar ones, the
    longest first, and end with their last useful token. Only the tokens that were asked for count.
    The batch size is the best one of those tried.

    Attributes:
        name: In the table.
    """

    def __init__(self, directory: Path, dtype: str, most_rows: int) -> None:
        """Loads the model; `directory` is in the Hugging Face layout."""
        self._model, self._tokenizer, self._load_s = _load(directory, dtype)
        # What is not said in a call, generate takes from here.
        self._model.generation_config.eos_token_id = None
        self.name = f"transformers {dtype}"
        self._sizes = halves(most_rows)
        self._rows = most_rows

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """Tries the batch sizes, and keeps the best.

        A try is as many requests as the largest batch takes, with a quarter of their output.

        Raises:
            ValueError: the workload is not a static one.
        """
        check_workload(workload, needs_all_at_once=True)
        start = time.perf_counter()
        sizes = sorted({min(size, len(workload.requests)) for size in self._sizes})
        self._generate(workload.requests[:1])  # the first call is slower
        sample = sample_of(workload.requests, max(sizes))
        self._rows = quickest(sizes, lambda size: self._run(sample, size)[1])
        return {
            "load_s": self._load_s,
            "warm_up_s": time.perf_counter() - start,
            "batch_size": self._rows,
        }

    def run(self, workload: Workload) -> dict[str, Any]:
        """One timed round; a request's tokens are there when its batch is, so it has no itl."""
        traces, duration_s = self._run(workload.requests, self._rows)
        metrics = serving_metrics(traces, duration_s)
        for key in metrics:
            if key.endswith(("ttft_ms", "tpot_ms", "itl_ms")):
                metrics[key] = None
        return metrics | {"peak_memory_gib": host_peak_memory_gib()}

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The first tokens after each prompt."""
        return self._tokens([BenchRequest(tuple(prompt), num_tokens) for prompt in prompts])

    def close(self) -> None:
        """Nothing is left to be given back."""

    def _run(self, requests: Sequence[BenchRequest], rows: int) -> tuple[list[Trace], float]:
        traces = []
        start = time.perf_counter()
        for batch in _batches(best_order(requests), rows):
            self._generate(batch)
            now = time.perf_counter()
            for request in batch:
                times = [[now] * request.output_len]
                traces.append(Trace(start, len(request.prompt), request.label, times, now))
        return traces, time.perf_counter() - start

    def _generate(self, batch: Sequence[BenchRequest]) -> list[str]:
        return self._tokenizer.batch_decode(self._tokens(batch), skip_special_tokens=True)

    def _tokens(self, batch: Sequence[BenchRequest]) -> list[list[int]]:
        import torch

        width = max(len(request.prompt) for request in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        with torch.inference_mode():
            out = self._model.generate(
                ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                do_sample=False,
                max_new_tokens=batch[0].output_len,
                pad_token_id=0,
            )
        new = out[:, width:].tolist()
        return [tokens[: request.output_len] for tokens, request in zip(new, batch, strict=True)]


def _batches(requests: Sequence[BenchRequest], rows: int) -> Iterator[Sequence[BenchRequest]]:
    for start in range(0, len(requests), rows):
        yield requests[start : start + rows]


class GenerateBatch:
    """The manager that `generate_batch` makes, with a length of its own for every request.

    `generate_batch` itself takes one length for all. The number of requests at once is the best
    one of those tried.

    Attributes:
        name: In the table.
    """

    def __init__(self, directory: Path, dtype: str, most_rows: int) -> None:
        """Loads the model; `directory` is in the Hugging Face layout."""
        self._model, self._tokenizer, self._load_s = _load(directory, dtype)
        self.name = f"generate_batch {dtype}"
        self._most_rows = most_rows
        self._manager: Any = None

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
