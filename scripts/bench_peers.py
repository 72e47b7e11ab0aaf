"""Other engines on the same weights and the same prompts. Each gets its best: see the classes."""

import dataclasses
import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_metrics import Trace, host_peak_memory_gib, serving_metrics
from bench_workloads import BenchRequest, Workload


def is_transformers_there() -> bool:
    """Whether transformers can run models: it needs PyTorch."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


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
        self._sizes = _halves(most_rows)
        self._rows = most_rows
        self._load_s = time.perf_counter() - start

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """Tries the batch sizes, and keeps the best.

        A try is as many requests as the largest batch takes, with a quarter of their output.

        Raises:
            ValueError: the workload is not a static one.
        """
        for request in workload.requests:
            if request.arrival_s or request.waits_for_tokens or request.num_samples > 1:
                raise ValueError(
                    f"{workload.name}: static batches need one sample a request, and all requests "
                    "at once"
                )
        start = time.perf_counter()
        sizes = sorted({min(size, len(workload.requests)) for size in self._sizes})
        self._generate(workload.requests[:1])  # the first call is slower
        sample = [
            dataclasses.replace(request, output_len=max(1, request.output_len // 4))
            for request in workload.requests[: max(sizes)]
        ]
        durations = {size: self._run(sample, size)[1] for size in sizes} if len(sizes) > 1 else {}
        self._rows = min(durations, key=lambda size: durations[size]) if durations else sizes[0]
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

    def close(self) -> None:
        """Nothing is left to be given back."""

    def _run(self, requests: Sequence[BenchRequest], rows: int) -> tuple[list[Trace], float]:
        longest_first = sorted(requests, key=lambda request: -request.output_len)
        traces = []
        start = time.perf_counter()
        for batch in _batches(longest_first, rows):
            self._generate(batch)
            now = time.perf_counter()
            for request in batch:
                times = [[now] * request.output_len]
                traces.append(Trace(start, len(request.prompt), request.label, times, now))
        return traces, time.perf_counter() - start

    def _generate(self, batch: Sequence[BenchRequest]) -> list[str]:
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
        return self._tokenizer.batch_decode(
            [tokens[: request.output_len] for tokens, request in zip(new, batch, strict=True)],
            skip_special_tokens=True,
        )


def _batches(requests: Sequence[BenchRequest], rows: int) -> Iterator[Sequence[BenchRequest]]:
    for start in range(0, len(requests), rows):
        yield requests[start : start + rows]


def _halves(most: int) -> list[int]:
    """`most`, its half and its quarter."""
    return sorted({most, max(1, most // 2), max(1, most // 4)})
