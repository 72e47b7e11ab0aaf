"""Generate text for several prompts in one continuous batch.

folojax generate
folojax generate --prompts "The sea is" "Once upon a time" --no-chat --max-tokens 40
folojax generate --prompts "Tell me a story." --system "You are a pirate." --stream
folojax generate --model path/to/model --temperature 0.7 --top-p 0.9 --n 3 --seed 1
folojax generate --prompts-file prompts.txt --stop "." --logprobs 3 --json out.json
folojax generate --num-prompts 32 --max-tokens 64 --ignore-eos --compare-sequential
folojax generate --quantization int4     on CPU twice as fast, with other tokens here and there
folojax generate --input requests.jsonl --output answers.jsonl --resume
head -n 9 requests.jsonl | folojax generate --input - > answers.jsonl

JSON Lines: a line of --input is {"prompt" | "messages" | "prompt_token_ids": ..., "sampling":
{fields of SamplingParams}, "id": ...}; the options below are what "sampling" leaves out. A "prompt"
is text as the model sees it, "messages" go through the chat template. A line of --output is {"id",
"line", "outputs", "usage"}, or {"id", "line", "error"} of a line that cannot be run; it is written
when the request ends. A run that was killed goes on with --resume, the same input and the same
options: no line is lost or done twice, and the tokens are those of an unbroken run.
"""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from folojax.cli.arguments import (
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    check_json_path,
    load_llm,
    read_prompts,
    sampling_params,
)
from folojax.cli.jsonl_job import STANDARD, open_files, run_job
from folojax.cli.show import InOrder, as_json, print_logprobs, print_metrics, print_outputs
from folojax.llm import LLM
from folojax.requests.outputs import RequestOutput, batch_metrics
from folojax.requests.prompts import Prompt
from folojax.requests.sampling_params import SamplingParams

