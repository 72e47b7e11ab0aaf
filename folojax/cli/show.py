"""Texts and figures as a person reads them, and as JSON."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from folojax.requests.outputs import BatchMetrics, CompletionOutput, RequestOutput

_SHOWN_S = 0.05
"""What compiling must take to be told of."""


class InOrder:
    """Prints the texts of a batch as they grow.

    A terminal has one place to write, so the samples come in order: the first that has not ended
    is live, and those behind it catch up when their turn comes. A single sample is printed with
    nothing around it, fit for a pipe.
    """

    def __init__(self, console: Console, texts: Sequence[str], num_samples: int) -> None:
        self._console = console
        self._texts = texts
        self._places = collections.deque(
            (index, sample) for index in range(len(texts)) for sample in range(num_samples)
        )
        self._is_alone = len(self._places) == 1
        self._newest: dict[int, RequestOutput] = {}
        self._num_printed: int | None = None  # characters of the live sample; None before it begins
        self._last_prompt: int | None = None  # whose heading was printed last

    def show(self, index: int, output: RequestOutput) -> None:
        """Takes the newest output of a prompt, and prints what has its turn."""
        self._newest[index] = output
        self._print_ready()

    def show_rest(self, outputs: Sequence[RequestOutput]) -> None:
        """Prints what there is of a batch that ends here; samples without a token are passed over.

        Args:
            outputs: Of every prompt, by index.
        """
        self._newest = dict(enumerate(outputs))
        begun = [] if self._num_printed is None else [self._places.popleft()]
        self._places = collections.deque(
            begun + [place for place in self._places if self._completion(*place).token_ids]
        )
        self._print_ready()

    def _completion(self, prompt: int, sample: int) -> CompletionOutput:
        return self._newest[prompt].outputs[sample]

    def _print_ready(self) -> None:
        """Prints the samples that have their turn, as far as they are known."""
        while self._places and self._places[0][0] in self._newest:
            prompt, sample = self._places[0]
            completion = self._completion(prompt, sample)
            if self._num_printed is None:
                self._num_printed = 0
                if not self._is_alone:
                    if prompt != self._last_prompt:
                        self._last_prompt = prompt
                        print_heading(self._console, prompt, self._texts[prompt])
                    _print_sample_number(self._console, self._newest[prompt], sample)
            _print(self._console, completion.text[self._num_printed :], end="")
            self._num_printed = len(completion.text)
            if completion.finish_reason is None:
                return
            _print(self._console, "" if self._is_alone else "\n")
            self._places.popleft()
            self._num_printed = None


def print_heading(console: Console, index: int, text: str) -> None:
    """Prints a prompt with its number."""
    _print(console, f"{index + 1}. {text}", style="bold cyan")


def print_outputs(
    console: Console,
    texts: Sequence[str],
    outputs: Sequence[RequestOutput],
    are_shown: Sequence[bool],
) -> None:
    """Prints the texts of a batch that has ended, and their times; `are_shown` says of which."""
    for index, (text, output) in enumerate(zip(texts, outputs, strict=True)):
        if not are_shown[index]:
            continue
        print_heading(console, index, text)
        for completion in output.outputs:
            _print_sample_number(console, output, completion.index)
            _print(console, completion.text.strip())
            reason = completion.finish_reason
            if completion.stop_reason is not None:
                reason = f"{reason}: {completion.stop_reason!r}"
            _print(console, f"{len(completion.token_ids)} tokens, {reason}", style="dim")
        times = output.metrics
        compile_s = times.first_token_compile_s
        compiling = f" and {compile_s:.1f} s of compiling" if compile_s >= _SHOWN_S else ""
        first = None if times.ttft_s is None else times.ttft_s - compile_s
        text = f"first token {_ms(first)}{compiling}, then {_ms(times.tpot_s)} each\n"
        _print(console, text, style="dim")


def print_logprobs(console: Console, outputs: Sequence[RequestOutput]) -> None:
    """Prints a table for each sample: its tokens, and at each place the likeliest ones."""
    for index, output in enumerate(outputs):
        for completion in output.outputs:
            title = f"Log-probabilities {index + 1}.{completion.index + 1}"
            columns = ("token", "logprob", "rank", "likeliest")
            _print_table(console, title, columns, _logprob_rows(completion))


def print_metrics(console: Console, runs: Mapping[str, BatchMetrics]) -> None:
    """Prints the figures of runs side by side; rates leave out what went into compiling."""
    has_compiled = any(one.compile_s >= _SHOWN_S for one in runs.values())
    rows: dict[str, Callable[[BatchMetrics], str]] = {
        "requests": lambda m: str(m.num_requests),
        "prompt tokens": lambda m: str(m.num_prompt_tokens),
        "output tokens": lambda m: str(m.num_output_tokens),
        "time without compiling": lambda m: f"{m.duration_s - m.compile_s:.2f} s",
        "time of compiling": lambda m: f"{m.compile_s:.2f} s",
        "output tokens per second": lambda m: f"{m.output_throughput:.1f}",
        "mean time to first token": lambda m: _ms(m.mean_ttft_s),
        "mean time per token after it": lambda m: _ms(m.mean_tpot_s),
        "preemptions": lambda m: str(m.num_preemptions),
    }
    if has_compiled:
        rows["mean time to first token"] = lambda m: f"{_ms(m.mean_ttft_s)} with compiling"
    else:
        del rows["time of compiling"]
    lines = [(label, *map(show, runs.values())) for label, show in rows.items()]
    _print_table(console, "Metrics", ("", *runs), lines)


def as_json(value: Any) -> Any:
    """A value as JSON spells it: of a dataclass the fields and properties; inf and NaN are null."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        names += [n for n, item in vars(type(value)).items() if isinstance(item, property)]
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _logprob_rows(completion: CompletionOutput) -> list[tuple[str, str, str, str]]:
    assert completion.logprobs is not None, "the table is of a run with log-probabilities"
    rows = []
    for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        chosen = logprobs[token]
        likeliest = sorted(logprobs.values(), key=lambda one: one.rank)
        rows.append(
            (
                repr(chosen.decoded_token),
                f"{chosen.logprob:.3f}",
                str(chosen.rank),
                ", ".join(f"{one.decoded_token!r} {one.logprob:.3f}" for one in likeliest),
            )
        )
    return rows


def _print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Prints a table; where the console is too narrow for one, a line for each of its cells."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        is_last = number == len(columns) - 1
        is_text = column == "" or (is_last and column == "likeliest")
        table.add_column(
            column, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    unbounded = console.options.update(max_width=1_000)  # else a table says that it fits
    if console.measure(table, options=unbounded).minimum <= console.width:
        console.print(table, markup=False, emoji=False, highlight=False)
        return
    _print(console, title)
    for label, *cells in rows:
        _print(console, label)
        for column, cell in zip(columns[1:], cells, strict=True):
            _print(console, f"  {column}: {cell}")


def _print_sample_number(console: Console, output: RequestOutput, sample: int) -> None:
    if len(output.outputs) > 1:
        _print(console, f"sample {sample + 1}", style="cyan")


def _print(console: Console, text: str, end: str = "\n", style: str | None = None) -> None:
    """Prints a text as it is: generated brackets and colons are neither markup nor emoji."""
    console.print(
        text, end=end, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"
