"""Figures as plots, from what bench.py --json has written or is about to write.

    python scripts/measure/bench_plots.py out.json DIR

throughput.png    output tokens a second by requests at once, a line for each contender
latencies.png     percentiles of ttft, tpot, itl and e2el
occupancy-*.png   rows that run, requests that wait, and pages, over one round of a contender
"""

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_profile import TIMELINE_FIELDS
from needs import need

LATENCIES = ("ttft", "tpot", "itl", "e2el")
_SHOWN = ("p50", "p90", "p99", "max")
_POOL = ("used_pages", "idle_pages", "free_pages")


def add_plot_option(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds `--plot DIR`, which is refused where matplotlib is missing."""
    parser.add_argument("--plot", type=_plot_directory, metavar="DIR", help=text)


def _plot_directory(text: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("plots need matplotlib: pip install folojax[bench]")
    return Path(text)


def plot_report(report: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draws all that a report has figures for; returns the files.

    Args:
        report: As bench.py writes it: "results" by contender, and perhaps a "sweep", the results
            by requests at once.
        directory: Is made if it is not there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    results, title = report["results"], report["workload"]
    paths = [plot_latencies(directory / "latencies.png", title, results)]
    if report.get("sweep"):
        lines = throughput_lines(report["sweep"])
        paths.append(plot_throughput(directory / "throughput.png", title, lines))
    for name, one in results.items():
        if "timeline" in one:
            path = directory / f"occupancy-{file_name(name)}.png"
            paths.append(plot_occupancy(path, f"{title}, {name}", one["timeline"]))
    return paths


def throughput_lines(
    sweep: Mapping[Any, Mapping[str, Mapping[str, Any]]],
) -> dict[str, list[tuple[int, float, float, float]]]:
    """By contender: requests at once, ascending, with the median, least and most tokens a second.

    Args:
        sweep: Results by requests at once (in JSON a text), then by contender.
    """
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for count in sorted(sweep, key=int):
        for name, one in sweep[count].items():
            keys = ("output_throughput", "min_output_throughput", "max_output_throughput")
            median, least, most = (one[key] for key in keys)
            lines.setdefault(name, []).append((int(count), median, least, most))
    return lines


def plot_throughput(
    path: Path, title: str, lines: Mapping[str, Sequence[tuple[int, float, float, float]]]
) -> Path:
    """Medians as lines, the spread over rounds as areas; `lines` are those of the function."""
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for name, points in lines.items():
        counts, medians, least, most = zip(*points, strict=True)
        (line,) = axes.plot(counts, medians, marker="o", label=name)
        axes.fill_between(counts, least, most, color=line.get_color(), alpha=0.15)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel="requests at once", ylabel="output tokens / s")
    axes.legend()
    figure.savefig(path)
    return path


def plot_latencies(path: Path, title: str, results: Mapping[str, Mapping[str, Any]]) -> Path:
    """Bars by percentile and contender; a contender has none where it has no such latency."""
    figure = _figure(10, 7)
    figure.suptitle(title)
    width = 0.8 / len(results)
    for axes, latency in zip(figure.subplots(2, 2).flat, LATENCIES, strict=True):
        for number, (name, one) in enumerate(results.items()):
            heights = [one.get(f"{statistic}_{latency}_ms") for statistic in _SHOWN]
            shift = (number - (len(results) - 1) / 2) * width
            places = [i + shift for i in range(len(_SHOWN))]
            known = [float("nan") if height is None else height for height in heights]
            axes.bar(places, known, width, label=name)
        axes.set_xticks(range(len(_SHOWN)), _SHOWN)
        axes.set(title=latency, ylabel="ms")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path)
    return path


def plot_occupancy(path: Path, title: str, timeline: Mapping[str, Sequence[float]]) -> Path:
    """Rows and requests above, the pool below; `timeline` as `Timeline` gives it."""
    assert set(TIMELINE_FIELDS) <= timeline.keys(), f"a timeline has {sorted(timeline)}"
    figure = _figure(10, 6)
    above, below = figure.subplots(2, 1, sharex=True)
    times_s = timeline["time_s"]
    for name in ("running", "waiting"):
        above.step(times_s, timeline[name], where="post", label=name)
    above.set_ylim(bottom=0)
    above.set(title=title, ylabel="samples")
    labels = [name.replace("_", " ") for name in _POOL]
    below.stackplot(times_s, *(timeline[name] for name in _POOL), labels=labels, step="post")
    below.set(xlabel="s", ylabel="KV pages")
    for axes in (above, below):
        axes.legend(loc="upper right")
    figure.savefig(path)
    return path


def plot_growth(path: Path, title: str, curves: Mapping[str, Mapping[int, float]]) -> Path:
    """Times by rows, both logarithmic, each curve with a dashed line that is linear.

    Args:
        path: Of the file.
        title: Of the plot.
        curves: By name, milliseconds by rows.
    """
    figure = _figure(7, 5)
    axes = figure.subplots()
    for name, times in curves.items():
        rows = sorted(times)
        (line,) = axes.plot(rows, [times[count] for count in rows], marker="o", label=name)
        last = rows[-1]
        linear = [times[last] * count / last for count in rows]
        axes.plot(rows, linear, linestyle="--", linewidth=0.8, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    counts = sorted({count for times in curves.values() for count in times})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(title=f"{title} (dashed: linear)", xlabel="rows", ylabel="ms a step")
    axes.legend()
    figure.savefig(path)
    return path


def file_name(name: str) -> str:
    """A contender's name as part of a file's.

    >>> file_name("folojax auto / bf16")
    'folojax-auto-bf16'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _figure(width: float, height: float) -> Any:
    """An empty figure that never looks for a display; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Draws a report that was written before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="what bench.py --json has written")
    parser.add_argument("directory", type=Path, help="gets the plots")
    args = parser.parse_args(argv)
    need("matplotlib")
    for path in plot_report(json.loads(args.report.read_text()), args.directory):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
