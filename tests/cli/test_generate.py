"""`folojax` as a person calls it."""

import io
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from folojax import LLM, SamplingParams
from folojax.cli.arguments import sampling_params
from folojax.cli.generate import DEFAULT_PROMPTS
from folojax.cli.main import main, parse_args
from folojax.cli.show import InOrder
from folojax.compile.programs import clear_programs
from folojax.runner.runner import Runner

COMMAND = [sys.executable, "-c", "from folojax.cli.main import main; raise SystemExit(main())"]


def test_the_five_default_prompts(call: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, text, _ = call("--max-tokens", "4", "--json", str(out))
    assert code == 0
    report = json.loads(out.read_text())
    assert [entry["prompt"] for entry in report["outputs"]] == list(DEFAULT_PROMPTS)
    assert len(DEFAULT_PROMPTS) == 5
    assert all(prompt in text for prompt in DEFAULT_PROMPTS)
    assert report["batch"]["num_requests"] == 5
    assert report["batch"]["output_throughput"] > 0
    assert report["outputs"][0]["metrics"]["ttft_s"] > 0
    assert report["outputs"][0]["outputs"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.slow
def test_kernels_in_few_bits(
    text_directory: Path, capsys: pytest.CaptureFixture[str], call: Callable
) -> None:
    assert call("--max-tokens", "2", "--quantization", "int4")[0] == 0
    sizes = []
    for options in ((), ("--quantization", "int4")):
        assert main(["plan", "--model", str(text_directory), *options]) == 0
        log = capsys.readouterr().err
        (size,) = re.findall(r"weights ([\d.]+) MiB", log)
        sizes.append(float(size))
    assert sizes[1] < 0.3 * sizes[0]


def test_prompts_come_from_options_and_files(call: Callable, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    file.write_text("Three\n\nFour\n")
    options = ["--prompts", "One", "Two", "--prompts-file", str(file), "--json", str(out)]
    assert call(*options, "--max-tokens", "2", "--no-chat")[0] == 0
    outputs = json.loads(out.read_text())["outputs"]
    assert [entry["prompt"] for entry in outputs] == ["One", "Two", "Three", "Four"]
    assert call(*options, "--max-tokens", "2", "--no-chat", "--num-prompts", "6")[0] == 0
    outputs = json.loads(out.read_text())["outputs"]
    assert [entry["prompt"] for entry in outputs] == ["One", "Two", "Three", "Four", "One", "Two"]


def test_chat_is_the_default_where_there_is_a_template(call: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    lengths = []
    for options in ((), ("--chat",), ("--no-chat",)):
        code, _, _ = call("--prompts", "One", "--max-tokens", "2", "--json", str(out), *options)
        assert code == 0
        lengths.append(len(json.loads(out.read_text())["outputs"][0]["prompt_token_ids"]))
    assert lengths[0] == lengths[1] > lengths[2] == 1


def test_compare_sequential_prints_both_runs(call: Callable) -> None:
    code, text, _ = call(
        "--num-prompts", "6", "--max-tokens", "4", "--ignore-eos", "--compare-sequential"
    )
    assert code == 0
    for word in ("batch", "sequential", "speed-up", "time saved", "the same tokens"):
        assert word in text
    assert "NOT" not in text


def test_one_prompt_streams_plainly(call: Callable, tmp_path: Path) -> None:
    """Standard output has the text alone, so that it can go through a pipe."""
    out = tmp_path / "out.json"
    code, text, error = call(
        "--prompts", "One", "--max-tokens", "9", "--stream", "--ignore-eos", "--json", str(out)
    )
    assert code == 0
    assert (
        text.removesuffix("\n") == json.loads(out.read_text())["outputs"][0]["outputs"][0]["text"]
    )
    assert "output tokens per second" in error


def test_several_prompts_stream_in_order(call: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--prompts", "One", "Two", "--max-tokens", "5", "--seed", "1", "--json", str(out)]
    options += ["--n", "2", "--temperature", "1", "--ignore-eos"]
    assert call(*options)[0] == 0
    expected = json.loads(out.read_text())["outputs"]
    code, text, _ = call(*options, "--stream")
    assert code == 0
    assert _samples(json.loads(out.read_text())["outputs"]) == _samples(expected)
    for index, entry in enumerate(expected):
        head, text = text[: text.index("sample 1")], text[text.index("sample 1") :]
        assert head == f"{index + 1}. {entry['prompt']}\n"
        for sample, completion in enumerate(entry["outputs"]):
            start = f"sample {sample + 1}\n{completion['text']}\n\n"
            assert text.startswith(start)
            text = text.removeprefix(start)
    assert text == ""


def _samples(outputs: list[dict[str, Any]]) -> list[list[tuple[int, str]]]:
    return [[(one["seed"], one["text"]) for one in output["outputs"]] for output in outputs]


def test_what_streams_only_grows() -> None:
    """Texts of four samples grow at random; each is live once those before it have ended."""
    draw = random.Random(0)
    finals = [["alpha :smile:", ""], ["[bold]gamma", "delta\n"]]
    lengths = [[0, 0], [0, 0]]
    stream = io.StringIO()
    printer = InOrder(Console(file=stream), ["first", "second"], 2)
    before = ""
    for _ in range(200):
        index, sample = draw.randrange(2), draw.randrange(2)
        lengths[index][sample] = min(lengths[index][sample] + 1, len(finals[index][sample]))
        parts = zip(finals[index], lengths[index], strict=True)
        outputs = [
            SimpleNamespace(text=f[:n], finish_reason="stop" if n == len(f) else None)
            for f, n in parts
        ]
        newest: Any = SimpleNamespace(outputs=outputs)
        printer.show(index, newest)
        assert stream.getvalue().startswith(before)
        before = stream.getvalue()
    assert before == (
        "1. first\nsample 1\nalpha :smile:\n\nsample 2\n\n\n"
        "2. second\nsample 1\n[bold]gamma\n\nsample 2\ndelta\n\n\n"
    )


def test_a_system_message_comes_first(call: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    lengths = []
    for options in ((), ("--system", "Be brief."), ("--system", "Be very very brief.")):
        options = (*options, "--prompts", "One", "--max-tokens", "1", "--json", str(out))
        assert call(*options)[0] == 0
        lengths.append(len(json.loads(out.read_text())["outputs"][0]["prompt_token_ids"]))
    assert lengths[2] == lengths[1] + 2


def test_logprobs_are_shown_and_written(call: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ("--prompts", "One", "--max-tokens", "2", "--ignore-eos", "--json", str(out))
    code, text, _ = call(*options, "--logprobs", "2")
    assert code == 0
    assert "Log-probabilities 1.1" in text
    (completion,) = json.loads(out.read_text())["outputs"][0]["outputs"]
    for token, logprobs in zip(completion["token_ids"], completion["logprobs"], strict=True):
        assert len(logprobs) == 2  # greedy: the sampled token is the likeliest
        assert logprobs[str(token)]["rank"] == 1
        assert f"{logprobs[str(token)]['logprob']:.3f}" in text


def test_stop_strings_end_the_text(call: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ("--prompts", "One", "--max-tokens", "12", "--ignore-eos", "--json", str(out))
    assert call(*options)[0] == 0
    text = json.loads(out.read_text())["outputs"][0]["outputs"][0]["text"]
    stop = text[len(text) // 2]
    code, shown, _ = call(*options, "--stop", "never there", "--stop", stop, "neither")
    assert code == 0
    (completion,) = json.loads(out.read_text())["outputs"][0]["outputs"]
    assert completion["text"] == text[: text.index(stop)]
    assert (completion["finish_reason"], completion["stop_reason"]) == ("stop", stop)
    assert f"stop: {stop!r}" in shown


def test_options_with_the_name_of_a_field_reach_it() -> None:
    wanted: dict[str, Any] = {
        "n": 2,
        "max_tokens": 9,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.5,
        "frequency_penalty": 0.5,
        "seed": 7,
        "logprobs": -1,
    }
    options = [part for k, v in wanted.items() for part in ("--" + k.replace("_", "-"), str(v))]
    options += ["--stop", "a", "b", "--stop", "c", "--ignore-eos"]
    assert sampling_params(parse_args(["generate", *options])) == SamplingParams(
        stop=["a", "b", "c"], ignore_eos=True, **wanted
    )
    assert sampling_params(parse_args(["generate"])) == SamplingParams(temperature=0, max_tokens=64)


@pytest.mark.parametrize("command", ["generate", "bench", "plan"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, count in (([command, "--help"], 3), (["--help"], 1)):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        assert capsys.readouterr().out.count(f"folojax {command}") >= count


def test_ctrl_c_ends_it_with_130(text_directory: Path) -> None:
    """A run that would take minutes, interrupted once it has begun to generate."""
    limits = ["--max-model-len", "128", "--max-tokens", "100", "--num-prompts", "5000"]
    command = [*COMMAND, "generate", "--model", str(text_directory), *limits, "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"5,000 prompts, 32 at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert error.decode().strip().splitlines()[-1] == "interrupted"


def test_ctrl_c_keeps_the_text_of_those_that_had_begun(
    call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of six prompts have ended and two go on when it comes, inside of a step or between."""
    out = tmp_path / "out.json"
    options = ("--num-prompts", "6", "--ignore-eos", "--max-num-seqs", "2", "--json", str(out))
    assert call(*options, "--max-tokens", "6")[0] == 0
    whole = [one["outputs"][0]["text"] for one in json.loads(out.read_text())["outputs"]]
    step, dispatch = LLM.step, Runner.dispatch
    counts = {"step": 0, "dispatch": 0}

    def interrupted(name: str, limit: int, function: Callable) -> Callable:
        def call_it(*args: Any) -> Any:
            counts[name] += 1
            if counts[name] == limit:
                raise KeyboardInterrupt
            return function(*args)

        return call_it

    for name in ("step", "dispatch"):
        for is_streamed in (False, True):
            counts[name] = 0
            with monkeypatch.context() as patch:
                owner, function = (LLM, step) if name == "step" else (Runner, dispatch)
                patch.setattr(owner, name, interrupted(name, 12, function))
                more = ("--stream",) if is_streamed else ()
                code, text, error = call(*options, "--max-tokens", "6", *more)
            assert code == 130
            assert error.splitlines()[-1] == "interrupted"
            assert [line[:2] for line in text.splitlines() if re.match(r"\d\. ", line)] == [
                "1.",
                "2.",
                "3.",
                "4.",
            ]
            written = [one["outputs"][0] for one in json.loads(out.read_text())["outputs"]]
            reasons = [one["finish_reason"] for one in written]
            assert reasons == ["length"] * 2 + ["abort"] * 4
            for one, full in zip(written, whole, strict=True):
                assert full.startswith(one["text"])
                assert one["text"].strip() in text
            assert [bool(one["token_ids"]) for one in written] == [True] * 4 + [False] * 2


def test_standard_input_is_one_prompt_or_a_prompt_a_line(
    call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    rest = ("--max-tokens", "1", "--no-chat", "--json", str(out))
    for options, expected in (
        (("--prompts", "-"), ["One\n\nTwo"]),
        (("--prompts", "Zero", "-"), ["Zero", "One\n\nTwo"]),
        (("--prompts-file", "-"), ["One", "Two"]),
        (("--prompts", "Zero", "--prompts-file", "-"), ["Zero", "One", "Two"]),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"One\n\nTwo\n")))
        assert call(*options, *rest)[0] == 0
        assert [one["prompt"] for one in json.loads(out.read_text())["outputs"]] == expected


def test_what_is_said_on_the_way_is_what_is_not_known(call: Callable) -> None:
    """Nothing of memory, and of numbers only where some have to wait."""
    options = ("--max-tokens", "1", "--ignore-eos")
    for given, expected in (
        (("--num-prompts", "1"), ""),
        (("--num-prompts", "4"), ""),
        (("--num-prompts", "5"), "5 prompts, 4 at once\n"),
        (
            ("--num-prompts", "1", "--n", "5", "--temperature", "1"),
            "1 prompt of 5 samples, 4 at once\n",
        ),
    ):
        assert call(*options, *given)[2] == expected


def test_compiling_is_told_beside_the_figures_and_left_out_of_rates(
    call: Callable, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    options = ("--prompts", "One", "--max-tokens", "3", "--ignore-eos", "--json", str(out))
    # A width that no other test has, so that it is compiled here.
    shape = ("--max-model-len", "72", "--page-size", "24")
    clear_programs()
    _, text, _ = call(*options, *shape)
    batch = json.loads(out.read_text())["batch"]
    (one,) = json.loads(out.read_text())["outputs"]
    assert 0 < one["metrics"]["first_token_compile_s"] <= one["metrics"]["compile_s"]
    assert batch["compile_s"] == one["metrics"]["compile_s"] < batch["duration_s"]
    rate = 3 / (batch["duration_s"] - batch["compile_s"])
    assert batch["output_throughput"] == pytest.approx(rate)
    assert f"{batch['duration_s'] - batch['compile_s']:.2f} s" in text
    assert f"{batch['compile_s']:.2f} s" in text
    assert "of compiling" in text
    _, text, _ = call(*options, *shape)
    assert json.loads(out.read_text())["batch"]["compile_s"] == 0
    assert "of compiling" not in text


def test_a_table_that_does_not_fit_is_lines(call: Callable, monkeypatch: Any) -> None:
    options = ("--prompts", "One", "--max-tokens", "2", "--ignore-eos", "--logprobs", "1")
    wide = call(*options)[1]
    monkeypatch.setenv("COLUMNS", "20")
    narrow = call(*options)[1]
    assert "\u2026" not in wide + narrow
    assert "┃" in wide
    assert "┃" not in narrow
    assert "requests\n  batch: 1\n" in narrow
    assert narrow.count("  rank: 1\n") == 2


_STREAM = """
import sys
from folojax.cli.main import main
options = ["--model", sys.argv[1], "--prompts", "One", "--max-tokens", "2", *sys.argv[2:]]
assert main(["generate", *options]) == 0
print(sorted({"torch", "transformers", "optax", "gguf"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("options", [("--stream",), ("--no-chat",)])
def test_the_command_loads_no_more_than_the_library(
    text_directory: Path, options: tuple[str, ...]
) -> None:
    """A chat's template included, which is rendered before the first token."""
    done = subprocess.run(
        [sys.executable, "-c", _STREAM, str(text_directory), "--max-model-len", "128", *options],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == "[]"
