"""The output file of a JSON Lines job: entries are appended, and found again after a kill."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from folojax.jsonl.lines import ENTRY_START, Entry, dump, find_error

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing keeps two jobs off one file there
    fcntl = None  # type: ignore[assignment]


class JsonlOutput:
    """Where entries go, and which are there already."""

    def __init__(self, file: BinaryIO) -> None:
        self.finished_ids: set[str] = set()  # the ids that have an entry, as text
        # Numbers of lines whose entry has no id: they could not be read, or repeat another's id.
        self.finished_lines: set[int] = set()
        self.num_bad = 0  # entries of lines that went wrong, those from before included
        self.num_dropped_bytes = 0  # length of the torn last line that was cut off
        self._file = file

    def write(self, entry: Entry) -> None:
        """Appends an entry, and hands it to the operating system before it returns.

        Once there, it outlives this process, however that ends. It does not outlive the machine:
        an fsync a line would, and would cost a disk's latency each time; a torn or missing end is
        what `resume` repairs anyhow.
        """
        self._file.write(dump(entry))
        self._file.flush()
        self._note(entry)

    def _note(self, entry: Entry) -> None:
        if entry["id"] is None:
            self.finished_lines.add(entry["line"])
        else:
            self.finished_ids.add(str(entry["id"]))
        self.num_bad += find_error(entry) is not None

    def resume(self) -> None:
        """Reads the entries that an earlier job has left, and cuts off a torn last line.

        Raises:
            ValueError: some line is not an entry. The file is then as it was.
        """
        self._file.seek(0)
        end = 0
        for number, raw in enumerate(self._file, start=1):
            if raw.endswith(b"\n"):
                self._note(_read_entry(raw, number))
                end += len(raw)
            elif not (raw.startswith(ENTRY_START) or ENTRY_START.startswith(raw)):
                raise ValueError(f"line {number}, {raw!r:.60}, is not the beginning of an entry")
            else:
                self.num_dropped_bytes = len(raw)
        self._file.truncate(end)
        self._file.seek(end)


@contextlib.contextmanager
def open_output(
    path: Path, *, resume: bool = False, overwrite: bool = False
) -> Iterator[JsonlOutput]:
    """Opens an output file for one job.

    Args:
        path: A file, or something to write to that is no regular file, such as a pipe.
        resume: Goes on after the entries that are there; a file that is not there is begun.
        overwrite: Drops what is there.

    Raises:
        ValueError: the file has something in it and neither is asked for, another job is writing
            to it, or it cannot be resumed.
        OSError: it cannot be opened.
    """
    if resume and overwrite:
        raise ValueError("resume keeps what is there and overwrite drops it: ask for one of them")
    is_file = path.is_file() or not path.exists()
    if resume and not is_file:
        raise ValueError(f"{path} is no file: what went there cannot be read again to resume")
    if path.is_file() and path.stat().st_size and not resume and not overwrite:
        raise ValueError(
            f"{path} exists: --resume goes on after what is in it, --overwrite drops it (in Python "
            "resume=True, overwrite=True); or name another file"
        )
    # Opened without truncation: until the lock is ours, the file is perhaps another job's.
    flags = os.O_RDWR | os.O_CREAT if is_file else os.O_WRONLY
    with os.fdopen(os.open(path, flags, 0o666), "r+b" if is_file else "wb") as file:
        if is_file:
            _lock(file, path)
        output = JsonlOutput(file)
        if overwrite and is_file:
            file.truncate(0)
        elif resume:
            try:
                output.resume()
            except ValueError as error:
                raise ValueError(f"{path} cannot be resumed: {error}") from error
        yield output


def _lock(file: BinaryIO, path: Path) -> None:
    """Holds the file until it is closed, or until this process ends in whatever way."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another job: wait for its end") from None
    except OSError:  # a file system without locks
        return


def _read_entry(raw: bytes, number: int) -> Entry:
    try:
        entry = json.loads(raw)
        is_entry = raw.startswith(ENTRY_START) and isinstance(entry["line"], int)
        if is_entry and ("error" in entry or isinstance(entry["outputs"], list)):
            find_error(entry)
            return entry
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"line {number}, {raw!r:.60}, is not an entry")
