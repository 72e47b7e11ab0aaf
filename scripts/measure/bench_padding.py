"""How much of what an engine computes is padding, by workload: counted, without a device.

    python scripts/measure/bench_padding.py
    python scripts/measure/bench_padding.py sharegpt --num-running 8

Every plan and every shape is that of a real run in which all requests are there from the start;
only the results are made up, so it takes seconds. (Samples at random arrive and end alike.)
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_counters import EngineCounts
from bench_engine import drive
from bench_stub import make_stub_llm, without_device
from bench_table import print_padding
from bench_workloads import NAMES, Workload, make_workload
from needs import need_for
from rich.console import Console

from folojax.models.files.checkpoint import open_checkpoint
from folojax.text.tokenizer_files import load_tokenizer

DEFAULT = ("uniform", "humaneval", "sharegpt", "group")


def count_padding(workload: Workload, vocab_size: int, **options: Any) -> dict[str, Any]:
    """What `EngineCounts` tells of one run.

    Args:
        workload: Its token ids are below `vocab_size`.
        vocab_size: V.
        **options: Of `LLM`; a limit on lengths that is missing is the workload's, in whole pages.
    """
    longest = -(-workload.longest // 128) * 128
    llm = make_stub_llm(vocab_size, longest, **{"max_model_len": longest} | options)
    before = EngineCounts.of(llm)
    with without_device(llm):
        traces, _ = drive(llm, workload)
    num_outputs = sum(trace.num_output_tokens for trace in traces)
    num_samples = sum(len(trace.token_times_s) for trace in traces)
    assert num_outputs == workload.num_output_tokens, "samples ended early"
    return EngineCounts.of(llm).since(before, num_outputs, num_samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Counts, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "workload", nargs="*", default=DEFAULT, help=f"of {', '.join(NAMES)}; default: {DEFAULT}"
    )
    parser.add_argument("--model", help="whose tokenizer cuts texts; as LLM takes it")
    parser.add_argument("--num-running", type=int, default=32, help="most requests at once")
    parser.add_argument("--scale", type=float, default=1.0, help="of every length")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the counts to this file")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.workload) - set(NAMES))
    if unknown:
        parser.error(f"there are no workloads {unknown}; there are {', '.join(NAMES)}")
    need_for(args.workload)
    checkpoint = open_checkpoint(args.model)
    tokenizer = load_tokenizer(checkpoint.directory)
    counts = {}
    for name in args.workload:
        workload = make_workload(name, tokenizer.encode, tokenizer.num_tokens, scale=args.scale)
        counts[name] = count_padding(
            workload, checkpoint.config.vocab_size, max_num_seqs=args.num_running
        )
    print_padding(Console(), f"padding, {args.num_running} running", counts)
    if args.json is not None:
        args.json.write_text(json.dumps(counts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
