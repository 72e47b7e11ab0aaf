"""Generate text for several prompts in one continuous batch.

python scripts/generate.py
python scripts/generate.py --prompts "The sea is" "Once upon a time" --no-chat --max-tokens 40
python scripts/generate.py --prompts "Tell me a story." --system "You are a pirate." --stream
python scripts/generate.py --model path/to/model --temperature 0.7 --top-p 0.9 --n 3 --seed 1
python scripts/generate.py --prompts-file prompts.txt --stop "." --logprobs 3 --json out.json
python scripts/generate.py --num-prompts 32 --max-tokens 64 --ignore-eos --compare-sequential
python scripts/generate.py --max-model-len 512 --plan
python scripts/generate.py --input requests.jsonl --output answers.jsonl --resume
head -n 9 requests.jsonl | python scripts/generate.py --input - > answers.jsonl

JSON Lines: a line of --input is {"prompt" | "messages" | "prompt_token_ids": ..., "sampling":
{fields of SamplingParams}, "id": ...}; the options below are what "sampling" leaves out. A "prompt"
is text as the model sees it, "messages" go through the chat template. A line of --output is {"id",
"line", "outputs", "usage"}, or {"id", "line", "error"} of a line that cannot be run; it is written
when the request ends. A run that was killed goes on with --resume, the same input and the same
options: no line is lost or done twice, and the tokens are those of an unbroken run.

Exit code: 0; 1 if lines of --input went wrong; 2 after a mistake in the options; 130 after Ctrl-C.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import jax
from rich.console import Console

if TYPE_CHECKING:  # slow to import: --help and bad options answer before it
    from folojax import LLM, RequestOutput, SamplingParams
    from folojax.requests.prompts import Prompt

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
    """Reads the command line; ValueError says what is wrong with it.

    An option whose name is a field of SamplingParams is that field.
    """
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", help="directory, .gguf file or Hub name; default: SmolLM2-135M-Instruct")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16; default: auto")
    add("--quantization", help="int8 or int4: kernels in few bits; only on CPU; default: none")
    add("--max-num-seqs", type=int, default=32, help="most requests at once; default: 32")
    add("--max-num-batched-tokens", type=int, help="budget of a step; default: by device")
    add("--max-model-len", type=int, help="most tokens of a request; default: the model's limit")
    add("--plan", action="store_true", help="list every executable that may be needed, and end")
    add("--warm-up", action="store_true", help="compile them all first; with --plan, tell the cost")
    add("--memory-fraction", type=float, help="share of the device's memory; default: by device")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompts", nargs="+", default=[], metavar="TEXT", help="default: five of our own")
    add("--prompts-file", type=Path, metavar="FILE", help="a text file with one prompt a line")
    add("--num-prompts", type=int, help="repeat or cut the prompts to this number")
    add("--chat", action=argparse.BooleanOptionalAction, help="default: if there is a template")
    add("--system", metavar="TEXT", help="what a chat's system message says")
    add = parser.add_argument_group("sampling").add_argument
    add("--n", type=int, default=1, help="samples of each prompt; default: 1")
    add("--max-tokens", type=int, default=64, help="most new tokens of a prompt; default: 64")
    add("--min-tokens", type=int, default=0, help="no end before so many; default: 0")
    add("--temperature", type=float, default=0.0, help="default: 0, which is greedy")
    add("--top-k", type=int, default=0, help="default: 0, which is off")
    add("--top-p", type=float, default=1.0, help="default: 1, which is off")
    add("--min-p", type=float, default=0.0, help="default: 0, which is off")
    add("--repetition-penalty", type=float, help="default: 1, which is off")
    add("--presence-penalty", type=float, help="default: 0, which is off")
    add("--frequency-penalty", type=float, help="default: 0, which is off")
    add("--seed", type=int, help="the same seed gives the same text; default with --input: 0")
    add("--stop", nargs="+", action="extend", metavar="TEXT", help="strings that end the text")
    add("--ignore-eos", action="store_true", help="go on to --max-tokens")
    add = parser.add_argument_group("output").add_argument
    add("--stream", action="store_true", help="print text as it comes, prompts in order")
    add("--logprobs", type=int, metavar="K", help="show each token's, and those of the K likeliest")
    add("--compare-sequential", action="store_true", help="run one request at a time too")
    add("--json", type=Path, metavar="FILE", help="write results and metrics to this file")
    add = parser.add_argument_group("JSON Lines").add_argument
    add("--input", type=Path, metavar="FILE", help="a request a line; - is standard input")
    add("--output", type=Path, metavar="FILE", help="default: -, which is standard output")
    add("--resume", action="store_true", help="go on after what is in --output already")
    add("--overwrite", action="store_true", help="drop what is in --output already")
    args = parser.parse_args(argv)
    _check_together(parser, args)
    return args


def generate(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if args.input is not None:
        return _generate_jsonl(args)
    texts = _read_prompts(args.prompts, args.prompts_file, args.num_prompts)
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such directory")
    from generate_print import as_json, print_logprobs, print_metrics, print_outputs

    from folojax import batch_metrics

    params = sampling_params(args)
    console, log = Console(), Console(stderr=True)
    llm = _load(args, log)
    if args.plan:
        console.print(str(llm.plan()), highlight=False, soft_wrap=True)
        return 0
    inputs = _as_inputs(llm, texts, args.chat, args.system)
    log.print(f"{len(texts)} prompts, {llm.config.max_num_seqs} at once", style="dim")
    if args.compare_sequential:
        with log.status("Compiling, so that neither run pays for it"):
            _warm_up(llm, inputs, params)
    with _CompileTime() as compiling:
        if args.stream:
            outputs = _stream(console, llm, texts, inputs, params)
        else:
            outputs = llm.generate(inputs, params)
    if args.stream:
        console = log  # standard output has the texts and nothing else
    else:
        print_outputs(console, texts, outputs)
    if args.logprobs is not None:
        print_logprobs(console, outputs)
    report = {
        "outputs": [
            as_json(output) | {"prompt": text} for text, output in zip(texts, outputs, strict=True)
        ],
        "batch": as_json(batch_metrics(outputs)),
    }
    if args.compare_sequential:
        with log.status("One request at a time"):
            sequential = [llm.generate(one, params, use_tqdm=False)[0] for one in inputs]
        report["sequential"] = as_json(batch_metrics(sequential))
        report["is_equal"] = [_token_ids(o) for o in outputs] == [_token_ids(o) for o in sequential]
    print_metrics(console, report)
    if compiling.seconds > 0.5:
        console.print(
            f"{compiling.seconds:.1f} s of the batch's time went into compiling, or into loading "
            "what an earlier run had compiled.",
            style="dim",
        )
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return 0


def _generate_jsonl(args: argparse.Namespace) -> int:
    from generate_jsonl import STANDARD, open_files, run_job

    params = sampling_params(args)
    target = args.output or STANDARD
    with open_files(args.input, target, resume=args.resume, overwrite=args.overwrite) as (
        lines,
        output,
    ):
        llm = _load(args, Console(stderr=True))
        defaults = dataclasses.replace(params, seed=None)
        return run_job(llm, lines, output, defaults, params.seed or 0)


def _stream(
    console: Console,
    llm: "LLM",
    texts: Sequence[str],
    inputs: Sequence["Prompt"],
    params: "SamplingParams",
) -> list["RequestOutput"]:
    from generate_print import InOrder

    printer = InOrder(console, texts, params.n)
    outputs: dict[int, RequestOutput] = {}
    for index, prompt in enumerate(inputs):
        llm.add_request(str(index), prompt, params)
    while llm.has_unfinished_requests():
        for output in llm.step():
            printer.show(int(output.request_id), output)
            outputs[int(output.request_id)] = output
    return [outputs[index] for index in range(len(inputs))]


def _check_together(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options that mean nothing beside another, rather than ignoring them."""
    given = {
        name
        for name, value in vars(args).items()
        if value is not None and value != parser.get_default(name)
    }
    shown = {"prompts", "prompts_file", "num_prompts", "chat", "system"}
    shown |= {"stream", "compare_sequential", "json"}
    refused = {
        "input": shown,
        "stream": {"compare_sequential"},
        "plan": {"stream", "compare_sequential", "json", "input"},
    }
    for name, others in refused.items():
        both = sorted(others & given)
        if name in given and both:
            raise ValueError(f"{_option(both[0])} has no meaning beside {_option(name)}")
    for name in ("output", "resume", "overwrite"):
        if name in given and "input" not in given:
            raise ValueError(f"{_option(name)} needs --input")
    if args.system is not None and args.chat is False:
        raise ValueError("--system has no meaning beside --no-chat")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def sampling_params(args: argparse.Namespace) -> "SamplingParams":
    """The options that are fields of SamplingParams; ValueError if one is out of range."""
    from folojax import SamplingParams

    known = {field.name for field in dataclasses.fields(SamplingParams)}
    return SamplingParams(**{k: v for k, v in vars(args).items() if k in known and v is not None})


