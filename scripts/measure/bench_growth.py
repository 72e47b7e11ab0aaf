"""How the time of a decode step grows with its rows, and the host's part of it.

    python scripts/measure/bench_growth.py --plot DIR --json OUT
    python scripts/measure/bench_growth.py --what host       without a model: up to 1,024 rows

"step": the real model, 1 to 64 rows; the whole step, the thread's time in calls to the device, and
the host's own time. "host": the same host work without a device, 1 to 1,024 rows. Host times are
those of the thread, which other load disturbs through the caches alone. Figures are medians, but
for the least of the host's, which shows the work itself on a machine that is not quiet.

An exponent is the slope of a line through the logarithms of time and rows: 1 is linear, 0 costs the
same for any number of rows. It is given of all rows, and of the last three doublings alone, where
what a step costs anyway counts for little.

Exit code: 0; 1 with --check if an exponent of the least times is above 1.1.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_plots import add_plot_option, plot_growth
from bench_profile import HOST_PHASES, profile_steps
from bench_stub import make_stub_llm, start_rows, without_device
from rich.console import Console
from rich.table import Table

from folojax import LLM

STEP_ROWS = (1, 2, 4, 8, 16, 32, 64)
HOST_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MOST_EXPONENT = 1.1
"""Of the host's least time: linear, and what a noisy machine may add."""
CHECKED = "the least"

_PROMPT_LEN = 16
_LAST = 4


@dataclasses.dataclass(frozen=True)
class Growth:
    """Milliseconds by rows.

    Attributes:
        name: Of what.
        ms: At least two numbers of rows, ascending.
    """

    name: str
    ms: Mapping[int, float]

    @property
    def exponent(self) -> float:
        """Of all rows."""
        return fit_exponent(self.ms)

    @property
    def last_exponent(self) -> float:
        """Of the largest numbers of rows alone."""
        return fit_exponent(dict(list(self.ms.items())[-_LAST:]))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ms_by_rows": dict(self.ms),
            "exponent": self.exponent,
            "last_exponent": self.last_exponent,
        }


def fit_exponent(ms: Mapping[int, float]) -> float:
    """The x of time = c * rows^x that is nearest, by least squares of the logarithms.

    >>> round(fit_exponent({1: 3.0, 2: 12.0, 4: 48.0}), 6)
    2.0
    """
    slope, _ = np.polyfit(np.log(list(ms)), np.log(list(ms.values())), 1)
    return float(slope)


def host_ms(rows: int, num_steps: int = 40) -> list[float]:
    """Milliseconds of thread time of decode steps with so many rows, without a device."""
    llm = make_stub_llm(
        page_size=64,
        num_pages=2 * rows,
        max_num_seqs=rows,
        max_num_batched_tokens=max(512, 4 * rows),
        max_model_len=128,
    )
    times = []
    with without_device(llm):
        prompts = [[3 + number % 100] * (1 + number % 30) for number in range(rows)]
        start_rows(llm, prompts, num_tokens=2 * num_steps + 16)
        for _ in range(num_steps):
            before = time.thread_time()
            llm.engine.step()
            times.append(1e3 * (time.thread_time() - before))
        assert llm.metrics().num_running == rows, "requests ended while they were measured"
        llm.engine.reset()
    return times


def measure_host(rows: Sequence[int], rounds: int, num_steps: int) -> list[Growth]:
    """Decode steps without a device: medians, and the least of all."""
    times: dict[int, list[float]] = {count: [] for count in rows}
    for _ in range(rounds):
        for count in rows:
            times[count] += host_ms(count, num_steps)
    least = {count: min(each) for count, each in times.items()}
    return [Growth("host, no device", _medians(times)), Growth(CHECKED, least)]


