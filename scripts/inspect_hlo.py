"""What XLA makes of the engine's steps on an H200, without one: kernels, copies, memory, bytes.

pip install --no-deps --target DIR jax-cuda12-plugin==V jax-cuda12-pjrt==V     V: jaxlib's version
export PYTHONPATH=DIR JAX_PLATFORMS=cpu
python scripts/inspect_hlo.py                          decode and prefill of Qwen3-0.6B, 256 rows
python scripts/inspect_hlo.py --model qwen3-8b --rows 64 --page-size 64
python scripts/inspect_hlo.py --page-size 64 128 256 --unit 128 256 512 1024 --calls decode
python scripts/inspect_hlo.py --check                  also fails if decode breaks a rule

The rules for decode: one command buffer (CUDA graph) a step, nothing beside it; no copy, transpose
or conversion of the cache; temporaries below 5 % of the cache; no call to the host. Bytes are those
that kernels read and write; their floor is the weights and the pages in use, each read once.

Exit code: 0; 1 with --check if a rule is broken; 2 after a mistake in the options.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from folojax.buckets import DecodeShape, PrefillShape
from folojax.kv_cache import split_segments
from gpu_common import SHAPES, Pages
from hlo_compile import TARGET, Compiled, Steps, target_device
from hlo_read import count_kernels, num_command_buffers, outside_buffers
from rich.console import Console
from rich.table import Table

from folojax.models.config import ModelConfig
from folojax.models.llama import Llama

_MOST_TEMPORARIES = 0.05
_COLUMNS = {
    "call": "call",
    "page size": "page_size",
    "unit": "unit",
    "segments": "segments",
    "pages used": "pages_in_use",
    "read": "pages_read",
    "kernels": "kernels",
    "buffers": "command_buffers",
    "outside": "outside_buffers",
    "cache moves": "cache_moves",
    "temporaries MB": "temporary_mb",
    "share of the cache": "temporary_share",
    "MB moved": "moved_mb",
    "times the floor": "moved_to_floor",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=sorted(SHAPES), default="qwen3-0.6b")
    add("--layers", type=int, help="only the first ones; default: all")
    add("--calls", nargs="+", choices=["decode", "prefill"], default=["decode", "prefill"])
    add("--rows", type=int, default=256, help="of decode")
    add("--longest", type=int, default=1280, help="tokens of the longest row; the mean is half")
    add("--page-size", type=int, nargs="+", default=[128])
    add("--unit", type=int, nargs="+", default=[512], help="pages of a segment of the pool")
    add("--prefill-rows", type=int, default=32, help="rows of a prefill call")
    add("--prefill-columns", type=int, default=128, help="tokens of such a row")
    add("--target", type=Path, default=TARGET, help="description of another card")
    add("--check", action="store_true", help="exit code 1 if decode breaks a rule")
    add("--text", type=Path, metavar="DIR", help="write the thunks of each program there")
    add("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args(argv)
    for name in ("rows", "longest", "prefill_rows", "prefill_columns", "layers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    return args


def inspect(args: argparse.Namespace, page_size: int, unit: int, device: Any) -> Any:
    """Figures of each call, for a pool of these pages that is just large enough."""
    shape = SHAPES[args.model]
    if args.layers is not None:
        shape = shape | {"num_layers": args.layers}
    module = Llama(ModelConfig(**shape), jnp.bfloat16)
    pages = Pages(args.rows, args.longest, page_size)
    # The pool is larger than what is in use; a step is handed its first segments.
    head = (128, unit - 128) if unit > 128 else (unit,)
    segments = split_segments(4 * pages.num_pages, head=head)
    sums = list(itertools.accumulate(segments))
    count = next(i for i, extent in enumerate(sums, start=1) if extent >= pages.num_pages)
    steps = Steps(module, segments[:count], page_size, device)
    table = int(pages.counts.max())
    for call in args.calls:
        if call == "decode":
            compiled = steps.decode(DecodeShape(args.rows, count, table))
        else:
            rows, columns = args.prefill_rows, args.prefill_columns
            compiled = steps.prefill(PrefillShape(rows, columns, table, count))
        if args.text is not None:
            lines = [f"{'  ' * one.depth}{one.kind} {one.name}" for one in compiled.thunks]
            path = args.text / f"{args.model}-{call}-{page_size}-{unit}.txt"
            path.write_text("\n".join(lines) + "\n")
        yield {
            "call": call,
            "page_size": page_size,
            "unit": unit,
            "segments": count,
            "pages_in_use": pages.num_pages,
            "pages_read": sums[count - 1],
            **figures(compiled, pages.num_pages / sums[count - 1]),
        }


def figures(compiled: Compiled, used_share: float) -> dict[str, Any]:
    """What is told of a program; `used_share` is the part of its pages that is in use."""
    floor = compiled.weight_bytes + used_share * compiled.cache_bytes
    moved = compiled.program.bytes_moved()
    outside = outside_buffers(compiled.thunks)
    return {
        "kernels": count_kernels(compiled.thunks),
        "command_buffers": num_command_buffers(compiled.thunks),
        "outside_buffers": len(outside),
        "outside": [f"{one.kind} {one.name}" for one in outside],
        "cache_moves": len(compiled.program.cache_moves()),
        "moves": compiled.program.cache_moves(),
        "host_calls": compiled.program.host_calls(),
        "opcodes": dict(compiled.program.opcodes()),
        "temporary_mb": compiled.temporary_bytes / 1e6,
        "temporary_share": compiled.temporary_bytes / compiled.cache_bytes,
        "cache_mb": compiled.cache_bytes / 1e6,
        "weights_mb": compiled.weight_bytes / 1e6,
        "moved_mb": moved / 1e6,
        "moved_to_floor": moved / floor,
    }


def broken_rules(result: dict[str, Any]) -> list[str]:
    """What a decode step must not do, and does."""
    broken = []
    if result["command_buffers"] != 1 or result["outside_buffers"]:
        broken.append(
            f"{result['command_buffers']} command buffers and {result['outside']} beside them; a "
            "step must be one"
        )
    if result["moves"]:
        broken.append(f"the cache is moved: {result['moves']}")
    if result["temporary_share"] >= _MOST_TEMPORARIES:
        broken.append(
            f"temporaries are {result['temporary_share']:.1%} of the cache; they must be below "
            f"{_MOST_TEMPORARIES:.0%}"
        )
    if result["host_calls"]:
        broken.append(f"calls to the host: {result['host_calls']}")
    return broken


def main(argv: list[str] | None = None) -> int:
    """Compiles and tells."""
    args = parse_args(argv)
    if args.text is not None:
        args.text.mkdir(parents=True, exist_ok=True)
    device = target_device(args.target)
    console = Console()
    results = [
        result
        for page_size, unit in itertools.product(args.page_size, args.unit)
        for result in inspect(args, page_size, unit, device)
    ]
    table = Table(title=f"{args.model}, {args.rows} rows", title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(*(_cell(result[key]) for key in _COLUMNS.values()))
    console.print(table)
    broken = [
        f"decode, pages of {one['page_size']}, unit {one['unit']}: {rule}"
        for one in results
        if one["call"] == "decode"
        for rule in broken_rules(one)
    ]
    for line in broken:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    if args.json is not None:
        report = {"model": args.model, "rows": args.rows, "results": results, "broken": broken}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if broken and args.check else 0


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
