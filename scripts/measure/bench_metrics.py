"""From the times of tokens to figures, under the names that vLLM's benchmarks give them.

ttft is the time to the first token, tpot a sample's mean time per token after its first, itl the
time between two tokens of a sample, e2el from arrival to end. Times end in _ms.
"""

import dataclasses
import functools
import itertools
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)


@dataclasses.dataclass
class Trace:
    """What became of a request.

    Attributes:
        arrival_s: When it was due; all times are on one clock.
        num_prompt_tokens: Its input.
        label: As in `BenchRequest`.
        token_times_s: Of each sample, when each of its tokens was there.
        finish_s: When it ended.
        has_failed: Whether it ended by an error; its tokens count for nothing.
    """

    arrival_s: float
    num_prompt_tokens: int
    label: str
    token_times_s: list[list[float]]
    finish_s: float = 0.0
    has_failed: bool = False

    @property
    def num_output_tokens(self) -> int:
        """Of all samples."""
        return sum(len(times) for times in self.token_times_s)


def serving_metrics(traces: Sequence[Trace], duration_s: float) -> dict[str, Any]:
    """Throughput and latencies of requests that were served together.

    Labels, where there are any, get latencies of their own under "by_label".
    """
    every, traces = traces, [trace for trace in traces if not trace.has_failed]
    num_prompt_tokens = sum(trace.num_prompt_tokens for trace in traces)
    num_output_tokens = sum(trace.num_output_tokens for trace in traces)
    metrics: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(traces),
        "failed": len(every) - len(traces),
        "total_input_tokens": num_prompt_tokens,
        "total_output_tokens": num_output_tokens,
        "request_throughput": len(traces) / duration_s,
        "output_throughput": num_output_tokens / duration_s,
        "total_token_throughput": (num_prompt_tokens + num_output_tokens) / duration_s,
        "max_output_tokens_per_s": _most_tokens_in_a_second(traces),
        "max_concurrent_requests": _most_at_once(traces),
        **latencies(traces),
    }
    labels = sorted({trace.label for trace in traces} - {""})
    if labels:
        metrics["by_label"] = {
            label: latencies([trace for trace in traces if trace.label == label])
            for label in labels
        }
    return metrics


def _most_tokens_in_a_second(traces: Sequence[Trace]) -> int:
    """Of the whole seconds since the first arrival, the one with the most output tokens."""
    start_s = min((trace.arrival_s for trace in traces), default=0.0)
    times_s = [time_s for trace in traces for times in trace.token_times_s for time_s in times]
    seconds = (np.asarray(times_s) - start_s).astype(int)
    return int(np.bincount(seconds).max(initial=0))


def _most_at_once(traces: Sequence[Trace]) -> int:
    """Most requests that had arrived and had not ended; one that ends leaves room at once."""
    events = [(trace.arrival_s, 1) for trace in traces]
    events += [(trace.finish_s, -1) for trace in traces]
    return max(itertools.accumulate(change for _, change in sorted(events)), default=0)


def latencies(traces: Sequence[Trace]) -> dict[str, float | None]:
    """Mean, median, deviation, percentiles and worst of each latency; None where there is none."""
    samples = [times for trace in traces for times in trace.token_times_s]
    gaps = [np.diff(times) for times in samples]
    values = {
        "ttft": [min(t[0] for t in trace.token_times_s) - trace.arrival_s for trace in traces],
        "tpot": [gap.mean() for gap in gaps if gap.size],
        "itl": np.concatenate(gaps) if gaps else [],
        "e2el": [trace.finish_s - trace.arrival_s for trace in traces],
    }
    return {key: value for name, each in values.items() for key, value in _spread(name, each)}


def _spread(name: str, seconds: Any) -> list[tuple[str, float | None]]:
    ms = 1e3 * np.asarray(seconds, float)
    figures: dict[str, Callable[[Any], Any]] = {
        f"mean_{name}_ms": np.mean,
        f"median_{name}_ms": np.median,
        f"std_{name}_ms": np.std,
        **{f"p{q}_{name}_ms": functools.partial(np.percentile, q=q) for q in PERCENTILES},
        f"max_{name}_ms": np.max,
    }
    return [(key, float(figure(ms)) if ms.size else None) for key, figure in figures.items()]


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number over rounds, field by field, and the spread of the throughput."""
    result = _medians(rounds)
    throughputs = [one["output_throughput"] for one in rounds if "output_throughput" in one]
    if throughputs:
        result["min_output_throughput"] = min(throughputs)
        result["max_output_throughput"] = max(throughputs)
    result["num_rounds"] = len(rounds)
    return result


def _medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, first in rounds[0].items():
        values = [one[key] for one in rounds]
        if isinstance(first, dict):
            result[key] = _medians(values)
        elif all(isinstance(value, int | float) for value in values):
            result[key] = statistics.median(values)
        else:
            result[key] = first
    return result


def host_peak_memory_gib() -> float:
    """The most host memory that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
