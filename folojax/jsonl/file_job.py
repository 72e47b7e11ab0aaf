"""A JSON Lines job: reads requests as the engine has room for them, writes entries as they end."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from folojax.jsonl.lines import (
    PROMPT_KEYS,
    Entry,
    check_fields,
    entry_of,
    error_entry,
    find_error,
    parse_object,
    read_id,
    sampling_params,
)
from folojax.jsonl.output_file import JsonlOutput
from folojax.llm import LLM
from folojax.requests.outputs import RequestOutput
from folojax.requests.prompts import Prompt
from folojax.requests.sampling_params import SamplingParams

_IDLE_S = 0.005
"""Between two looks for a line while there is nothing to run."""


@dataclasses.dataclass
class Summary:
    """What has become of a job's lines; tokens are of all that the engine has run."""

    num_done: int = 0  # lines that were run to their end
    num_skipped: int = 0  # lines that had their entry from before
    num_bad: int = 0  # lines that went wrong in this run
    num_bad_before: int = 0  # entries of lines that went wrong before
    num_foreign: int = 0  # entries from before whose line is not in the input (any more)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    duration_s: float = 0.0  # from start to end of the job
    compile_s: float = 0.0  # of these, what went into compiling or loading programs

    @property
    def output_throughput(self) -> float:
        """Output tokens per second of `duration_s` less `compile_s`."""
        return self.num_output_tokens / max(self.duration_s - self.compile_s, 1e-9)

    def __str__(self) -> str:
        before = f" (and {self.num_bad_before:,} before)" if self.num_bad_before else ""
        compiling = f" and {self.compile_s:.1f} s of compiling" if self.compile_s >= 0.05 else ""
        text = (
            f"{self.num_done:,} done, {self.num_skipped:,} skipped, {self.num_bad:,} bad{before}; "
            f"{self.num_prompt_tokens:,} prompt tokens, {self.num_output_tokens:,} output tokens, "
            f"{self.duration_s - self.compile_s:.1f} s{compiling}, "
            f"{self.output_throughput:.1f} output tokens/s"
        )
        if self.num_foreign:
            text += f"; {self.num_foreign:,} entries of the output are of no line of this input"
        return text


class _Queued(NamedTuple):
    line_id: str | int
    number: int
    num_samples: int


