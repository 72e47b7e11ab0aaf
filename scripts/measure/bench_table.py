"""Figures as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench_ceilings import DECODE_ROWS, DTYPES, PREFILL_ROWS
from bench_ratios import Ratio
from rich.console import Console
from rich.table import Table

Figures = Mapping[str, Mapping[str, Any]]

_TIMES = tuple(
    (f"{statistic} {name}", f"{statistic}_{name}_ms")
    for name, statistics in (
        ("ttft", ("mean", "p50", "p99")),
        ("tpot", ("mean", "p99")),
        ("itl", ("mean", "p50", "p99", "max")),
        ("e2el", ("mean", "p50", "p99")),
    )
    for statistic in statistics
)

_PADDING: tuple[tuple[str, str, str], ...] = (
    ("padding", "padding_waste", ".1%"),
    ("padding of prompts", "prefill_padding_waste", ".1%"),
    ("padding of decode rows", "decode_padding_waste", ".1%"),
)

_COUNTS: tuple[tuple[str, str, str], ...] = (
    ("rounds", "num_rounds", ",.0f"),
    ("load s", "load_s", ".1f"),
    ("warm-up s", "warm_up_s", ".1f"),
    ("cold compile s", "cold_compile_s", ".1f"),
    ("executables", "num_executables", ",.0f"),
    ("compiled while timed", "compilations_timed", ",.0f"),
    ("peak GiB", "peak_memory_gib", ".2f"),
    *_PADDING,
    ("prefill tokens computed", "prefill_tokens_computed", ",.0f"),
    ("prefix-hit tokens", "prefix_hit_tokens", ",.0f"),
    ("steps", "num_steps", ",.0f"),
    ("preemptions", "preemptions", ",.0f"),
    ("batch size", "batch_size", ",.0f"),
    ("settings", "settings", ""),
    ("tokens as ours", "agreement", ".0%"),
    ("of products alone", "gemm_share", ".1%"),
    ("decode step ms", "decode_step_ms", ",.1f"),
    ("allowed ms", "decode_bound_ms", ",.1f"),
)


def print_results(console: Console, title: str, results: Figures, ratios: Sequence[Ratio]) -> None:
    """Prints all there is."""
    table = _table(title, ["", "output tokens/s", "lowest", "highest", "requests/s", "duration s"])
    for name, one in results.items():
        keys = ("output_throughput", "min_output_throughput", "max_output_throughput")
        cells = [f"{one[key]:,.1f}" for key in keys]
        table.add_row(name, *cells, f"{one['request_throughput']:.2f}", f"{one['duration']:.2f}")
    console.print(table)
    _print_columns(console, "times, ms", results, [(*pair, ",.1f") for pair in _TIMES])
    for name, one in results.items():
        if "by_label" in one:
            columns = [(*pair, ",.1f") for pair in _TIMES]
            _print_columns(console, f"times of {name}, ms", one["by_label"], columns)
    _print_columns(console, "beside them", results, _COUNTS)
    shares = {name: one["step_shares"] for name, one in results.items() if "step_shares" in one}
    if shares:
        phases = [(phase, phase, ".1%") for phase in next(iter(shares.values()))]
        _print_columns(console, "shares of a step", shares, phases)
    for ratio in ratios:
        console.print(f"{ratio.text}: {ratio.value:.3g}{_verdict(ratio)}", highlight=False)


def print_sweep(console: Console, sweep: Mapping[int, Figures]) -> None:
    """Prints the throughput by requests at once: a row for each number, a column a contender."""
    names = list(dict.fromkeys(name for results in sweep.values() for name in results))
    table = _table("output tokens/s by requests at once", ["", *names])
    for count, results in sorted(sweep.items()):
        figures = {name: f"{one['output_throughput']:,.1f}" for name, one in results.items()}
        table.add_row(f"{count:,}", *(figures.get(name, "") for name in names))
    console.print(table)


def print_padding(console: Console, title: str, counts: Figures) -> None:
    """Prints what was computed, and for nobody, by workload."""
    tokens = ("scheduled_tokens", "padding_tokens", "num_steps")
    rows = [*_PADDING, *((name.replace("_", " "), name, ",.0f") for name in tokens)]
    _print_columns(console, title, counts, rows)


def print_ceilings(console: Console, ceilings: Mapping[str, Any]) -> None:
    """Prints what the machine can do."""
    table = _table(
        "ceilings of this machine", ["", "GB/s", *(f"GFLOP/s {dtype}" for dtype in DTYPES)]
    )
    for text, key in (("copy, donated", "copy_gb_s"), ("matrix by vector", "read_gb_s")):
        table.add_row(text, f"{ceilings[key]:,.1f}", *[""] * len(DTYPES))
    for rows, key in (
        (DECODE_ROWS, "gemm_decode_gflops"),
        (PREFILL_ROWS, "gemm_prefill_gflops"),
    ):
        rates = [f"{ceilings[key][dtype]:,.0f}" for dtype in DTYPES]
        table.add_row(f"products of {rows} rows", "", *rates)
    console.print(table)


def _verdict(ratio: Ratio) -> str:
    if ratio.target is None:
        return ""
    sign = "at least" if ratio.is_floor else "at most"
    return f" ({'met' if ratio.is_met else 'MISSED'}: {sign} {ratio.target:.3g})"


def _print_columns(
    console: Console, title: str, results: Figures, rows: Sequence[tuple[str, str, str]]
) -> None:
    """A row for each figure, a column for each contender; what nobody has is left out."""
    table = _table(title, ["", *results])
    for text, key, spec in rows:
        values = [one.get(key) for one in results.values()]
        if any(value is not None for value in values):
            table.add_row(text, *("" if value is None else f"{value:{spec}}" for value in values))
    console.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table
