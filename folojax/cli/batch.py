"""Prompts from the command line as one batch: their texts, and what they took."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from folojax.cli.load import load_llm
from folojax.cli.show import InOrder, as_json, print_logprobs, print_metrics, print_outputs
from folojax.config import EngineConfig
from folojax.llm import LLM
from folojax.requests.outputs import RequestOutput, batch_metrics
from folojax.requests.prompts import Prompt, each_named
from folojax.requests.sampling_params import SamplingParams


def run_batch(
    args: argparse.Namespace,
    config: EngineConfig,
    texts: Sequence[str],
    sampling_params: SamplingParams,
) -> int:
    """Generates, prints and writes what the options ask for; returns the exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C; what there was by then has been printed and written.
    """
    log = Console(stderr=True)
    llm = load_llm(args, config, log)
    inputs = _as_inputs(llm, texts, args.chat, args.system)
    most = llm.config.max_num_seqs * llm.config.data_parallel_size
    if len(texts) * sampling_params.n > most:
        samples = f" of {sampling_params.n} samples" if sampling_params.n > 1 else ""
        at_once = f"{most} at once"
        log.print(f"{_count(len(texts), 'prompt')}{samples}, {at_once}", style="dim")
    if args.compare_sequential:
        with log.status("Compiling, so that neither run pays for it"):
            _warm_up(llm, inputs, sampling_params)
    # With --stream standard output has the texts and nothing else.
    console = log if args.stream else Console()
    if args.stream:
        printer = InOrder(Console(), texts, sampling_params.n)
        outputs, is_whole = _generate(llm, inputs, sampling_params, printer.show)
        if not is_whole:
            printer.show_rest(outputs)
    else:
        with tqdm(total=len(texts), desc="prompts", disable=None) as bar:
            outputs, is_whole = _generate(
                llm, inputs, sampling_params, lambda _, output: bar.update(int(output.finished))
            )
        begun = [any(one.token_ids for one in output.outputs) for output in outputs]
        print_outputs(console, texts, outputs, begun)
    report: dict[str, Any] = {"outputs": [as_json(output) for output in outputs]}
    for entry, text in zip(report["outputs"], texts, strict=True):
        entry["prompt"] = text
    runs = {"batch": batch_metrics(outputs)}
    if is_whole:
        if args.logprobs is not None:
            print_logprobs(console, outputs)
        if args.compare_sequential:
            with log.status("One request at a time"):
                sequential = [
                    llm.generate(one, sampling_params, use_tqdm=False)[0] for one in inputs
                ]
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
    if args.json is not None:
        report |= {name: as_json(metrics) for name, metrics in runs.items()}
        args.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    if not is_whole:
        raise KeyboardInterrupt
    return 0


def _generate(
    llm: LLM,
    inputs: Sequence[Prompt],
    sampling_params: SamplingParams,
    show: Callable[[int, RequestOutput], Any],
) -> tuple[list[RequestOutput], bool]:
    """The outputs of a batch, each shown whenever it has grown.

    Returns:
        The outputs in order, and whether they are whole: Ctrl-C leaves what there is.

    Raises:
        ValueError: a prompt is refused; then nothing runs.
    """
    newest: dict[int, RequestOutput] = {}

    def take(outputs: Sequence[RequestOutput]) -> None:
        newest.update((int(output.request_id), output) for output in outputs)

    ids = [str(index) for index in range(len(inputs))]
    each_named(
        "prompt",
        list(zip(ids, inputs, strict=True)),
        lambda pair: llm.add_request(*pair, sampling_params),
    )
    is_whole = True
    try:
        while llm.has_unfinished_requests():
            outputs = llm.step()
            take(outputs)
            for output in outputs:
                show(int(output.request_id), output)
    except KeyboardInterrupt:
        is_whole = False
        take(llm.abort_request(ids))
        if llm.has_unfinished_requests():
            take(llm.step())  # what an interrupted step has aborted
    return [newest[index] for index in range(len(inputs))], is_whole


def _as_inputs(
    llm: LLM, texts: Sequence[str], chat: bool | None, system: str | None
) -> Sequence[Prompt]:
    if not (chat or system is not None or (chat is None and llm.has_chat_template)):
        return texts
    before = [] if system is None else [{"role": "system", "content": system}]
    return [llm.render_chat([*before, {"role": "user", "content": text}]) for text in texts]


def _warm_up(llm: LLM, inputs: Sequence[Prompt], sampling_params: SamplingParams) -> None:
    """Runs every shape of both runs: all of the batch, each prompt alone, and a whole answer."""
    llm.generate(inputs, sampling_params, use_tqdm=False)
    short = dataclasses.replace(sampling_params, max_tokens=2, min_tokens=0)
    for one in inputs:
        llm.generate(one, short, use_tqdm=False)
    llm.generate(inputs[0], sampling_params, use_tqdm=False)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _token_ids(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]