class JsonlJob:
    """Runs the lines of an input against an engine, each exactly once.

    A line that cannot be run gets an entry too, with its error, and the job goes on: so every line
    has one entry at the end, and a resumed job meets no line twice. To try bad lines again, take
    their entries out of the output and resume.

    A line's tokens do not depend on when it runs (see `line_seed`), so a job that was killed and
    resumed, with the same input and parameters, ends with the entries of an unbroken one.

    Memory: the ids of all lines, and the requests that are queued.

    Args:
        llm: With nothing queued.
        output: Where entries go; lines that have one are skipped.
        defaults: What lines do not say. Without a seed: all lines would share it.
        seed: Lines that give no seed derive theirs from it.
        max_queued: A further line is read while fewer samples than this are in the engine. Twice
            its max_num_seqs keeps it busy: then even if all that run end in one step, as many are
            waiting.
        on_entry: Called with every entry once it is written.

    Raises:
        ValueError: the engine has unfinished requests, or a parameter is refused.
    """

    def __init__(
        self,
        llm: LLM,
        output: JsonlOutput,
        defaults: SamplingParams | None = None,
        *,
        seed: int = 0,
        max_queued: int = 64,
        on_entry: Callable[[Entry], None] | None = None,
    ) -> None:
        defaults = SamplingParams() if defaults is None else defaults
        if defaults.seed is not None:
            raise ValueError(
                f"defaults.seed is {defaults.seed}, which all lines would share: give it as seed="
            )
        if max_queued < 1:
            raise ValueError(f"max_queued is {max_queued}; it must be at least 1")
        if llm.has_unfinished_requests():
            raise ValueError("the engine has unfinished requests: finish or abort them first")
        self.summary = Summary(num_bad_before=output.num_bad)
        self._llm = llm
        self._output = output
        self._defaults = defaults
        self._seed = seed
        self._max_queued = max_queued
        self._on_entry = on_entry
        self._queued: dict[str, _Queued] = {}
        self._num_samples = 0  # of all that is queued
        self._num_lines = 0  # read so far
        self._line_of_id: dict[str, int] = {}

    def run(self, lines: Iterable[bytes | None]) -> Summary:
        """Runs all lines; whatever interrupts it leaves nothing queued, and keeps what was written.

        Args:
            lines: Of the input, such as a file opened in binary mode; read as there is room. None
                says that the next line is not there yet: the job goes on with what it has, where
                a read that waits would hold it up.
        """
        start_s, compiled_s = time.perf_counter(), self._llm.metrics().compile_s
        arriving = iter(lines)
        try:
            while self._fill(arriving):
                for output in self._llm.step():
                    if output.finished:
                        self._finish(output)
            self.summary.num_foreign = len(self._output.finished_ids - self._line_of_id.keys())
        finally:
            self._llm.abort_request(list(self._queued))
            self._queued.clear()
            if self._llm.has_unfinished_requests():
                self._llm.step()  # takes what an interrupted step has aborted out of the engine
            self.summary.duration_s = time.perf_counter() - start_s
            self.summary.compile_s = self._llm.metrics().compile_s - compiled_s
        return self.summary

    def _fill(self, arriving: Iterator[bytes | None]) -> bool:
        """Reads lines until enough is queued or none is left; returns whether any is queued."""
        while self._num_samples < self._max_queued:
            try:
                raw = next(arriving)
            except StopIteration:
                break
            if raw is not None:
                self._num_lines += 1
                if raw.strip():
                    self._read(self._num_lines, raw)
            elif self._queued:
                break
            else:
                time.sleep(_IDLE_S)
        return bool(self._queued)

    def _read(self, number: int, raw: bytes) -> None:
        """Queues one line, skips it, or reports it."""
        line_id = None
        try:
            fields = parse_object(raw)
            own_id = read_id(fields, number)
            first = self._line_of_id.setdefault(str(own_id), number)
            if first != number:
                raise ValueError(f"id {own_id!r} is that of line {first} already")
            line_id = own_id
            if str(line_id) in self._output.finished_ids:
                self.summary.num_skipped += 1
            else:
                self._queue(line_id, number, fields)
        # A line comes from anywhere: whatever it does to whom, it is one line's misfortune.
        except Exception as error:
            if line_id is None and number in self._output.finished_lines:
                self.summary.num_skipped += 1
            else:
                is_ours = isinstance(error, ValueError)
                text = str(error) if is_ours else f"{type(error).__name__}: {error}"
                self._write(error_entry(line_id, number, text))

    def _queue(self, line_id: str | int, number: int, fields: Mapping[str, Any]) -> None:
        check_fields(fields)
        params = sampling_params(fields, self._defaults, self._seed, line_id)
        prompt: Prompt
        if "messages" in fields:
            prompt = self._llm.render_chat(fields["messages"])
        else:
            prompt = {key: fields[key] for key in PROMPT_KEYS if key in fields}
        request_id = f"line-{number}"
        self._llm.add_request(request_id, prompt, params)
        self._queued[request_id] = _Queued(line_id, number, params.n)
        self._num_samples += params.n

    def _finish(self, output: RequestOutput) -> None:
        done = self._queued.pop(output.request_id)
        self._num_samples -= done.num_samples
        entry = entry_of(done.line_id, done.number, output)
        self.summary.num_prompt_tokens += entry["usage"]["prompt_tokens"]
        self.summary.num_output_tokens += entry["usage"]["output_tokens"]
        self._write(entry)

    def _write(self, entry: Entry) -> None:
        self._output.write(entry)
        if find_error(entry) is None:
            self.summary.num_done += 1
        else:
            self.summary.num_bad += 1
        if self._on_entry is not None:
            self._on_entry(entry)
