"""Generate text for several prompts in one continuous batch.

python scripts/generate.py
python scripts/generate.py --prompts "The sea is" "Once upon a time" --no-chat --max-tokens 40
python scripts/generate.py --model path/to/model --temperature 0.7 --top-p 0.9 --seed 1
python scripts/generate.py --prompts-file prompts.txt --json out.json
python scripts/generate.py --num-prompts 32 --max-tokens 64 --ignore-eos --compare-sequential
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

DEFAULT_PROMPTS = (
    "What is the capital of France?",
    "Explain quantum computing in simple terms.",
    "Write a haiku about AI.",
    "What are the benefits of exercise?",
    "How does photosynthesis work?",
)


class _Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help shows the options)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ValueError says what is wrong with it."""
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", help="directory, .gguf file or Hub name; default: SmolLM2-135M-Instruct")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16; default: auto")
    add("--prompts", nargs="+", default=[], metavar="TEXT", help="default: five of our own")
    add("--prompts-file", type=Path, help="a text file with one prompt a line")
    add("--num-prompts", type=int, help="repeat or cut the prompts to this number")
    add("--chat", action=argparse.BooleanOptionalAction, help="default: if there is a template")
    add("--max-tokens", type=int, default=64, help="most new tokens of a prompt; default: 64")
    add("--temperature", type=float, default=0.0, help="default: 0, which is greedy")
    add("--top-k", type=int, default=0, help="default: 0, which is off")
    add("--top-p", type=float, default=1.0, help="default: 1, which is off")
    add("--min-p", type=float, default=0.0, help="default: 0, which is off")
    add("--seed", type=int, help="the same seed gives the same text")
    add("--ignore-eos", action="store_true", help="go on to --max-tokens")
    add("--max-num-seqs", type=int, default=32, help="most requests at once; default: 32")
    add("--max-num-batched-tokens", type=int, help="budget of a step; default: by device")
    add("--max-model-len", type=int, help="most tokens of a request; default: the model's limit")
    add("--compare-sequential", action="store_true", help="run one request at a time too")
    add("--json", type=Path, metavar="OUT", help="write results and metrics to this file")
    return parser.parse_args(argv)


def generate(args: argparse.Namespace) -> None:
    """Runs the command."""
    texts = _read_prompts(args.prompts, args.prompts_file, args.num_prompts)
    # Here, so that --help and bad arguments answer at once.
    from folojax import LLM, SamplingParams, batch_metrics

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
    )
    console, log = Console(), Console(stderr=True)
    with log.status("Loading the model"):
        llm = LLM(
            args.model,
            dtype=args.dtype,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=args.max_model_len,
        )
    inputs = _as_inputs(llm, texts, args.chat)
    log.print(
        f"{len(texts)} prompts; {llm.config.max_num_seqs} at once, "
        f"{llm.config.num_pages} pages of {llm.config.page_size} tokens",
        style="dim",
    )
    if args.compare_sequential:
        with log.status("Compiling, so that neither run pays for it"):
            _warm_up(llm, inputs, params)
    with _CompileTime() as compiling:
        outputs = llm.generate(inputs, params)
    _print_outputs(console, texts, outputs)
    report: dict[str, Any] = {
        "outputs": [
            _as_dict(output) | {"prompt": text} for text, output in zip(texts, outputs, strict=True)
        ],
        "batch": _as_dict(batch_metrics(outputs)),
    }
    if args.compare_sequential:
        with log.status("One request at a time"):
            sequential = [llm.generate(one, params, use_tqdm=False)[0] for one in inputs]
        report["sequential"] = _as_dict(batch_metrics(sequential))
        report["is_equal"] = [o.outputs[0].token_ids for o in outputs] == [
            o.outputs[0].token_ids for o in sequential
        ]
    _print_metrics(console, report)
    if compiling.seconds > 0.5:
        console.print(
            f"{compiling.seconds:.1f} s of the batch's time went into compiling, or into loading "
            "what an earlier run had compiled.",
            style="dim",
        )
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


