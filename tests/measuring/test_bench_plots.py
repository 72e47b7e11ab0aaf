"""What the benchmark has to look at: plots, traces, timelines, growth, padding. No times."""

import functools
import gzip
import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from folojax import LLM
from folojax.runner.runner import Runner
from folojax.sched.scheduler import Scheduler
from tests.reference import TINY

SCRIPTS = Path(__file__).parents[2] / "scripts" / "measure"
LIMITS: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 64, "page_size": 16}


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # as Python does when it runs the script
        yield importlib.import_module("bench")


def module(bench: ModuleType, name: str) -> Any:
    """One more script, `bench` being importable."""
    return importlib.import_module(name)


def make(bench: ModuleType, sizes: list[tuple[int, int]], num_samples: int = 1) -> Any:
    """A workload of random prompts; sizes are those of prompts and outputs."""
    workloads = module(bench, "bench_workloads")
    requests = [
        workloads.BenchRequest(
            tuple(3 + (i * 31 + j) % 90 for j in range(size)),
            out,
            num_samples=num_samples,
            is_sampled=num_samples > 1,
        )
        for i, (size, out) in enumerate(sizes)
    ]
    return workloads.Workload("handmade", tuple(requests))


def png_size(path: Path) -> tuple[int, int]:
    """Width and height, from the header that every PNG file begins with."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


# Figures under vLLM's names


def test_peaks_and_failures_of_known_times(bench: ModuleType) -> None:
    metrics = module(bench, "bench_metrics")
    traces = [
        metrics.Trace(10.0, 5, "", [[10.5, 10.9, 11.5]], 11.5),
        metrics.Trace(10.2, 5, "", [[11.1, 11.2], [11.3, 12.0]], 12.0),
        metrics.Trace(11.5, 5, "", [[12.5]], 12.5),  # comes when the first one has gone
        metrics.Trace(10.0, 5, "", [[10.1] * 9], 13.0, has_failed=True),
    ]
    figures = metrics.serving_metrics(traces, 2.5)
    assert (figures["completed"], figures["failed"]) == (3, 1)
    assert figures["total_output_tokens"] == 8
    assert figures["max_output_tokens_per_s"] == 4  # from 11.0 up to 12.0
    assert figures["max_concurrent_requests"] == 2
    assert figures["total_token_throughput"] == pytest.approx((15 + 8) / 2.5)
    nothing = metrics.serving_metrics([traces[-1]], 1.0)
    assert nothing["max_output_tokens_per_s"] == nothing["max_concurrent_requests"] == 0
    assert nothing["mean_ttft_ms"] is None


def test_every_latency_has_every_statistic_of_vllm(bench: ModuleType) -> None:
    metrics = module(bench, "bench_metrics")
    # Gaps of 1 to 100 ms.
    times = [sum(range(i + 1)) / 1000 for i in range(101)]
    figures = metrics.serving_metrics([metrics.Trace(0.0, 5, "", [times], times[-1])], 10.0)
    for name in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std", "p50", "p90", "p95", "p99", "max"):
            assert f"{statistic}_{name}_ms" in figures
    assert figures["mean_itl_ms"] == pytest.approx(50.5)
    assert figures["median_itl_ms"] == figures["p50_itl_ms"] == pytest.approx(50.5)
    assert figures["p90_itl_ms"] == pytest.approx(90.1)
    assert figures["p95_itl_ms"] == pytest.approx(95.05)
    assert figures["p99_itl_ms"] == pytest.approx(99.01)
    assert figures["std_itl_ms"] == pytest.approx(28.866, abs=1e-3)
    assert figures["mean_tpot_ms"] == pytest.approx(50.5)


# Plots


def test_lines_of_a_sweep_are_in_the_order_of_numbers(bench: ModuleType) -> None:
    def one(median: float) -> dict[str, float]:
        return {
            "output_throughput": median,
            "min_output_throughput": median - 1,
            "max_output_throughput": median + 2,
        }

    sweep = {"16": {"a": one(50.0), "b": one(20.0)}, "8": {"a": one(30.0), "b": one(15.0)}}
    lines = module(bench, "bench_plots").throughput_lines(sweep)
    assert lines == {
        "a": [(8, 30.0, 29.0, 32.0), (16, 50.0, 49.0, 52.0)],
        "b": [(8, 15.0, 14.0, 17.0), (16, 20.0, 19.0, 22.0)],
    }


@pytest.mark.slow
def test_a_run_is_drawn_and_traced(bench: ModuleType, text_directory: Path, tmp_path: Path) -> None:
    plots, traces, out = tmp_path / "plots", tmp_path / "traces", tmp_path / "out.json"
    argv = ["uniform", "--model", str(text_directory), "--num-requests", "3", "--scale", "0.1"]
    argv += ["--num-running", "2", "--sweep", "1", "2", "--rounds", "2", "--in-process"]
    argv += ["--warm-up", "rehearsal", "--json", str(out)]
    assert bench.main([*argv, "--plot", str(plots), "--trace", str(traces)]) == 0
    names = {"latencies.png", "throughput.png", "occupancy-folojax-auto.png"}
    assert {path.name for path in plots.iterdir()} == names
    for path in plots.iterdir():
        width, height = png_size(path)
        assert min(width, height) > 400
    report = json.loads(out.read_text())
    assert set(report["sweep"]) == {"1", "2"}
    assert report["num_prompts"] == 3
    assert report["max_concurrency"] == 2
    results = report["results"]["folojax auto"]
    assert report["sweep"]["2"]["folojax auto"]["duration"] == results["duration"]
    check_timeline(results["timeline"], most_running=2)
    # The same again, from the report alone.
    again = tmp_path / "again"
    assert module(bench, "bench_plots").main([str(out), str(again)]) == 0
    assert {path.name for path in again.iterdir()} == names
    check_trace(traces / "folojax-auto.perfetto.json.gz", results["num_steps"])


def check_timeline(timeline: dict[str, list[float]], most_running: int) -> None:
    """What must hold of three requests on an engine that had nothing to do."""
    assert len({len(values) for values in timeline.values()}) == 1
    assert timeline["time_s"] == sorted(timeline["time_s"])
    assert timeline["time_s"][0] > 0
    assert max(timeline["running"]) == most_running
    assert timeline["waiting"][0] == 3 - most_running
    assert timeline["running"][-1] == timeline["waiting"][-1] == timeline["used_pages"][-1] == 0
    pools = zip(
        *(timeline[name] for name in ("used_pages", "idle_pages", "free_pages")), strict=True
    )
    assert len({sum(pool) for pool in pools}) == 1


def check_trace(path: Path, num_steps: int) -> None:
    """Every phase is there, and lies in a step."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    slices = [event for event in events if event.get("ph") == "X"]
    steps = [one for one in slices if one["name"] == "step"]
    assert len(steps) >= num_steps
    threads = {one["tid"] for one in steps}
    assert len(threads) == 1
    for phase in (
        "schedule",
        "pack",
        "dispatch",
        "device wait",
        "read back",
        "commit",
        "detokenise",
    ):
        found = [one for one in slices if one["name"] == phase]
        assert found, f"the trace has no {phase}"
        assert {one["tid"] for one in found} == threads
        for one in found:
            assert any(
                step["ts"] <= one["ts"] and one["ts"] + one["dur"] <= step["ts"] + step["dur"] + 1
                for step in steps
            )


