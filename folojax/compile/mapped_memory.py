"""What compiling leaves in this process: memory areas, of which Linux grants few, and free memory.

XLA on CPU maps three areas for each kernel of a program: about 90 a program, 270 for the programs
of a decode step's shape. Linux grants a process 65,530 (`vm.max_map_count`); beyond them the
compiler crashes, and the process with it.
"""

import ctypes
import functools
import logging
import sys
from pathlib import Path

from folojax.compile.programs import clear_programs

_LOG = logging.getLogger("folojax")

FULL = 0.75
"""Share of the areas from which on nothing is compiled ahead of time."""

_BRIM = 0.9

_AREAS = Path("/proc/self/maps")
_LIMIT = Path("/proc/sys/vm/max_map_count")


def share_of_areas() -> float:
    """Areas in use, of those that there may be; 0 where the system does not tell."""
    limit = _limit()
    if limit is None:
        return 0.0
    with _AREAS.open("rb") as areas:
        return sum(1 for _ in areas) / limit


def make_room() -> None:
    """Drops all compiled programs if another might be one too many; they come back as needed."""
    if (share := share_of_areas()) >= _BRIM:
        clear_programs()
        _LOG.warning(
            "compiled programs took %.0f %% of the memory areas that Linux grants a process, and "
            "were dropped: those in use are read from the compilation cache again. Raise "
            "vm.max_map_count, or allow fewer shapes (max_num_seqs, max_model_len)",
            100 * share,
        )


def give_back_memory() -> None:
    """Gives the system back what was freed, with glibc: 25 MB after a load, up to 50 a warm-up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@functools.cache
def _limit() -> int | None:
    try:
        return int(_LIMIT.read_text())
    except (OSError, ValueError):
        return None
