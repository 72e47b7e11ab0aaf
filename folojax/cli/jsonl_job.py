"""A job of JSON Lines from the command line: its files, its progress, its exit code."""

import contextlib
import os
import queue
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from folojax.cli.arguments import STANDARD
from folojax.jsonl.lines import Entry, find_error
from folojax.jsonl.output_file import JsonlOutput, open_output
from folojax.requests.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folojax.llm import LLM


@contextlib.contextmanager
def open_files(
    source: Path, target: Path, *, resume: bool, overwrite: bool
) -> Iterator[tuple[BinaryIO, JsonlOutput]]:
    """Opens the input and the output of a job, before a model is paid for.

    Raises:
        ValueError: they are the same file, or as in `open_output`.
        OSError: one of them cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        lines = _open_input(source)
        if _is_regular(lines):  # to close another would wait for the thread that reads it
            stack.enter_context(lines)
        if target == STANDARD:
            if resume or overwrite:
                raise ValueError("--resume and --overwrite need --output FILE")
            yield lines, JsonlOutput(sys.stdout.buffer)
            return
        if source != STANDARD and target.exists() and source.samefile(target):
            raise ValueError(f"--output {target} is the input")
        output = stack.enter_context(open_output(target, resume=resume, overwrite=overwrite))
        if output.num_dropped_bytes:
            _tell(f"{target}: dropped a torn last line of {output.num_dropped_bytes} bytes")
        yield lines, output


def run_job(
    llm: "LLM", source: BinaryIO, output: JsonlOutput, defaults: SamplingParams, seed: int
) -> int:
    """Runs a job with a progress bar; returns the exit code: 1 if any line went wrong, else 0."""
    from tqdm.auto import tqdm  # and JAX: the files are looked at before

    from folojax.jsonl.file_job import JsonlJob

    with tqdm(desc="lines", unit=" lines", disable=None) as bar:

        def show(entry: Entry) -> None:
            bar.update()
            error = find_error(entry)
            if error is not None:
                with bar.external_write_mode():
                    _tell(f"line {entry['line']}: {error}")

        job = JsonlJob(
            llm,
            output,
            defaults,
            seed=seed,
            max_queued=2 * llm.config.max_num_seqs * llm.config.data_parallel_size,
            on_entry=show,
        )
        try:
            job.run(_lines_of(source))
        finally:
            bar.close()
            _tell(str(job.summary))
    return 1 if output.num_bad else 0


def _lines_of(source: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; of anything slower as they come, and None where there is none yet.

    So a program may write a line, and wait for its entry before it writes the next.
    """
    if _is_regular(source):
        yield from source
        return
    arrived: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=64)

    def read() -> None:
        try:
            for line in source:
                arrived.put(line)
            arrived.put(None)
        except BaseException as error:  # raised again where it can be told
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arrived.get_nowait()
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        if isinstance(line, BaseException):
            raise line
        yield line


def _open_input(source: Path) -> BinaryIO:
    if source == STANDARD:
        # Not sys.stdin.buffer: Python wants that one for itself when it exits, and aborts if a
        # thread still reads from it.
        return os.fdopen(sys.stdin.fileno(), "rb", closefd=False)
    return source.open("rb")


def _is_regular(file: BinaryIO) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
