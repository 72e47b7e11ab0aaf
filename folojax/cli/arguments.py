"""What several commands are told: the model, prompts, sampling parameters. Without JAX."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from folojax.config import EngineConfig, add_flags, given_options
from folojax.requests.sampling_params import SamplingParams

STANDARD = Path("-")
"""Standard input or output, in place of a file."""

# Those that change what a person sees; the others are for programs.
_ENGINE = (
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages"),
    *("memory_fraction", "enable_prefix_caching", "max_decode_steps"),
    *("quantization", "deterministic", "warm_up", "tensor_parallel_size", "data_parallel_size"),
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
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="of weights and sums; default: auto")
    add_flags(parser.add_argument_group("engine"), EngineConfig, _ENGINE)


def add_prompt_options(parser: argparse.ArgumentParser, default: str) -> Any:
    """Texts, and how many; returns the group, for more of them."""
    group = parser.add_argument_group("prompts")
    add = group.add_argument
    told = f"- is all of standard input, as one prompt; default: {default}"
    add("--prompts", nargs="+", metavar="TEXT", help=told)
    told = "a text file with one prompt a line; - is standard input"
    add("--prompts-file", type=Path, metavar="FILE", help=told)
    add("--num-prompts", type=int, metavar="N", help="repeat or cut the prompts to this number")
    return group


def add_sampling_options(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """The fields of SamplingParams that a command line can say."""
    add_flags(parser.add_argument_group("sampling"), SamplingParams, _SAMPLING, defaults)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The options that are fields of SamplingParams; ValueError if one is out of range."""
    given = given_options(args, SamplingParams)
    if given.get("n", 1) > 1 and given.get("temperature") == 0:
        raise ValueError(
            f"--n is {given['n']}, and at temperature 0 all samples of a prompt are the same: add "
            "--temperature 0.7, or another above 0"
        )
    return SamplingParams(**given)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The options that are fields of EngineConfig; ValueError if one is out of range."""
    return EngineConfig(**given_options(args, EngineConfig))


def read_prompts(args: argparse.Namespace, default: Sequence[str] = ()) -> list[str]:
    """The texts that were given, or else the default ones; as many as --num-prompts says.

    Raises:
        ValueError: the file cannot be read, or has no prompt in it; or their number is to be 0.
    """
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"--num-prompts is {args.num_prompts}; it must be at least 1")
    given = list(args.prompts or ())
    if given.count("-") + (args.prompts_file == STANDARD) > 1:
        raise ValueError("standard input can be read once: give one - in --prompts, --prompts-file")
    if "-" in given:
        given[given.index("-")] = _read_text(STANDARD, "--prompts -").removesuffix("\n")
    if args.prompts_file is not None:
        lines = _read_text(args.prompts_file, f"--prompts-file {args.prompts_file}").splitlines()
        given += [line for line in lines if line.strip()]
    texts = given or default
    return [texts[i % len(texts)] for i in range(args.num_prompts or len(texts))] if texts else []


def _read_text(path: Path, option: str) -> str:
    """What a file or standard input holds; ValueError if that is nothing."""
    try:
        raw = sys.stdin.buffer.read() if path == STANDARD else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: {error}") from error
    if not text.strip():
        raise ValueError(f"{option} has no prompt in it")
    return text


def check_json_path(path: Path | None) -> None:
    """Refuses a file for --json whose directory is not there, before a model is paid for."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"--json {path}: there is no such directory")
