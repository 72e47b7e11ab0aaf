"""From options to an engine: from here on JAX is needed."""

import argparse

from rich.console import Console

from folojax.config import EngineConfig
from folojax.llm import LLM


def load_llm(args: argparse.Namespace, config: EngineConfig, log: Console) -> LLM:
    """The engine that the options describe."""
    with log.status("Loading the model"):
        return LLM(args.model, dtype=args.dtype, revision=args.revision, config=config)


def print_memory(llm: LLM, log: Console) -> None:
    """Prints what weights, pages and temporaries take."""
    log.print(str(llm.memory_plan), style="dim", highlight=False, soft_wrap=True)
