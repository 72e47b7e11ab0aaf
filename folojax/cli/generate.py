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
folojax generate --prompts - < letter.txt     - is standard input: one prompt; a prompt a line
ls | folojax generate --prompts-file -        with --prompts-file

JSON Lines: a line of --input is {"prompt" | "messages" | "prompt_token_ids": ..., "sampling":
{fields of SamplingParams}, "id": ...}; the options below are what "sampling" leaves out. A "prompt"
is text as the model sees it, "messages" go through the chat template. A line of --output is {"id",
"line", "outputs", "usage"}, or {"id", "line", "error"} of a line that cannot be run; it is written
when the request ends. A run that was killed goes on with --resume, the same input and the same
options: no line is lost or done twice, and the tokens are those of an unbroken run.

Ctrl-C prints what there is so far of the prompts that had begun.
"""

import argparse
import dataclasses
from pathlib import Path

from folojax.cli.arguments import (
    STANDARD,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    check_json_path,
    engine_config,
    read_prompts,
    sampling_params,
)

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
    params, config = sampling_params(args), engine_config(args)
    if args.input is not None:
        from folojax.cli.jsonl_job import open_files, run_job

        files = {"resume": bool(args.resume), "overwrite": bool(args.overwrite)}
        with open_files(args.input, args.output or STANDARD, **files) as (lines, output):
            from rich.console import Console

            from folojax.cli.load import load_llm

            llm = load_llm(args, config, Console(stderr=True))
            defaults = dataclasses.replace(params, seed=None)
            return run_job(llm, lines, output, defaults, params.seed or 0)
    texts = read_prompts(args, DEFAULT_PROMPTS)
    check_json_path(args.json)
    from folojax.cli.batch import run_batch  # and JAX: slow, and a mistake is told before

    return run_batch(args, config, texts, params)


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
