"""What XLA makes of the engine's steps on an H200, without one: kernels, copies, memory, bytes.

pip install --no-deps --target DIR jax-cuda12-plugin==V jax-cuda12-pjrt==V     V: jaxlib's version
export PYTHONPATH=DIR JAX_PLATFORMS=cpu
python scripts/measure/inspect_hlo.py                          decode and prefill of Qwen3-0.6B
python scripts/measure/inspect_hlo.py --model qwen3-8b --rows 64 --calls greedy
python scripts/measure/inspect_hlo.py --check                  also fails if decode breaks a rule

The programs are those that the engine runs: a decode step with greedy sampling and with truncated
sampling in it (`--calls recorded`: with log-probabilities and records, too), and a call of prefill,
over a pool of 100 GB.

The rules for decode: one command buffer (CUDA graph) a step, nothing beside it (but loops in which
several cards tell each other something); no copy, transpose or conversion of the cache; temporaries
of at most 1 % of the pool; at most 12 kernels in a layer beside attention's; no call to the host.
Of several cards that share each layer (`--devices`), the sums of these are two kernels more in a
layer, with codes of four bits five, and there is one more sum, of the embedding; of the vocabulary
they gather once for greedy sampling, and never more than 128 numbers a row and card. Inputs in
eight bits (`--quantization`) are eight more in a layer, and so are adapters (`--loras`). Bytes are
those that kernels read and write, the pages that attention reads aside; their floor is the weights,
read once.

Exit code: 0; 1 with --check if a rule is broken; 2 after a mistake in the options.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from gpu_common import SHAPES
from hlo_compile import TARGET, Compiled, Steps, target_devices
from hlo_read import count_kernels, kernels_per_layer, num_command_buffers, outside_buffers
from rich.console import Console
from rich.table import Table

from folojax.backend.backend import GPU
from folojax.backend.devices import Devices
from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama
from folojax.models.quantized.float8_kernels import MOST_WIDE_ROWS
from folojax.models.quantized.names import QUANTIZATIONS
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.sched.pages import pages_for

_DECODE = {
    "greedy": SamplingSpec(SamplingClass.GREEDY),
    "truncated": SamplingSpec(SamplingClass.TRUNCATED),
    "recorded": SamplingSpec(SamplingClass.TRUNCATED, num_logprobs=5, has_record=True),
}
_MOST_TEMPORARIES = 0.01
# Four products, two norms of the stream, one with the rotation of heads, a write of the page, an
# activation; of three products the sum over parts of theirs may be a kernel of its own.
_MOST_KERNELS = 12
# Candidates for top-k and what a card knows of a draw; the whole vocabulary would be thousands.
_MOST_GATHERED = 128
# Products in four bits of half the outputs are cut into pieces, which one kernel more adds up.
_PIECES = 3
# Of four products of eight bits: what rounds the inputs, and what scales the sums.
_ROUNDING_KERNELS = 8
# Of four products: what reduces the inputs, and what adds the updates.
_LORA_KERNELS = 8
_COLUMNS = {
    "call": "call",
    "rows": "rows",
    "kernels": "kernels",
    "a layer": "layer_kernels",
    "buffers": "command_buffers",
    "outside": "outside_buffers",
    "sums": "sums",
    "cache moves": "cache_moves",
    "temporaries MB": "temporary_mb",
    "share of the pool": "temporary_share",
    "MB moved": "moved_mb",
    "times the weights": "moved_to_weights",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    calls = [*_DECODE, "prefill"]
    add = parser.add_argument
    add("--model", choices=sorted(SHAPES), default="qwen3-0.6b")
    add("--quantization", choices=QUANTIZATIONS, help="of the kernels")
    add("--loras", type=int, nargs=2, metavar=("L", "R"), help="slots of adapters, and their rank")
    add("--devices", type=int, default=1, help="cards that share each layer")
    add("--layers", type=int, help="only the first ones; default: all")
    usual = [call for call in calls if call != "recorded"]
    add("--calls", nargs="+", choices=calls, default=usual)
    add("--rows", type=int, nargs="+", default=[1, 64, 256], help="of decode")
    add("--longest", type=int, default=2048, help="tokens of the longest row")
    add("--page-size", type=int, default=64)
    add("--pool-gb", type=float, default=100.0, help="size of the cache")
    add("--prefill-rows", type=int, default=8, help="rows of a prefill call")
    add("--prefill-columns", type=int, default=128, help="tokens of such a row")
    add("--prefill-tokens", type=int, default=4096, help="most tokens of such a call")
    add("--target", type=Path, default=TARGET, help="description of another card")
    add("--deterministic", action="store_true", help="of that mode: greedy, and prefill")
    add("--check", action="store_true", help="exit code 1 if decode breaks a rule")
    add("--text", type=Path, metavar="DIR", help="write the thunks of each program there")
    add("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args(argv)
    for name in ("longest", "prefill_rows", "prefill_columns", "layers", "page_size", "devices"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    if args.deterministic:  # draws are a call of their own there
        args.calls = [call for call in args.calls if call in ("greedy", "prefill")]
    if min(args.rows) < 1:
        parser.error(f"--rows has {min(args.rows)}; give at least 1")
    return args


def inspect(args: argparse.Namespace, devices: Devices) -> Iterator[dict[str, Any]]:
    """Figures of each program."""
    shape = SHAPES[args.model]
    if args.layers is not None:
        shape = shape | {"num_layers": args.layers}
    module = Llama(ModelConfig(**shape), jnp.bfloat16)
    config = module.config
    layout = dataclasses.replace(GPU, devices=devices).kv_layout(
        config, module.dtype, 1, args.page_size
    )
    num_pages = int(args.pool_gb * 1e9 / layout.bytes_per_page)
    table_pages = pages_for(args.longest, args.page_size)
    sizes = num_pages, args.page_size, table_pages
    loras = None if args.loras is None else tuple(args.loras)
    is_hopper = re.search(r"cuda_compute_capability \{\s*major: 9\b", args.target.read_text())
    how = args.quantization, args.deterministic, loras
    steps = Steps(module, *sizes, devices, *how, is_hopper=is_hopper is not None)
    for call in args.calls:
        for rows in [args.prefill_rows] if call == "prefill" else args.rows:
            if call == "prefill":
                compiled = steps.prefill(rows, args.prefill_columns, args.prefill_tokens)
            else:
                compiled = steps.decode(rows, _DECODE[call])
            if args.text is not None:
                lines = [f"{'  ' * one.depth}{one.kind} {one.name}" for one in compiled.thunks]
                path = args.text / f"{args.model}-{call}-{rows}.txt"
                path.write_text("\n".join(lines) + "\n")
            told = {
                "has_loops_over_devices": devices.count > 1 and call not in ("greedy", "prefill"),
                "wanted_sums": 0 if devices.count == 1 else 2 * config.num_layers + 1,
                # Of candidates. A draw that is truncated takes more; prompts are not sampled.
                "wanted_gathers": int(devices.count > 1) if call == "greedy" else None,
                "most_gathered": _MOST_GATHERED * rows * devices.count,
                "has_loras": loras is not None,
                "has_pieces": args.quantization == "int4" and devices.count > 1,
                "rounds_inputs": args.quantization in ("int8", "fp8") and rows > MOST_WIDE_ROWS,
            }
            yield {"call": call, "rows": rows, **told, **figures(compiled)}


def figures(compiled: Compiled) -> dict[str, Any]:
    """What is told of a program."""
    moved = compiled.program.bytes_moved()
    outside, opcodes = outside_buffers(compiled.thunks), compiled.program.opcodes()
    return {
        "kernels": count_kernels(compiled.thunks),
        "layer_kernels": kernels_per_layer(compiled.thunks),
        "command_buffers": num_command_buffers(compiled.thunks),
        "outside_buffers": len(outside),
        "outside": [f"{one.kind} {one.name}" for one in outside],
        "cache_moves": len(compiled.program.cache_moves()),
        "moves": compiled.program.cache_moves(),
        "host_calls": compiled.program.host_calls(),
        "opcodes": dict(opcodes),
        "sums": opcodes["all-reduce"] + opcodes["all-reduce-start"],
        "gathers": opcodes["all-gather"] + opcodes["all-gather-start"],
        "gathered": compiled.program.most_gathered(),
        "temporary_mb": compiled.temporary_bytes / 1e6,
        "temporary_share": compiled.temporary_bytes / compiled.cache_bytes,
        "cache_mb": compiled.cache_bytes / 1e6,
        "weights_mb": compiled.weight_bytes / 1e6,
        "moved_mb": moved / 1e6,
        "moved_to_weights": moved / compiled.weight_bytes,
    }


def broken_rules(result: dict[str, Any]) -> list[str]:
    """What a decode step must not do, and does."""
    broken = []
    is_one = result["command_buffers"] == 1 and not result["outside_buffers"]
    if not (is_one or result["has_loops_over_devices"]):
        broken.append(
            f"{result['command_buffers']} command buffers and {result['outside']} beside them; a "
            "step must be one"
        )
    if result["moves"]:
        broken.append(f"the cache is moved: {result['moves']}")
    if result["temporary_share"] > _MOST_TEMPORARIES:
        broken.append(
            f"temporaries are {result['temporary_share']:.1%} of the pool; they may be "
            f"{_MOST_TEMPORARIES:.0%}"
        )
    most = _MOST_KERNELS + (2 if result["wanted_sums"] else 0)
    most += _PIECES if result["has_pieces"] else 0
    most += _ROUNDING_KERNELS if result["rounds_inputs"] else 0
    most += _LORA_KERNELS if result["has_loras"] else 0
    if result["layer_kernels"] > most:
        broken.append(f"{result['layer_kernels']} kernels in a layer; {most} are enough")
    if result["sums"] != result["wanted_sums"]:
        broken.append(f"{result['sums']} sums over devices, of {result['wanted_sums']}")
    if result["gathered"] > result["most_gathered"]:
        broken.append(
            f"{result['gathered']} numbers gathered; {result['most_gathered']} are enough"
        )
    if result["wanted_gathers"] not in (None, result["gathers"]):
        broken.append(f"{result['gathers']} gathers, of {result['wanted_gathers']}")
    if result["host_calls"]:
        broken.append(f"calls to the host: {result['host_calls']}")
    return broken


def main(argv: list[str] | None = None) -> int:
    """Compiles and tells."""
    args = parse_args(argv)
    if args.text is not None:
        args.text.mkdir(parents=True, exist_ok=True)
    results = list(inspect(args, target_devices(args.target, args.devices)))
    title = f"{args.model}, pool of {args.pool_gb:g} GB"
    table = Table(title=title, title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(*(_cell(result[key]) for key in _COLUMNS.values()))
    console = Console()
    console.print(table)
    broken = [
        f"{one['call']} decode of {one['rows']} rows: {rule}"
        for one in results
        if one["call"] in _DECODE
        for rule in broken_rules(one)
    ]
    for line in broken:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    if args.json is not None:
        report = {"model": args.model, "results": results, "broken": broken}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if broken and args.check else 0


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
