"""Measure folojax on this machine. Everything is compiled before anything is timed.

python scripts/measure/bench.py uniform --num-running 32 --peers transformers --json out.json
python scripts/measure/bench.py sharegpt --request-rate 1
python scripts/measure/bench.py group    what samples of one prompt share, against separate requests
python scripts/measure/bench.py prefix   first tokens after a cached prefix, against a fresh one
python scripts/measure/bench.py long     long prompts in chunks, against whole ones
python scripts/measure/bench.py uniform --profile --peers none
python scripts/measure/bench.py uniform --sweep 1 2 4 8 16 --plot DIR --trace DIR
python scripts/measure/bench.py sampling what sampling parameters cost, against greedy

Contenders run in processes of their own, one at a time and by turns; figures are medians over
rounds, with the spread of the throughput: the machine may be shared, so only ratios within one run
mean anything. docs/bench.md says what each workload and figure is.

Exit code: 0; 1 with --check if a target is missed; 2 after a mistake in the options.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_ceilings import CEILINGS, DECODE_ROWS, Ceilings, compare
from bench_engine import WARM_UPS, Folojax
from bench_isolation import Contender, Isolated
from bench_metrics import medians
from bench_peers import FILES, PEERS, find_agreements, find_far_behind, find_peers
from bench_plots import add_plot_option, file_name, plot_report
from bench_ratios import ONE_AT_A_TIME, find_ratios
from bench_sampling import measure_sampling, print_sampling
from bench_table import print_ceilings, print_results, print_sweep
from bench_workloads import NAMES, Workload, make_workload
from needs import need_for
from rich.console import Console

from folojax import LLM
from folojax.config import QUANTIZATIONS
from folojax.models.files.checkpoint import open_checkpoint
from folojax.text.tokenizer import Tokenizer
from folojax.text.tokenizer_files import load_tokenizer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", help="as LLM takes it; the default is the embedded model")
    common.add_argument("--rounds", type=int, help="default: 5; of long prompts 3")
    common.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    commands = parser.add_subparsers(dest="workload", required=True)
    for name in NAMES:
        _add_workload_options(commands.add_parser(name, parents=[common]))
    sampling = commands.add_parser("sampling", parents=[common])
    sampling.add_argument("--num-requests", type=int, default=32)
    sampling.add_argument("--input-len", type=int, default=64)
    sampling.add_argument("--output-len", type=int, default=64)
    args = parser.parse_args(argv)
    need_for([args.workload, *getattr(args, "peers", ())])
    if args.rounds is None:
        args.rounds = 3 if args.workload == "long" else 5
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; at least one is needed")
    if args.workload == "sampling":
        return args
    if min([args.num_running, *args.sweep]) < 1:
        parser.error(f"--num-running and --sweep are {args.num_running} and {args.sweep}; each 1+")
    if args.request_rate <= 0:
        parser.error(f"--request-rate is {args.request_rate}; it must be above 0, or inf")
    if args.warm_up is None:
        args.warm_up = "rehearsal" if args.workload == "long" else "plan"
    return args


def _add_workload_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-requests", type=int, help="only the first ones")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of every length: smaller is a try-out"
    )
    parser.add_argument("--num-running", type=int, default=32, help="most requests at once")
    parser.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        help="Poisson arrivals, so many a second; the default is all at once",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["auto"],
        help="of folojax, or int8 or int4 for quantised kernels; several compare",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=JSON",
        help="a field of EngineConfig",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=["auto", "none", *PEERS],
        default=["none"],
        help="other engines; auto: all that are installed",
    )
    parser.add_argument(
        "--peer-dtype", nargs="+", default=["bfloat16", "float32"], help="of transformers"
    )
    parser.add_argument(
        "--peer-file",
        nargs="+",
        choices=FILES,
        default=list(FILES),
        help="of llama.cpp: the model's own file, or its weights in another type",
    )
    parser.add_argument(
        "--ceilings",
        action="store_true",
        help="measure this machine's bandwidth and products, and how near folojax comes",
    )
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="also the same engine with a single slot"
    )
    parser.add_argument(
        "--warm-up",
        choices=WARM_UPS,
        help="default: plan; of long prompts, whose arrivals follow tokens and not the clock, "
        "rehearsal: every run of it takes the same steps",
    )
    parser.add_argument("--profile", action="store_true", help="shares of a step")
    parser.add_argument(
        "--sweep",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="also with these numbers of requests at once",
    )
    add_plot_option(parser, "draw the figures there")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="DIR",
        help="write a trace of one more run of folojax there, for ui.perfetto.dev",
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 if a target is missed")
    parser.add_argument(
        "--in-process", action="store_true", help="no processes: memory is then that of all"
    )


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def make_contenders(
    args: argparse.Namespace, workload: Workload
) -> dict[str, Callable[[], Contender]]:
    """What is compared, the one that is judged first."""
    options = {"max_num_seqs": args.num_running, "max_model_len": _round_limit(args, workload)}
    # What a step computes of prompts is what running requests wait for.
    if workload.name == "long":
        options["max_num_batched_tokens"] = 256
    if workload.name == "sharegpt":
        # Up to three prompts, a whole row of 16 tokens of each.
        options["max_num_batched_tokens"] = args.num_running + 48
        options["long_prefill_token_threshold"] = 16
    options |= dict(args.option)

    decode_rows = DECODE_ROWS if args.ceilings and args.num_running >= DECODE_ROWS else 0

    def ours(name: str, dtype: str, has_separate_samples: bool = False, **fields: Any) -> Any:
        fields |= {"quantization": dtype} if dtype in QUANTIZATIONS else {"dtype": dtype}
        make_llm = functools.partial(LLM, args.model, **options | fields)
        return name, functools.partial(
            Folojax,
            name,
            make_llm,
            warm_up=args.warm_up,
            has_separate_samples=has_separate_samples,
            is_profiled=args.profile,
            is_watched=args.plot is not None,
            trace_path=args.trace and args.trace / f"{file_name(name)}.perfetto.json.gz",
            decode_rows=decode_rows if name.startswith("folojax") else 0,
        )

    first, *_ = args.dtype
    contenders = [ours(f"folojax {dtype}", dtype) for dtype in args.dtype]
    if workload.name == "group":
        contenders.append(ours("separate", first, True, enable_prefix_caching=False))
    if workload.name == "long":
        budget = max(options["max_model_len"], options["max_num_batched_tokens"])
        whole = ours(
            "whole prompts",
            first,
            max_num_batched_tokens=budget,
            enable_chunked_prefill=False,
            long_prefill_token_threshold=0,
        )
        contenders.append(whole)
    if args.one_at_a_time:
        contenders.append(ours(ONE_AT_A_TIME, first, max_num_seqs=1))
    peers = (args.peers, args.model, args.peer_dtype, args.peer_file, args.num_running)
    contenders += find_peers(*peers, workload)
    if args.ceilings:
        config = open_checkpoint(args.model).config
        contenders.append((CEILINGS, functools.partial(Ceilings, config)))
    return dict(contenders)


def _round_limit(args: argparse.Namespace, workload: Workload) -> int:
    """The round number that a user would give: with it, the pool has whole pages for everyone."""
    most = open_checkpoint(args.model).config.max_position
    return max(workload.longest, min(-(-workload.longest // 128) * 128, most))


def measure(
    contenders: dict[str, Callable[[], Contender]],
    workload: Workload,
    rounds: int,
    is_isolated: bool,
    encode: Callable[[str], list[int]],
) -> dict[str, dict[str, Any]]:
    """Figures by contender: medians over rounds that are run by turns, and the rounds.

    Args:
        contenders: By name; the first one is judged.
        workload: What they run.
        rounds: How often.
        is_isolated: Whether each is a process of its own.
        encode: From text to token ids, to see that peers run the same model.
    """
    running: dict[str, Contender] = {}
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    try:
        preparations = {}
        for name, make in contenders.items():
            running[name] = Isolated(make) if is_isolated else make()
            preparations[name] = running[name].prepare(workload)
        for name, share in find_agreements(_with_peers(running), encode).items():
            preparations[name]["agreement"] = share
        behind: set[str] = set()
        for number in range(rounds):
            for name in [name for name in running if name not in behind]:
                figures[name].append(running[name].run(workload))
            if number == 0:
                once = {name: figures[name][0] for name in running if name.startswith(PEERS)}
                rates = {name: one["output_throughput"] for name, one in once.items()}
                behind = find_far_behind(rates)
    finally:
        for contender in running.values():
            contender.close()
    return {
        name: {**preparations[name], **medians(each), "rounds": each}
        for name, each in figures.items()
    }


def measure_sweep(
    args: argparse.Namespace, workload: Workload, encode: Callable[[str], list[int]]
) -> dict[int, Any]:
    """Figures by requests at once, of those beside --num-running; `encode` as for `measure`."""
    sweep = {}
    left_out = {"one_at_a_time": False, "ceilings": False, "trace": None}
    for count in sorted({*args.sweep} - {args.num_running}):
        fields = vars(args) | left_out | {"num_running": count}
        contenders = make_contenders(argparse.Namespace(**fields), workload)
        is_isolated = len(contenders) > 1 and not args.in_process
        sweep[count] = measure(contenders, workload, args.rounds, is_isolated, encode)
    return sweep


def _without_rounds(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    left_out = ("rounds", "timeline")
    return {
        name: {key: value for key, value in one.items() if key not in left_out}
        for name, one in results.items()
    }


def _with_peers(running: dict[str, Contender]) -> dict[str, Contender]:
    """The first contender and every other engine; without other engines, nothing."""
    first, *others = running
    peers = [name for name in others if name.startswith(PEERS)]
    return {name: running[name] for name in [first, *peers]} if peers else {}


def describe_machine() -> dict[str, Any]:
    """What figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(models)) or platform.processor(),
        "num_cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "transformers")},
    }


