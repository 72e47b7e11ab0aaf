"""transformers as a peer, in static batches."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_metrics import Trace, host_peak_memory_gib, serving_metrics
from bench_peers_common import best_order, check_workload, halves, quickest, sample_of
from bench_workloads import BenchRequest, Workload


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
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        start = time.perf_counter()
        self._torch = torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        self._model = model.eval().to(device)
        # What is not said in a call, generate takes from here.
        self._model.generation_config.eos_token_id = None
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self.name = f"transformers {dtype}"
        self._sizes = halves(most_rows)
        self._rows = most_rows
        self._load_s = time.perf_counter() - start

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
        torch = self._torch
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
