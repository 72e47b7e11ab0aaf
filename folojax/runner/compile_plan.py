"""The compile plan: what every executable of an engine has cost, and who asks for another one."""

import collections
import dataclasses
import logging
from collections.abc import Collection

from folojax.compile.mapped_memory import make_room
from folojax.steps.executables import Executable

_LOG = logging.getLogger("folojax")


@dataclasses.dataclass(frozen=True)
class Planned:
    """An executable of the plan, and what it has cost."""

    executable: Executable
    temporaries_bytes: int | None = None
    """Memory beside arguments and results; None: it was not compiled ahead of time."""
    compile_s: float | None = None
    """Seconds of tracing and compiling, or of reading it from disk; likewise."""


@dataclasses.dataclass(frozen=True)
class CompilePlan:
    """Every executable of an engine; as text, a line for each."""

    entries: tuple[Planned, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        lines = []
        for entry in self.entries:
            line = f"{entry.executable!s:72}"
            if entry.temporaries_bytes is not None:
                line += f"{entry.temporaries_bytes / 2**20:10.1f} MiB"
            if entry.compile_s is not None:
                line += f"{entry.compile_s:8.2f} s"
            lines.append(line.rstrip())
        counts = collections.Counter(entry.executable.kind for entry in self.entries)
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        lines.append(f"{len(self)} executables: {told}")
        times = [entry.compile_s for entry in self.entries if entry.compile_s is not None]
        if times:
            lines[-1] += f"; {sum(times):.1f} s of compiling, all threads together"
        return "\n".join(lines)


class Gate:
    """Lets executables pass that were planned, and tells of the others before they are compiled.

    Attributes:
        is_strict: Whether an executable outside the plan is an error.
        passed: Those that are compiled, or have been checked.
    """

    def __init__(self, planned: Collection[Executable], is_strict: bool) -> None:
        self.is_strict = is_strict
        self._is_warm = False
        self._has_warned = False
        self._compiled: dict[Executable, Planned] = {}
        self._known = set(planned)
        self.passed: set[Executable] = set()

    def set_compiled(
        self, entries: Collection[Planned], left_out: Collection[Executable] = ()
    ) -> None:
        """From now on these are the plan, with those that were compiled before.

        Args:
            entries: Compiled.
            left_out: Planned, but not compiled for lack of room.
        """
        self._compiled |= {entry.executable: entry for entry in entries}
        self._known = {*self._compiled, *left_out}
        self.passed.update(self._compiled)
        self._is_warm = True

    def cost(self, executable: Executable) -> Planned:
        """What an executable has cost, if it was compiled ahead of time."""
        return self._compiled.get(executable, Planned(executable))

    def check(self, executable: Executable) -> None:
        """Tells of an executable outside the plan, and makes room for one that is not compiled yet.

        Raises:
            RuntimeError: there is one, and the gate is strict.
        """
        if executable in self.passed:
            return
        text = f"{executable} is not in the compile plan"
        is_planned = executable in self._known
        if self.is_strict and not is_planned:
            raise RuntimeError(
                f"{text}, and EngineConfig.strict forbids to compile it: warm up for what is used "
                "(LLM.warm_up has the classes of sampling, log-probabilities and structured "
                "outputs as arguments), or set strict to False"
            )
        self.passed.add(executable)
        make_room()
        if self._is_warm and not is_planned and not self._has_warned:
            self._has_warned = True
            _LOG.warning("%s: a step waits for the compiler. This is said once.", text)
