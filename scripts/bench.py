"""Measure folojax on this machine. Everything is compiled before anything is timed.

python scripts/bench.py sampling             what sampling parameters cost, against greedy

Runs are interleaved, and figures are medians with their spread: the machine may be shared, so only
ratios within one run mean anything.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Output tokens per second of one batch under each kind of sampling parameters."""
    from folojax import LLM, SamplingParams, batch_metrics

    common: dict[str, Any] = {"max_tokens": args.output_len, "ignore_eos": True}
    top_p: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
    settings = {
        "greedy": {"temperature": 0.0},
        "temperature": {"temperature": 0.8},
        "temperature, top-p": top_p,
        "temperature 1, top-p": {"temperature": 1.0, "top_p": 0.95},
        "temperature, top-k, min-p": {"temperature": 0.8, "top_k": 50, "min_p": 0.02},
        "penalties, top-p": top_p
        | {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2},
        "greedy, top-20 logprobs": {"temperature": 0.0, "logprobs": 20},
    }
    llm = LLM(max_num_seqs=args.num_requests, max_model_len=args.input_len + args.output_len)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1000, 40000, (args.num_requests, args.input_len)).tolist()
    rates: dict[str, list[float]] = {name: [] for name in settings}
    for round_ in range(args.rounds + 1):
        for name, fields in settings.items():
            params = [
                SamplingParams(
                    seed=None if "greedy" in name else 100 * round_ + i, **common, **fields
                )
                for i in range(args.num_requests)
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


def _print(title: str, results: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "output tokens/s", "lowest", "highest", "of greedy"):
        table.add_column(column, justify="left" if not column else "right")
    for name, r in results.items():
        cells = (f"{r[key]:.1f}" for key in ("output_throughput", "lowest", "highest"))
        table.add_row(name, *cells, f"{r['ratio_to_greedy']:.2f}")
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=["sampling"])
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args(argv)
    results = sampling(args)
    _print(f"{args.num_requests} requests, {args.input_len} in, {args.output_len} out", results)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
