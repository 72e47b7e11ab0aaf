"""Files made once from others and kept in the user's cache."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import platformdirs

_UNFINISHED = ".unfinished-"
_ABANDONED_AFTER_S = 24 * 3600


def cache_root() -> Path:
    """$FOLOJAX_CACHE_DIR, or else this platform's cache directory for folojax."""
    chosen = os.environ.get("FOLOJAX_CACHE_DIR")
    return Path(chosen) if chosen else platformdirs.user_cache_path("folojax")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_once(directory: Path, build: Callable[[Path], None]) -> Path:
    """Gives back a directory, filled by `build` unless it is there already.

    `build` fills a temporary sibling that is renamed when it is complete, so the directory is
    whole or absent. Its name must hold all that the content depends on. Of processes that build at
    once the first to finish wins; the others throw theirs away. Exceptions of `build` pass through.
    """
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(directory.parent)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=directory.parent))
    try:
        build(unfinished)
        try:
            os.replace(unfinished, directory)
        except OSError:
            # A directory with files cannot be replaced: another process was first.
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _remove_abandoned(parent: Path) -> None:
    """Removes what builds left that were killed, once it is too old to belong to a running one."""
    for path in parent.glob(_UNFINISHED + "*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)