def measure_steps(model: str | None, rows: Sequence[int], rounds: int, steps: int) -> list[Growth]:
    """Decode steps of a model: whole, the calls to the device, the host.

    Args:
        model: As LLM takes it.
        rows: Numbers of rows, taken by turns.
        rounds: How many turns; each is of `steps` steps.
        steps: So many tokens of each row, and a few before them.
    """
    # Two prompt lengths of room: all rows keep the pages that they have from the first step on.
    length = _PROMPT_LEN + 2 * steps + 16
    llm = LLM(model, max_num_seqs=max(rows), max_model_len=length)
    names = ("step", "calls to the device", "host")
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in rows} for name in names}
    for number in range(rounds + 1):
        for count in rows:
            prompts = [[100 + i] * _PROMPT_LEN for i in range(count)]
            start_rows(llm, prompts, num_tokens=length - _PROMPT_LEN)
            measured = _time_steps(llm, steps)
            llm.engine.reset()
            if number:  # the first turn compiles
                for name, value in zip(names, measured, strict=True):
                    times[name][count].append(value)
    return [Growth(name, _medians(times[name])) for name in names]


def _time_steps(llm: LLM, steps: int) -> tuple[float, float, float]:
    """Milliseconds of a step: of the clock in the median, of the thread in the mean."""
    walls = []
    with profile_steps(time.thread_time) as stopwatch:
        for _ in range(steps):
            before = time.perf_counter()
            llm.step()
            walls.append(1e3 * (time.perf_counter() - before))
    mean = {phase: 1e3 * seconds / steps for phase, seconds in stopwatch.seconds.items()}
    return statistics.median(walls), mean["dispatch"], sum(mean[phase] for phase in HOST_PHASES)


def _medians(times: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {count: statistics.median(each) for count, each in sorted(times.items())}


def print_growth(console: Console, curves: Sequence[Growth]) -> None:
    """A row for each number of rows, a column for each curve, and the exponents."""
    table = Table(title="ms a step", title_justify="left")
    for name in ("rows", *(curve.name for curve in curves)):
        table.add_column(name, justify="right")
    for count in sorted({count for curve in curves for count in curve.ms}):
        cells = (f"{curve.ms[count]:.3f}" if count in curve.ms else "" for curve in curves)
        table.add_row(f"{count:,}", *cells)
    table.add_section()
    table.add_row("exponent", *(f"{curve.exponent:.2f}" for curve in curves))
    table.add_row(f"last {_LAST}", *(f"{curve.last_exponent:.2f}" for curve in curves))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=["both", "step", "host"], default="both")
    parser.add_argument("--model", help="as LLM takes it; the default is the embedded model")
    parser.add_argument("--most-rows", type=int, help="leave larger numbers of rows out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    add_plot_option(parser, "draw growth.png there")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a target is missed")
    args = parser.parse_args(argv)
    if min(args.rounds, args.steps) < 1:
        parser.error(f"--rounds and --steps are {args.rounds} and {args.steps}; at least 1 each")
    if args.most_rows is not None and args.most_rows < 2:
        parser.error(f"--most-rows is {args.most_rows}; growth needs at least 2")
    curves: list[Growth] = []
    if args.what in ("both", "step"):
        rows = _up_to(STEP_ROWS, args.most_rows)
        curves += measure_steps(args.model, rows, args.rounds, args.steps)
    if args.what in ("both", "host"):
        curves += measure_host(_up_to(HOST_ROWS, args.most_rows), args.rounds, args.steps)
    print_growth(Console(), curves)
    if args.json is not None:
        report = {curve.name: curve.as_dict() for curve in curves}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot is not None:
        args.plot.mkdir(parents=True, exist_ok=True)
        ms = {curve.name: curve.ms for curve in curves}
        plot_growth(args.plot / "growth.png", "Decode steps", ms)
    judged = [curve for curve in curves if curve.name == CHECKED]
    is_missed = any(max(one.exponent, one.last_exponent) > MOST_EXPONENT for one in judged)
    return 1 if args.check and is_missed else 0


def _up_to(rows: Sequence[int], most: int | None) -> list[int]:
    return [count for count in rows if most is None or count <= most]


if __name__ == "__main__":
    sys.exit(main())
