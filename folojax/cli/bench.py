"""Measure how fast a model generates on this machine.

folojax bench
folojax bench --num-prompts 1 --input-len 512 --max-tokens 64
folojax bench --prompts-file prompts.txt --max-tokens 64 --no-ignore-eos
folojax bench --model path/to/model --max-num-seqs 8 --temperature 0.8 --json out.json

All requests are there from the start, --max-num-seqs of them run at once. Prompts are random ids
unless texts are given, and every sample goes on to --max-tokens. A first run compiles and is not
counted; of the others medians are printed, and the least and the most. Other load on the machine
shows: compare what was measured by turns.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from folojax.cli.arguments import (
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    check_json_path,
    load_llm,
    read_prompts,
    sampling_params,
)
from folojax.requests.outputs import batch_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_model_options(parser)
    group = add_prompt_options(parser, "random ids, 32 times")
    group.add_argument(
        "--input-len", type=int, metavar="N", help="tokens of a random prompt; default: 128"
    )
    defaults = {"temperature": 0.0, "max_tokens": 128, "ignore_eos": True}
    add_sampling_options(parser, defaults)
    add = parser.add_argument_group("measuring").add_argument
    add("--rounds", type=int, default=3, metavar="N", help="runs that are counted; default: 3")
    add("--json", type=Path, metavar="FILE", help="write the figures of each round to this file")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    texts, params = read_prompts(args), sampling_params(args)
    if texts and args.input_len is not None:
        raise ValueError("--input-len has no meaning beside prompts")
    input_len = 128 if args.input_len is None else args.input_len
    if min(args.rounds, input_len) < 1:
        raise ValueError(f"--rounds is {args.rounds} and --input-len {input_len}; at least 1 each")
    check_json_path(args.json)
    console, log = Console(), Console(stderr=True)
    llm = load_llm(args, log)
    count = args.num_prompts or len(texts) or 32
    if texts:
        prompts: list[Any] = [texts[i % len(texts)] for i in range(count)]
    else:
        # The upper half may have ids that are no token of the tokenizer.
        ids = np.random.default_rng(0).integers(
            llm.engine.runner.model.config.vocab_size // 2, size=(count, input_len)
        )
        prompts = ids.tolist()
    rounds = []
    for number in range(args.rounds + 1):
        llm.reset_prefix_cache()
        name = f"Round {number}" if number else "A first run, which compiles"
        with log.status(name):
            figures = _figures(llm.generate(prompts, params, use_tqdm=False))
        if number:
            rounds.append(figures)
    _print(console, f"{count} requests, {args.rounds} rounds", rounds)
    if args.json is not None:
        args.json.write_text(json.dumps(rounds, indent=2) + "\n")
    return 0


def _figures(outputs: list[Any]) -> dict[str, float]:
    """What a round is told by, in the order of the table."""
    batch = batch_metrics(outputs)
    return {
        "output tokens per second": batch.output_throughput,
        "prompt and output tokens per second": (
            batch.output_throughput + batch.num_prompt_tokens / max(batch.duration_s, 1e-9)
        ),
        "requests per second": batch.request_throughput,
        "mean time to first token, ms": 1e3 * (batch.mean_ttft_s or 0.0),
        "mean time per token after it, ms": 1e3 * (batch.mean_tpot_s or 0.0),
    }


def _print(console: Console, title: str, rounds: list[dict[str, float]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("median", "least", "most"):
        table.add_column(column, justify="right")
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        cells = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:,.1f}" for value in cells))
    console.print(table)
