"""The compile plan: every executable that an engine may need, listed before it is paid for."""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from folojax.compile.mapped_memory import make_room
from folojax.compile.shapes import DecodeShape, PrefillShape, Shapes
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.steps.residual_stream import ActivationEdit

_LOG = logging.getLogger("folojax")


class Executable(NamedTuple):
    """What chooses an executable; fields that a kind has no use for keep their default.

    Attributes:
        kind: "prefill", "decode", "decode_steps", "sample", "score", "copy" or "edit"; "rows" is
            the model's step in deterministic mode.
        rows: Of the batch.
        tokens: Of a row.
        sampling: The most demanding row's needs; also of a "decode" that samples.
        num_logprobs: Alternatives reported with a token; None reports no ranks either.
        functions: Names of the user's functions that some row asks for, and "record" or
            "activations" where one asks for those; plans list none with any.
        bans: Room for the banned tokens of a step, where they are exceptionally many; likewise.
    """

    kind: str
    rows: int = 0
    tokens: int = 1
    sampling: SamplingClass | None = None
    num_logprobs: int | None = None
    functions: tuple[str, ...] = ()
    bans: int = 0

    def __str__(self) -> str:
        parts = [self.kind]
        for name, value in zip(self._fields[1:], self[1:], strict=True):
            if value != self._field_defaults[name]:
                text = value.name.lower() if isinstance(value, SamplingClass) else value
                text = ",".join(value) if isinstance(value, tuple) else text
                parts.append(f"{name}={text}")
        return " ".join(parts)


COPIES = Executable("copy")
"""The small programs that copy pages."""
EDITS = Executable("edit")
"""Those that keep what a request's edits of logits need."""


def model_executable(
    shape: PrefillShape | DecodeShape,
    edits: tuple[ActivationEdit, ...] = (),
    taps: tuple[int, ...] = (),
) -> Executable:
    """That of a model's step, with the edits and taps of activations that some row asks for."""
    if isinstance(shape, PrefillShape):
        found = Executable("prefill", shape.rows, shape.columns)
    else:
        found = Executable("decode", shape.rows)
    return found._replace(functions=layer_functions(edits, taps))


def sample_executable(rows: int, spec: SamplingSpec, bans: int = 0) -> Executable:
    """That of a sampler."""
    return Executable(
        "sample",
        rows,
        sampling=spec.needed,
        num_logprobs=spec.num_logprobs,
        functions=_names(spec),
        bans=bans,
    )


def sampled_executable(
    shape: DecodeShape,
    spec: SamplingSpec,
    edits: tuple[ActivationEdit, ...] = (),
    taps: tuple[int, ...] = (),
    bans: int = 0,
) -> Executable:
    """That of a decode step and its sampling in one program."""
    found = model_executable(shape, edits, taps)
    return found._replace(
        sampling=spec.needed,
        num_logprobs=spec.num_logprobs,
        functions=found.functions + _names(spec),
        bans=bans,
    )


def steps_executable(
    shape: DecodeShape,
    most_steps: int,
    spec: SamplingSpec,
    edits: tuple[ActivationEdit, ...] = (),
    taps: tuple[int, ...] = (),
    bans: int = 0,
) -> Executable:
    """That of several decode steps in one call."""
    found = sampled_executable(shape, spec, edits, taps, bans)
    return found._replace(kind="decode_steps", tokens=most_steps)


def layer_functions(edits: tuple[ActivationEdit, ...], taps: tuple[int, ...]) -> tuple[str, ...]:
    """`Executable.functions` of a model's step."""
    return (*(edit.name for edit in edits), *(["activations"] if taps else []))


def _names(spec: SamplingSpec) -> tuple[str, ...]:
    names = tuple(one.name for one in spec.processors)
    return (*names, "record") if spec.has_record else names


def list_executables(
    shapes: Shapes,
    sampling: Collection[SamplingClass],
    logprobs: Sequence[int],
    most_steps: int,
    is_whole: bool,
) -> Iterator[Executable]:
    """Every executable of an engine.

    Args:
        shapes: Which shapes exist.
        sampling: Classes that will be used.
        logprobs: How many alternatives may be reported with a token; that samples have no
            log-probabilities is always possible.
        most_steps: Decode steps of one call, where they are several.
        is_whole: Whether a decode step and its sampling are one program.
    """
    specs = [
        SamplingSpec(needed, count)
        for needed, count in itertools.product(sorted(sampling), (None, *logprobs))
    ]
    for rows in shapes.prefill_rows:
        yield model_executable(PrefillShape(rows, shapes.prefill_columns))
    for spec in specs:
        is_greedy = spec == SamplingSpec(SamplingClass.GREEDY)
        if is_whole:
            for rows in shapes.decode_rows if is_greedy else shapes.sampled_rows:
                yield sampled_executable(DecodeShape(rows), spec)
    if not is_whole:
        for rows in shapes.decode_rows:
            yield model_executable(DecodeShape(rows))
    for spec, rows in itertools.product(specs, shapes.decode_rows):
        if most_steps > 1:
            yield steps_executable(DecodeShape(rows), most_steps, spec)
    sampled = {*shapes.prefill_rows, *(() if is_whole else shapes.decode_rows)}
    for spec, rows in itertools.product(specs, sorted(sampled)):
        yield sample_executable(rows, spec)
    for count, rows in itertools.product(logprobs, shapes.prefill_rows):
        yield Executable("score", rows, shapes.prefill_columns, num_logprobs=count)
    yield COPIES
    if SamplingClass.EDITED in sampling:
        yield EDITS


@dataclasses.dataclass(frozen=True)
class Planned:
    """An executable of the plan, and what it has cost.

    Attributes:
        executable: What chooses it.
        temporaries_bytes: Memory beside arguments and results; None: not compiled ahead of time.
        compile_s: Seconds of tracing and compiling, or of reading it from disk; likewise.
    """

    executable: Executable
    temporaries_bytes: int | None = None
    compile_s: float | None = None


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
    """Lets executables pass that were planned, and tells of the others before they are compiled."""

    def __init__(self, planned: Collection[Executable], is_strict: bool) -> None:
        """`is_strict` makes an executable outside the plan an error."""
        self.is_strict = is_strict
        self._is_warm = False
        self._has_warned = False
        self._compiled: dict[Executable, Planned] = {}
        self._known = set(planned)
        self._met: set[Executable] = set()

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
        self._is_warm = True

    def cost(self, executable: Executable) -> Planned:
        """What an executable has cost, if it was compiled ahead of time."""
        return self._compiled.get(executable, Planned(executable))

    def check(self, executable: Executable) -> None:
        """Tells of an executable outside the plan, and makes room for one that is not compiled yet.

        Raises:
            RuntimeError: there is one, and the gate is strict.
        """
        if executable in self._compiled or executable in self._met:
            return
        text = f"{executable} is not in the compile plan"
        is_planned = executable in self._known
        if self.is_strict and not is_planned:
            raise RuntimeError(
                f"{text}, and EngineConfig.strict forbids to compile it: warm up for what is used "
                "(LLM.warm_up has the classes of sampling and log-probabilities as arguments), or "
                "set strict to False"
            )
        self._met.add(executable)
        make_room()
        if self._is_warm and not is_planned and not self._has_warned:
            self._has_warned = True
            _LOG.warning("%s: a step waits for the compiler. This is said once.", text)
