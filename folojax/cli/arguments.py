"""What several commands are told: the model, prompts, sampling parameters."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from folojax.config import EngineConfig, add_flags, given_options
from folojax.llm import LLM
from folojax.requests.sampling_params import SamplingParams

# Those that change what a person sees; the others are for programs.
_ENGINE = (
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages"),
    *("memory_fraction", "enable_prefix_caching", "max_decode_steps"),
    *("quantization", "deterministic", "warm_up"),
)

# Those that a command line can say, and whose effect is seen in what is printed.
_SAMPLING = (
    *("n", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
    *("stop", "include_stop_str_in_output", "bad_words", "ignore_eos", "logprobs"),
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and options of its engine."""
    add = parser.add_argument_group("model").add_argument
    add("--model", help="directory, .gguf file or Hub name; default: SmolLM2-135M-Instruct")
    add("--revision", help="branch, tag or commit of a Hub model")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16; default: auto")
    add_flags(parser.add_argument_group("engine"), EngineConfig, _ENGINE)


def add_prompt_options(parser: argparse.ArgumentParser, default: str) -> Any:
    """Texts, and how many; returns the group, for more of them."""
    group = parser.add_argument_group("prompts")
    add = group.add_argument
    add("--prompts", nargs="+", metavar="TEXT", help=f"default: {default}")
    add("--prompts-file", type=Path, metavar="FILE", help="a text file with one prompt a line")
    add("--num-prompts", type=int, metavar="N", help="repeat or cut the prompts to this number")
    return group


def add_sampling_options(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """The fields of SamplingParams that a command line can say."""
    add_flags(parser.add_argument_group("sampling"), SamplingParams, _SAMPLING, defaults)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The options that are fields of SamplingParams; ValueError if one is out of range."""
    return SamplingParams(**given_options(args, SamplingParams))


def load_llm(args: argparse.Namespace, log: Console) -> LLM:
    """The engine that the options describe; its memory is told."""
    config = EngineConfig(**given_options(args, EngineConfig))
    with log.status("Loading the model"):
        llm = LLM(args.model, dtype=args.dtype, revision=args.revision, config=config)
    log.print(str(llm.memory_plan), style="dim", highlight=False, soft_wrap=True)
    return llm


def read_prompts(args: argparse.Namespace, default: Sequence[str] = ()) -> list[str]:
    """The texts that were given, or else the default ones; as many as --num-prompts says.

    Raises:
        ValueError: the file cannot be read, or has no prompt in it; or their number is to be 0.
    """
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"--num-prompts is {args.num_prompts}; it must be at least 1")
    given = list(args.prompts or ())
    if args.prompts_file is not None:
        try:
            lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts-file {args.prompts_file}: {error}") from error
        given += [line for line in lines if line.strip()]
        if not given:
            raise ValueError(f"--prompts-file {args.prompts_file} has no prompt in it")
    texts = given or default
    return [texts[i % len(texts)] for i in range(args.num_prompts or len(texts))] if texts else []


def check_json_path(path: Path | None) -> None:
    """Refuses a file for --json whose directory is not there, before a model is paid for."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"--json {path}: there is no such directory")
