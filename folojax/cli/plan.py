"""List every program that an engine may compile, and what its memory goes to.

folojax plan
folojax plan --model path/to/model --max-num-seqs 64 --max-model-len 2048
folojax plan --warm-up          compiles them all, and tells what each takes

A program is compiled when it is first needed, and kept in the cache for later runs.
"""

import argparse

from folojax.cli.arguments import add_model_options, engine_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    config = engine_config(args)
    from rich.console import Console  # and JAX: slow, and a mistake is told before

    from folojax.cli.load import load_llm, print_memory

    log = Console(stderr=True)
    llm = load_llm(args, config, log)
    print_memory(llm, log)
    if args.warm_up:
        llm.warm_up()
    Console().print(str(llm.plan()), highlight=False, soft_wrap=True)
    return 0
