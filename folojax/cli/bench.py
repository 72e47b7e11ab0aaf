"""Measure how fast a model generates on this machine.

folojax bench
folojax bench --num-prompts 1 --input-len 512 --max-tokens 64
folojax bench --prompts-file prompts.txt --max-tokens 64 --no-ignore-eos
folojax bench --model path/to/model --max-num-seqs 8 --temperature 0.8 --json out.json

All requests are there from the start, --max-num-seqs of them run at once. Prompts are random ids
unless texts are given, and every sample goes on to --max-tokens. A first run compiles and is not
counted. Other load on the machine shows: compare what was measured by turns.
"""

import argparse
import json
from pathlib import Path

from folojax.cli.arguments import (
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    check_json_path,
    engine_config,
    read_prompts,
    sampling_params,
)


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
    texts, params, config = read_prompts(args), sampling_params(args), engine_config(args)
    if texts and args.input_len is not None:
        raise ValueError("--input-len has no meaning beside prompts")
    input_len = 128 if args.input_len is None else args.input_len
    if min(args.rounds, input_len) < 1:
        raise ValueError(f"--rounds is {args.rounds} and --input-len {input_len}; at least 1 each")
    check_json_path(args.json)
    import numpy as np  # and JAX: slow, and a mistake is told before
    from rich.console import Console

    from folojax.cli.load import load_llm, print_memory
    from folojax.cli.show import as_json, print_metrics
    from folojax.requests.outputs import batch_metrics

    log = Console(stderr=True)
    llm = load_llm(args, config, log)
    print_memory(llm, log)
    # The last ids of a model's vocabulary may be padding, and no tokens.
    num_ids = llm.model_config.vocab_size // 2
    shape = (args.num_prompts or 32, input_len)
    prompts = texts or np.random.default_rng(0).integers(num_ids, size=shape).tolist()
    with log.status("A first run, which compiles"):
        llm.generate(prompts, params, use_tqdm=False)
    runs = {}
    for number in range(1, args.rounds + 1):
        llm.reset_prefix_cache()
        with log.status(f"Round {number}"):
            outputs = llm.generate(prompts, params, use_tqdm=False)
        runs[f"round {number}"] = batch_metrics(outputs)
    print_metrics(Console(), runs)
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(runs), indent=2) + "\n")
    return 0