class _CompileTime:
    """Adds up what XLA spends on compiling while it is entered, by JAX's own events."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "_CompileTime":
        jax.monitoring.register_event_duration_secs_listener(self)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self)

    def __call__(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Hears of one event."""
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs


def _read_prompts(
    given: list[str], prompts_file: Path | None, num_prompts: int | None
) -> list[str]:
    if prompts_file is not None:
        try:
            lines = prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts-file {prompts_file}: {error}") from error
        given = [*given, *(line for line in lines if line.strip())]
        if not given:
            raise ValueError(f"--prompts-file {prompts_file} has no prompt in it")
    texts = given or list(DEFAULT_PROMPTS)
    count = len(texts) if num_prompts is None else num_prompts
    if count < 1:
        raise ValueError(f"--num-prompts is {count}; it must be at least 1")
    return [texts[i % len(texts)] for i in range(count)]


def _as_inputs(llm: Any, texts: list[str], chat: bool | None) -> list[Any]:
    has_template = llm.get_tokenizer().chat_template is not None
    if not (has_template if chat is None else chat):
        return texts
    return [llm.render_chat([{"role": "user", "content": text}]) for text in texts]


def _warm_up(llm: Any, inputs: list[Any], params: Any) -> None:
    """Runs every shape of both runs: all of the batch, each prompt alone, and a whole answer."""
    llm.generate(inputs, params, use_tqdm=False)
    for one in inputs:
        llm.generate(one, dataclasses.replace(params, max_tokens=2), use_tqdm=False)
    llm.generate(inputs[0], params, use_tqdm=False)


def _as_dict(value: Any) -> dict[str, Any]:
    """Fields and properties of a dataclass, those of its parts included."""
    out = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    for name, attribute in vars(type(value)).items():
        if isinstance(attribute, property):
            out[name] = _plain(getattr(value, name))
    return out


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _as_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _print_outputs(console: Console, texts: list[str], outputs: list[Any]) -> None:
    for index, (text, output) in enumerate(zip(texts, outputs, strict=True)):
        completion = output.outputs[0]
        console.print(f"[bold cyan]{index + 1}. {escape(text)}[/]")
        console.print(escape(completion.text.strip()))
        console.print(
            f"[dim]{len(completion.token_ids)} tokens, {completion.finish_reason}; "
            f"first token {_ms(output.metrics.ttft_s)}, then {_ms(output.metrics.tpot_s)} each"
            f"[/]\n"
        )


def _print_metrics(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="Metrics", title_justify="left")
    table.add_column("")
    runs = [name for name in ("batch", "sequential") if name in report]
    for name in runs:
        table.add_column(name, justify="right")
    rows = {
        "requests": lambda m: str(m["num_requests"]),
        "prompt tokens": lambda m: str(m["num_prompt_tokens"]),
        "output tokens": lambda m: str(m["num_output_tokens"]),
        "total time": lambda m: f"{m['duration_s']:.2f} s",
        "output tokens per second": lambda m: f"{m['output_throughput']:.1f}",
        "mean time to first token": lambda m: _ms(m["mean_ttft_s"]),
        "mean time per token after it": lambda m: _ms(m["mean_tpot_s"]),
        "preemptions": lambda m: str(m["num_preemptions"]),
    }
    for label, show in rows.items():
        table.add_row(label, *(show(report[name]) for name in runs))
    console.print(table)
    if "sequential" in report:
        batch, sequential = report["batch"], report["sequential"]
        saved = sequential["duration_s"] - batch["duration_s"]
        speedup = batch["output_throughput"] / sequential["output_throughput"]
        equal = "the same tokens" if report["is_equal"] else "NOT the same tokens"
        console.print(f"speed-up {speedup:.2f}x, time saved {saved:.2f} s, {equal}")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"


def main(argv: list[str] | None = None) -> int:
    """Runs the command; a mistake of the user's is one line and exit code 2."""
    try:
        generate(parse_args(argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