DEFAULT_PROMPTS = (
    "What is the capital of France?",
    "Explain quantum computing in simple terms.",
    "Write a haiku about AI.",
    "What are the benefits of exercise?",
    "How does photosynthesis work?",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_model_options(parser)
    add = add_prompt_options(parser, "five of our own").add_argument
    add("--chat", action=argparse.BooleanOptionalAction, help="default: if there is a template")
    add("--system", metavar="TEXT", help="what a chat's system message says")
    add_sampling_options(parser, {"temperature": 0.0, "max_tokens": 64})
    add = parser.add_argument_group("output").add_argument
    add(
        "--stream",
        action="store_const",
        const=True,
        help="print text as it comes, prompts in order",
    )
    add(
        "--compare-sequential",
        action="store_const",
        const=True,
        help="run one request at a time too",
    )
    add("--json", type=Path, metavar="FILE", help="write results and metrics to this file")
    add = parser.add_argument_group("JSON Lines").add_argument
    add("--input", type=Path, metavar="FILE", help="a request a line; - is standard input")
    add("--output", type=Path, metavar="FILE", help="default: -, which is standard output")
    add(
        "--resume", action="store_const", const=True, help="go on after what is in --output already"
    )
    add("--overwrite", action="store_const", const=True, help="drop what is in --output already")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    _check_together(args)
    params = sampling_params(args)
    log = Console(stderr=True)
    if args.input is not None:
        files = {"resume": bool(args.resume), "overwrite": bool(args.overwrite)}
        with open_files(args.input, args.output or STANDARD, **files) as (lines, output):
            defaults = dataclasses.replace(params, seed=None)
            return run_job(load_llm(args, log), lines, output, defaults, params.seed or 0)
    texts = read_prompts(args, DEFAULT_PROMPTS)
    check_json_path(args.json)
    llm = load_llm(args, log)
    inputs = _as_inputs(llm, texts, args.chat, args.system)
    log.print(f"{len(texts)} prompts, {llm.config.max_num_seqs} at once", style="dim")
    if args.compare_sequential:
        with log.status("Compiling, so that neither run pays for it"):
            _warm_up(llm, inputs, params)
    # With --stream standard output has the texts and nothing else.
    console = log if args.stream else Console()
    with _compile_times() as compiling:
        if args.stream:
            outputs = _stream(Console(), llm, texts, inputs, params)
        else:
            outputs = llm.generate(inputs, params)
            print_outputs(console, texts, outputs)
    if args.logprobs is not None:
        print_logprobs(console, outputs)
    runs = {"batch": batch_metrics(outputs)}
    report: dict[str, Any] = {"outputs": [as_json(output) for output in outputs]}
    for entry, text in zip(report["outputs"], texts, strict=True):
        entry["prompt"] = text
    if args.compare_sequential:
        with log.status("One request at a time"):
            sequential = [llm.generate(one, params, use_tqdm=False)[0] for one in inputs]
        runs["sequential"] = batch_metrics(sequential)
        report["is_equal"] = _token_ids(outputs) == _token_ids(sequential)
    print_metrics(console, runs)
    if args.compare_sequential:
        batch, alone = runs.values()
        console.print(
            f"speed-up {batch.output_throughput / alone.output_throughput:.2f}x, time saved "
            f"{alone.duration_s - batch.duration_s:.2f} s, "
            f"{'the same' if report['is_equal'] else 'NOT the same'} tokens"
        )
    if sum(compiling) > 0.5:
        console.print(
            f"{sum(compiling):.1f} s of the batch's time went into compiling, or into loading what "
            "an earlier run had compiled.",
            style="dim",
        )
    if args.json is not None:
        report |= {name: as_json(metrics) for name, metrics in runs.items()}
        args.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return 0


def _stream(
    console: Console,
    llm: LLM,
    texts: Sequence[str],
    inputs: Sequence[Prompt],
    params: SamplingParams,
) -> list[RequestOutput]:
    printer = InOrder(console, texts, params.n)
    outputs: dict[int, RequestOutput] = {}
    for index, prompt in enumerate(inputs):
        llm.add_request(str(index), prompt, params)
    while llm.has_unfinished_requests():
        for output in llm.step():
            printer.show(int(output.request_id), output)
            outputs[int(output.request_id)] = output
    return [outputs[index] for index in range(len(inputs))]


def _check_together(args: argparse.Namespace) -> None:
    """Refuses options that mean nothing beside another, rather than ignoring them."""
    given = {name for name, value in vars(args).items() if value is not None}
    shown = ("prompts", "prompts_file", "num_prompts", "chat", "system")
    for name, others in {
        "input": (*shown, "stream", "compare_sequential", "json"),
        "stream": ("compare_sequential",),
    }.items():
        both = sorted(given.intersection(others)) if name in given else []
        if both:
            raise ValueError(f"{_option(both[0])} has no meaning beside {_option(name)}")
    for name in ("output", "resume", "overwrite"):
        if name in given and "input" not in given:
            raise ValueError(f"{_option(name)} needs --input")
    if args.system is not None and args.chat is False:
        raise ValueError("--system has no meaning beside --no-chat")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def _compile_times() -> Iterator[list[float]]:
    """Seconds of each program that XLA compiles meanwhile, by JAX's own events."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _as_inputs(
    llm: LLM, texts: Sequence[str], chat: bool | None, system: str | None
) -> Sequence[Prompt]:
    tokenizer = llm.get_tokenizer()
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    if not (chat or system is not None or (has_template and chat is None)):
        return texts
    before = [] if system is None else [{"role": "system", "content": system}]
    return [llm.render_chat([*before, {"role": "user", "content": text}]) for text in texts]


def _warm_up(llm: LLM, inputs: Sequence[Prompt], params: SamplingParams) -> None:
    """Runs every shape of both runs: all of the batch, each prompt alone, and a whole answer."""
    llm.generate(inputs, params, use_tqdm=False)
    short = dataclasses.replace(params, max_tokens=2, min_tokens=0)
    for one in inputs:
        llm.generate(one, short, use_tqdm=False)
    llm.generate(inputs[0], params, use_tqdm=False)


def _token_ids(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]