def main(argv: list[str] | None = None) -> int:
    """Runs one measurement."""
    args = parse_args(argv)
    console = Console()
    machine = describe_machine()
    report: dict[str, Any] = {"workload": args.workload, "machine": machine}
    ratios = []
    if args.workload == "sampling":
        sizes = (args.num_requests, args.input_len, args.output_len)
        results = measure_sampling(args.model, *sizes, args.rounds)
        title = f"{args.num_requests} requests, {args.input_len} in, {args.output_len} out"
        print_sampling(console, title, results)
    else:
        checkpoint = open_checkpoint(args.model)
        tokenizer = load_tokenizer(checkpoint.directory)
        workload = find_workload(args, checkpoint.config.vocab_size, tokenizer)
        contenders = make_contenders(args, workload)
        is_isolated = len(contenders) > 1 and not args.in_process
        results = measure(contenders, workload, args.rounds, is_isolated, tokenizer.encode)
        ceilings = results.pop(CEILINGS, None)
        if ceilings is not None:
            for figures in results.values():
                if "dtype" in figures:
                    figures |= compare(figures, ceilings, checkpoint.config, workload)
            print_ceilings(console, ceilings)
            report["ceilings"] = ceilings
        ratios = find_ratios(
            workload.name, args.num_running, results, is_memory_own=not args.in_process
        )
        print_results(console, _title(args, workload, machine), results, ratios)
        if args.sweep:
            sweep = measure_sweep(args, workload, tokenizer.encode)
            sweep[args.num_running] = results
            print_sweep(console, sweep)
            report["sweep"] = {count: _without_rounds(each) for count, each in sweep.items()}
        report["ratios"] = [vars(ratio) | {"is_met": ratio.is_met} for ratio in ratios]
        report["date"] = time.strftime("%Y%m%d-%H%M%S")
        report["model_id"] = args.model or "embedded"
        report["num_prompts"] = len(workload.requests)
        report["max_concurrency"] = args.num_running
        for name in ("num_running", "request_rate", "scale", "warm_up"):
            report[name] = str(getattr(args, name))
    report["results"] = results
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.workload != "sampling" and args.plot is not None:
        for path in plot_report(report, args.plot):
            console.print(f"plot: {path}", highlight=False)
    is_missed = not all(ratio.is_met for ratio in ratios)
    return 1 if is_missed and args.check else 0


def find_workload(args: argparse.Namespace, vocab_size: int, tokenizer: Tokenizer) -> Workload:
    """The workload that the options describe."""
    num_tokens = min(vocab_size, tokenizer.num_tokens)
    workload = make_workload(
        args.workload, tokenizer.encode, num_tokens, args.num_requests, args.scale
    )
    if args.request_rate < float("inf"):
        workload = workload.with_poisson_arrivals(args.request_rate)
    return workload


def _title(args: argparse.Namespace, workload: Workload, machine: dict[str, Any]) -> str:
    rate = args.request_rate
    arrivals = "all at once" if rate == float("inf") else f"Poisson, {rate:g} a second"
    return (
        f"{workload.name}: {len(workload.requests)} requests, "
        f"{workload.num_output_tokens:,} tokens out, {args.num_running} running, "
        f"{arrivals}; {args.rounds} rounds; {machine['num_cpus']} cores, "
        f"load {machine['load_average']:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