def test_nothing_is_wrapped_once_a_profile_is_over(bench: ModuleType) -> None:
    profile = module(bench, "bench_profile")
    owners = [pair for pairs in profile.PHASES.values() for pair in pairs]
    before = [getattr(owner, name) for owner, name in owners]
    with profile.profile_steps():
        assert all(
            getattr(owner, name) is not function
            for (owner, name), function in zip(owners, before, strict=True)
        )
    assert [getattr(owner, name) for owner, name in owners] == before
    assert (Scheduler, "schedule") in owners
    assert (Runner, "collect") in owners


def test_phases_add_up_on_a_clock_of_their_own(bench: ModuleType) -> None:
    profile = module(bench, "bench_profile")
    ticks = iter(range(100))
    stopwatch = profile.Stopwatch(clock=lambda: float(next(ticks)))
    inner = stopwatch.wrap(lambda: None, "schedule")
    outer = stopwatch.wrap(lambda: (inner(), inner()), "other")
    outer()
    # One tick each: outer begins, inner begins and ends, twice, outer ends.
    assert stopwatch.seconds["schedule"] == 2
    assert stopwatch.seconds["other"] == 3
    assert stopwatch.shares()["other"] == pytest.approx(0.6)
    assert sum(stopwatch.seconds.values()) == 5


