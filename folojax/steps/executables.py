"""Executables: what device calls are compiled for, and the list of all that an engine may need."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from folojax.compile.shapes import Shapes
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.steps.layers import NO_EXTRAS, StepExtras

StepKind: TypeAlias = Literal["layers", "whole", "rows", "ordered"]
"""How steps are run: some layers at a time, as one program, in rows of one shape, or as one program
whose sums have an order of their own."""


class Executable(NamedTuple):
    """What a device call is compiled for: all that is static in it but the model.

    Its kind is "prefill", "decode", "decode_steps", "sample", "score", "copy" or "edit"; "rows" is
    the model's step in deterministic mode.
    """

    kind: str
    rows: int = 0  # of the batch
    tokens: int = 1  # of a row; of "decode_steps", the most steps of a row
    spec: SamplingSpec | None = None  # of the sampler or scorer; None: another call samples
    extras: StepExtras = NO_EXTRAS  # of the model; plans list none
    bans: int = 0  # room for the banned tokens of a step, where they are exceptionally many
    most_tokens: int | None = None
    """Of a "prefill", the most of its tokens that are no padding, and all that it computes; None:
    it computes padding, too."""
    is_adapted: bool = False  # whether the parameters hold adapters, and rows may have one each

    @property
    def sampler(self) -> SamplingSpec:
        """`spec`, of an executable that has one."""
        assert self.spec is not None, f"{self.kind} neither samples nor scores"
        return self.spec

    def __str__(self) -> str:
        """The kind, and what is not as usual: `decode rows=8 sampling=greedy`."""
        spec = self.spec
        functions = [one.name for one in self.extras.activation_edits]
        functions += ["activations"] if self.extras.residual_layers else []
        functions += ["experts"] if self.extras.reads_experts else []
        functions += ["given_experts"] if self.extras.forces_experts else []
        told: dict[str, object] = {"rows": self.rows or None}
        told["tokens"] = self.tokens if self.tokens > 1 else None
        if spec is not None:
            told["sampling"] = None if self.kind == "score" else spec.needed.name.lower()
            told["num_logprobs"] = spec.num_logprobs
            functions += [one.name for one in spec.processors]
            functions += ["record"] if spec.has_record else []
            functions += ["mask"] if spec.has_mask else []
        told["adapters"] = "yes" if self.is_adapted else None
        told["functions"] = ",".join(functions) or None
        told["bans"] = self.bans or None
        parts = (f"{name}={value}" for name, value in told.items() if value is not None)
        return " ".join((self.kind, *parts))


WITH_CACHE = ("prefill", "decode", "decode_steps", "rows")
"""The kinds that run the model."""

COPIES = Executable("copy")
"""The small programs that copy pages."""
EDITS = Executable("edit")
"""Those that keep what a request's edits of logits need."""


def is_plain_greedy(spec: SamplingSpec) -> bool:
    """Whether a sampler takes the likeliest token and reports nothing else."""
    asked = spec.needed, spec.num_logprobs, spec.has_record, spec.processors, spec.has_mask
    return asked == (SamplingClass.GREEDY, None, False, (), False)


def list_executables(
    kind: StepKind,
    shapes: Shapes,
    specs: Sequence[SamplingSpec],
    scores: Sequence[SamplingSpec],
    most_steps: int,
    has_adapters: bool = False,
) -> Iterator[Executable]:
    """Every executable of an engine, but for those of extras and of the user's functions.

    Args:
        kind: How steps are run.
        shapes: Which shapes exist.
        specs: Of the samplers that will be used.
        scores: Of the scorers.
        most_steps: Decode steps of one call.
        has_adapters: Whether the engine has any. A step without a row that asks for one is the
            same program as without.
    """
    for one in _list_plain(kind, shapes, specs, scores, most_steps):
        yield one
        if has_adapters and one.kind in WITH_CACHE:
            yield one._replace(is_adapted=True)


def _list_plain(
    kind: StepKind,
    shapes: Shapes,
    specs: Sequence[SamplingSpec],
    scores: Sequence[SamplingSpec],
    most_steps: int,
) -> Iterator[Executable]:
    chunks = "rows" if kind == "rows" else "prefill"
    for rows in shapes.prefill_rows:
        yield Executable(chunks, rows, shapes.prefill_columns, most_tokens=shapes.prefill_tokens)
    sampled: Collection[int] = shapes.prefill_rows
    if kind == "layers":
        sampled = sorted({*sampled, *shapes.decode_rows})
        for rows in shapes.decode_rows:
            yield Executable("decode", rows)
    if kind == "ordered":
        # With its sampling in it where that is plainly greedy; else that is a call of its own.
        sampled = sorted({*sampled, *shapes.sampled_rows})
        for rows in shapes.decode_rows:
            for spec in filter(is_plain_greedy, specs):
                yield Executable("decode", rows, spec=spec)
        if not all(map(is_plain_greedy, specs)):
            for rows in shapes.sampled_rows:
                yield Executable("decode", rows)
    if kind == "whole":
        for spec in specs:
            for rows in shapes.decode_rows if is_plain_greedy(spec) else shapes.sampled_rows:
                yield Executable("decode", rows, spec=spec)
    if most_steps > 1:
        for spec, rows in itertools.product(specs, shapes.decode_rows):
            if not spec.has_mask:  # the next mask follows from the token
                yield Executable("decode_steps", rows, most_steps, spec)
    for spec, rows in itertools.product(specs, sampled):
        yield Executable("sample", rows, spec=spec)
    for spec, rows in itertools.product(scores, shapes.prefill_rows):
        yield Executable("score", rows, shapes.prefill_columns, spec)
    yield COPIES
    if any(spec.needed >= SamplingClass.EDITED for spec in specs):
        yield EDITS
