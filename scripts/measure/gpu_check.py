"""Is the engine right on an accelerator, and how fast is another one there?

    python scripts/measure/gpu_check.py right     kernels; engines against a CPU; bfloat16
    python scripts/measure/gpu_check.py bits      what leaves a row's bits alone
    python scripts/measure/gpu_check.py peer      256 requests end to end through transformers

Weights are random; shapes are the true ones. `--small` shrinks everything, to try the script
itself on a CPU. Each part prints a table; `--json OUT` keeps the figures. How fast the engine
itself is: scripts/measure/gpu_serve.py.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import jax
from gpu_bits import check_bits
from gpu_common import SHAPES, Report
from gpu_right import check_right
from needs import need


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["right", "bits", "peer"])
    parser.add_argument("--model", choices=list(SHAPES), default="qwen3-0.6b", help="for peer")
    parser.add_argument("--small", action="store_true", help="shrink everything")
    parser.add_argument("--limit", type=float, default=150, metavar="S", help="for peer, seconds")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args()
    if args.part == "peer":
        need("torch")
    report = Report(part=args.part, flags=os.environ.get("XLA_FLAGS", ""))
    start = time.perf_counter()
    if args.part == "peer":  # leaves the memory of the card to PyTorch
        from gpu_peer import check_peer

        check_peer(args.small, args.model, args.limit, report)
    else:
        _run_part(args, report)
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json is not None:
        report.write(args.json)


def _run_part(args: Any, report: Report) -> None:
    report.about |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print("  ".join(f"{key}={value}" for key, value in report.about.items()), flush=True)
    check = check_right if args.part == "right" else check_bits
    check(args.small, report)


if __name__ == "__main__":
    main()