# Growth


def test_exponents_of_known_growth(bench: ModuleType) -> None:
    growth = module(bench, "bench_growth")
    rows = (1, 2, 4, 8, 16, 32, 64)
    assert growth.fit_exponent({n: 0.3 * n for n in rows}) == pytest.approx(1)
    assert growth.fit_exponent(dict.fromkeys(rows, 5.0)) == pytest.approx(0)
    # Flat at first: what a step costs anyway hides that each doubling costs four times as much.
    late = growth.Growth("late", {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 4.0, 32: 16.0, 64: 64.0})
    assert late.exponent < 2
    assert late.last_exponent == pytest.approx(2)
    assert late.as_dict()["ms_by_rows"][64] == 64.0


@pytest.mark.slow
def test_growth_is_measured_printed_and_drawn(
    bench: ModuleType, text_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    growth, out = module(bench, "bench_growth"), tmp_path / "growth.json"
    argv = ["--model", str(text_directory), "--most-rows", "4", "--rounds", "1", "--steps", "3"]
    assert growth.main([*argv, "--json", str(out), "--plot", str(tmp_path)]) == 0
    report = json.loads(out.read_text())
    names = {"step", "calls to the device", "host", "host, no device", "the least"}
    assert set(report) == names
    for curve in report.values():
        assert list(curve["ms_by_rows"]) == ["1", "2", "4"]
        assert all(ms > 0 for ms in curve["ms_by_rows"].values())
    assert png_size(tmp_path / "growth.png")[0] > 400
    printed = capsys.readouterr().out
    assert "exponent" in printed
    assert f"{report['host']['exponent']:.2f}" in printed
    with pytest.raises(SystemExit):
        growth.main(["--most-rows", "1"])
    assert "growth needs at least 2" in capsys.readouterr().err


# Padding


def test_padding_of_a_workload_that_is_counted_by_hand(bench: ModuleType) -> None:
    padding = module(bench, "bench_padding")
    # Prefill: five rows of 16 tokens in eight. Then two steps of five rows in six, one of one.
    sizes = [(16, 3), (16, 3), (15, 4), (16, 3), (16, 3)]
    limits = LIMITS | {"max_num_seqs": 8}
    counts = padding.count_padding(make(bench, sizes), 128, **limits)
    assert counts["prefill_tokens"] == 79
    assert counts["prefill_padding_tokens"] == 49
    assert counts["padding_tokens"] == 49 + 2
    assert counts["scheduled_tokens"] == 79 + 11
    assert counts["prefill_padding_waste"] == pytest.approx(49 / 128)
    assert counts["decode_padding_waste"] == pytest.approx(2 / 13)
    assert counts["padding_waste"] == pytest.approx(51 / 141)


@pytest.mark.parametrize("num_samples", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_without_a_device_the_counts_are_those_of_a_real_engine(
    bench: ModuleType, tiny_model: tuple, num_samples: int
) -> None:
    sizes = [(5, 9), (40, 3), (16, 12), (1, 2), (33, 7), (17, 5)]
    workload = make(bench, sizes, num_samples)
    counts = module(bench, "bench_padding").count_padding(workload, TINY["vocab_size"], **LIMITS)
    make_llm = functools.partial(LLM, tiny_model, **LIMITS)
    contender = bench.Folojax("real", make_llm, warm_up="rehearsal")
    contender.prepare(workload)
    figures = contender.run(workload)
    assert counts == {name: figures[name] for name in counts}
    assert counts["padding_tokens"] > 0


def test_padding_is_printed_for_each_workload(
    bench: ModuleType, text_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    padding, out = module(bench, "bench_padding"), tmp_path / "padding.json"
    argv = ["uniform", "group", "--model", str(text_directory), "--scale", "0.1"]
    assert padding.main([*argv, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert list(report) == ["uniform", "group"]
    printed = capsys.readouterr().out
    for counts in report.values():
        assert f"{counts['padding_waste']:.1%}" in printed
    with pytest.raises(SystemExit):
        padding.main(["nonsense"])
    assert "no workloads ['nonsense']" in capsys.readouterr().err
