"""What sampling parameters cost, against greedy."""

import statistics
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from folojax import LLM, SamplingParams, batch_metrics

_TOP_P: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}

_SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "temperature, top-p": _TOP_P,
    "temperature 1, top-p": {"temperature": 1.0, "top_p": 0.95},
    "temperature, top-k, min-p": {"temperature": 0.8, "top_k": 50, "min_p": 0.02},
    "penalties, top-p": _TOP_P
    | {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2},
    "greedy, top-20 logprobs": {"temperature": 0.0, "logprobs": 20},
}


def measure_sampling(
    model: str | None, num_requests: int, input_len: int, output_len: int, rounds: int
) -> dict[str, Any]:
    """Output tokens per second of one batch under each kind of sampling parameters."""
    llm = LLM(model, max_num_seqs=num_requests, max_model_len=input_len + output_len)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1000, 40000, (num_requests, input_len)).tolist()
    rates: dict[str, list[float]] = {name: [] for name in _SETTINGS}
    for round_ in range(rounds + 1):
        for name, fields in _SETTINGS.items():
            params = [
                SamplingParams(
                    seed=None if "greedy" in name else 100 * round_ + i,
                    max_tokens=output_len,
                    ignore_eos=True,
                    **fields,
                )
                for i in range(num_requests)
            ]
            outputs = llm.generate(tokens, params, use_tqdm=False)
            if round_:  # the first compiles
                rates[name].append(batch_metrics(outputs).output_throughput)
    greedy = statistics.median(rates["greedy"])
    return {
        name: {
            "output_throughput": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "ratio_to_greedy": statistics.median(values) / greedy,
        }
        for name, values in rates.items()
    }


def print_sampling(console: Console, title: str, results: dict[str, Any]) -> None:
    """The figures as a table."""
    table = Table(title=title, title_justify="left")
    for column in ("", "output tokens/s", "lowest", "highest", "of greedy"):
        table.add_column(column, justify="left" if not column else "right")
    for name, r in results.items():
        cells = (f"{r[key]:.1f}" for key in ("output_throughput", "lowest", "highest"))
        table.add_row(name, *cells, f"{r['ratio_to_greedy']:.2f}")
    console.print(table)