def _load(args: argparse.Namespace, log: Console) -> "LLM":
    from folojax import LLM

    with log.status("Loading the model"):
        llm = LLM(
            args.model,
            dtype=args.dtype,
            quantization=args.quantization,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=args.max_model_len,
            memory_fraction=args.memory_fraction,
        )
    log.print(str(llm.memory_plan), style="dim", highlight=False, soft_wrap=True)
    if args.warm_up:
        with log.status("Compiling all that may be needed"):
            llm.warm_up()
    return llm


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


def _as_inputs(
    llm: "LLM", texts: Sequence[str], chat: bool | None, system: str | None
) -> Sequence["Prompt"]:
    tokenizer = llm.get_tokenizer()
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    if not (chat or system is not None or (has_template and chat is None)):
        return texts
    before = [] if system is None else [{"role": "system", "content": system}]
    return [llm.render_chat([*before, {"role": "user", "content": text}]) for text in texts]


def _warm_up(llm: "LLM", inputs: Sequence["Prompt"], params: "SamplingParams") -> None:
    """Runs every shape of both runs: all of the batch, each prompt alone, and a whole answer."""
    llm.generate(inputs, params, use_tqdm=False)
    short = dataclasses.replace(params, max_tokens=2, min_tokens=0)
    for one in inputs:
        llm.generate(one, short, use_tqdm=False)
    llm.generate(inputs[0], params, use_tqdm=False)


def _token_ids(output: "RequestOutput") -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; a mistake of the user's is one line and exit code 2."""
    try:
        return generate(parse_args(argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read standard output has gone; else Python would stumble over it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: standard output was closed", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
