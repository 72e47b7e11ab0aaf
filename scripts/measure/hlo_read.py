"""What a compiled GPU program does, read from its HLO text and its sequence of thunks.

A thunk is what XLA's runtime starts: a kernel, a library call, a copy, or a command buffer, which
is a recorded CUDA graph of all of these and is started as one.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence

_WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}  # else the digits are bits

# These name a value and move nothing.
_FREE = {"parameter", "bitcast", "get-tuple-element", "tuple", "constant"}
_VIEWS = {"bitcast", "get-tuple-element"}
_GATHERS = {"all-gather", "all-gather-start"}
_PICKS = {"gather", "dynamic-slice", "slice"}
_WRITES = {"scatter", "dynamic-update-slice"}

# How the targets of calls that read pages begin: cuDNN's, and our own kernel's.
_ATTENTION = ("__cudnn$fmha", "__gpu$xla.gpu.triton")
_OF_ATTENTION = (
    *("read_pieces", "join_pieces"),
    *("store_tokens", "attend_in_order", "attend_pieces_in_order", "join_in_order"),
)

_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^\s*([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_THUNK = re.compile(r"^(\s*)\d+: (k\w+)\s+\[.*?\]\s*(\S*)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: Of its value.
        opcode: What it is.
        shapes: Element type and dimensions of the arrays that it gives.
        operands: Names of the values that it takes.
        calls: The computation inside a fusion, or "".
        index: Of a parameter, its place.
        argument: Of a parameter, the name that the traced function gave it.
        target: Of a custom call, its name.
        in_place: Of a custom call, places of the operands that it gives back changed.
        is_root: Whether it is what its computation gives.
    """

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    calls: str
    index: int
    argument: str
    target: str
    in_place: tuple[int, ...]
    is_root: bool

    @property
    def num_elements(self) -> int:
        """Of all its arrays."""
        return sum(math.prod(dims) for _, dims in self.shapes)

    @property
    def num_bytes(self) -> float:
        """Of all its arrays; a type of less than a byte takes a part of one."""
        return math.fsum(_width(kind) * math.prod(dims) for kind, dims in self.shapes)


@dataclasses.dataclass(frozen=True)
class Thunk:
    """One entry of the sequence; `depth` is above 0 inside a command buffer or a loop."""

    kind: str
    name: str
    depth: int


class Program:
    """A compiled program: computations by name, the entry first among them."""

    def __init__(self, hlo_text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry: dict[str, Instruction] = {}
        current: dict[str, Instruction] = {}
        for line in hlo_text.splitlines():
            if line.endswith("{") and " = " not in line.partition("->")[0]:
                head = line.removeprefix("ENTRY ").lstrip("%")
                name = re.split(r"[\s(]", head, maxsplit=1)[0]
                current = self.computations.setdefault(name, {})
                if line.startswith("ENTRY"):
                    self.entry = current
            elif instruction := _parse(line):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text has no ENTRY computation: it is not that of a program")

    @functools.cached_property
    def cache_values(self) -> dict[str, Instruction]:
        """Values of the entry that are an array of the cache where it lies, old or new."""
        found: dict[str, Instruction] = {}
        for one in self.entry.values():
            is_argument = one.opcode == "parameter" and one.argument.startswith("cache")
            is_view = one.opcode in _VIEWS and one.operands[0] in found
            if one.opcode == "get-tuple-element" and is_view:
                whole = found[one.operands[0]]
                is_view = one.num_elements == max(math.prod(dims) for _, dims in whole.shapes)
            if is_argument or is_view or self._is_write_to(one, found):
                found[one.name] = one
        return found

    def cache_moves(self) -> list[str]:
        """Instructions that copy, transpose or convert an array of the cache as a whole.

        Each takes such an array and gives one of more than half as many elements, other than a
        write in place.
        """
        moves, cache = [], self.cache_values
        for one in self.entry.values():
            sources = [cache[name].num_elements for name in one.operands if name in cache]
            if one.opcode in _FREE or one.name in cache or not sources:
                continue
            # A library call gives its workspace as well, as bytes.
            sizes = [math.prod(dims) for kind, dims in one.shapes if kind not in ("s8", "u8")]
            if 2 * max(sizes, default=0) > max(sources):
                moves.append(f"{one.opcode} {one.name} {one.shapes} {self._inside(one)}")
        return moves

    def host_calls(self) -> list[str]:
        """Calls out of the program into Python or to the host's memory."""
        names = ("callback", "infeed", "outfeed", "send", "recv", "host")
        found = []
        for computation in self.computations.values():
            for one in computation.values():
                told = one.target if one.opcode == "custom-call" else one.opcode
                if any(name in told.lower() for name in names):
                    found.append(f"{one.name} {told}")
        return found

    def most_gathered(self) -> int:
        """Numbers that the largest gather from several devices gives, wherever it stands."""
        every = [one for inside in self.computations.values() for one in inside.values()]
        return max((one.num_elements for one in every if one.opcode in _GATHERS), default=0)

    def bytes_moved(self) -> float:
        """Bytes that the entry's kernels read and write, each array once a kernel.

        Where a kernel picks rows of an array or writes rows into it, only these count. What a
        library call or a fusion reads twice counts once. Attention reads those pages of the cache
        that are in use: how many is not known here, and they count nothing.
        """
        return sum(self._bytes(one) for one in self.entry.values())

    def opcodes(self) -> collections.Counter[str]:
        """How often each opcode that moves something stands in the entry."""
        return collections.Counter(
            one.opcode for one in self.entry.values() if one.opcode not in _FREE
        )

    def _bytes(self, one: Instruction) -> float:
        if one.opcode in _FREE:
            return 0
        total = 0.0 if one.name in self.cache_values else one.num_bytes
        for index, name in enumerate(one.operands):
            operand = self.entry.get(name)
            is_paged = one.target.startswith(_ATTENTION) and name in self.cache_values
            if operand is not None and not is_paged:
                total += self._bytes_read(one, index, operand)
        return total

    def _bytes_read(self, one: Instruction, index: int, operand: Instruction) -> float:
        inside = self.computations.get(one.calls, {})
        argument = next(
            (x.name for x in inside.values() if x.opcode == "parameter" and x.index == index), None
        )
        users = [x for x in inside.values() if argument in x.operands]
        if users and all(x.opcode in _PICKS and x.operands[0] == argument for x in users):
            return min(operand.num_bytes, sum(x.num_bytes for x in users))
        if users and all(x.opcode in _WRITES and x.operands[0] == argument for x in users):
            updates = [inside[x.operands[-1]] for x in users if x.operands[-1] in inside]
            return sum(x.num_bytes for x in updates)
        return operand.num_bytes

    def _is_write_to(self, one: Instruction, cache: dict[str, Instruction]) -> bool:
        """Whether it writes into an array of the cache, and gives that array."""
        shapes = {shape for name in one.operands if name in cache for shape in cache[name].shapes}
        if one.opcode in _WRITES:
            return one.operands[0] in cache
        if any(one.operands[place] in cache for place in one.in_place):
            return True
        roots = [x for x in self.computations.get(one.calls, {}).values() if x.is_root]
        is_write = any(self._leads_to_write(one.calls, root) for root in roots)
        return one.opcode == "fusion" and is_write and set(one.shapes) <= shapes

    def _leads_to_write(self, computation: str, root: Instruction) -> bool:
        if root.opcode in _WRITES:
            return True
        inside = self.computations[computation]
        is_name = root.opcode in ("tuple", "bitcast")
        return is_name and all(
            self._leads_to_write(computation, inside[name]) for name in root.operands
        )

    def _inside(self, one: Instruction) -> list[str]:
        inside = self.computations.get(one.calls, {})
        return sorted({x.opcode for x in inside.values()} - _FREE)


def read_thunks(text: str) -> list[Thunk]:
    """The thunks of a dump named thunk_sequence_after_thunk_passes."""
    found = [match for match in map(_THUNK.match, text.splitlines()) if match]
    return [Thunk(kind, name, len(space) // 4) for space, kind, name in (m.groups() for m in found)]


def count_kernels(thunks: Sequence[Thunk]) -> int:
    """Kernels and library calls, inside command buffers and outside."""
    return sum(thunk.kind not in _HOLDERS for thunk in thunks)


def kernels_per_layer(thunks: Sequence[Thunk]) -> int:
    """Most kernels from one call of attention to the next, attention's aside; 0 with none between.

    Of a decode step that is a layer, as it attends once in each.
    """
    is_call = [one.kind == "kCuDnn" or one.name in _OF_ATTENTION for one in thunks]
    calls = [index for index, is_it in enumerate(is_call) if is_it]
    return max((after - before - 1 for before, after in itertools.pairwise(calls)), default=0)


def outside_buffers(thunks: Sequence[Thunk]) -> list[Thunk]:
    """What the host starts by itself beside command buffers."""
    return [one for one in thunks if one.depth == 0 and one.kind not in _HOLDERS]


def num_command_buffers(thunks: Sequence[Thunk]) -> int:
    """How many there are."""
    return sum(one.kind == "kCommandBuffer" for one in thunks)


_HOLDERS = ("kCommandBuffer", "kSequential", "kWhile", "kConditional")


def _parse(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    root, name, rest = match.groups()
    if rest.startswith("("):
        kind, rest = _split_at_close(rest[1:])
    else:
        kind, _, rest = rest.partition(" ")
    operation = _OPCODE.match(rest)
    if operation is None:
        raise ValueError(f"not an instruction of HLO: {line.strip()[:200]}")
    opcode, rest = operation.groups()
    inside, after = _split_at_close(rest)
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=tuple(_shapes(kind)),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        calls=_first(r"calls=%?([\w.\-]+)", after),
        index=int(inside) if opcode == "parameter" else -1,
        argument=_first(r'op_name="([^"]*)"', after) if opcode == "parameter" else "",
        target=_first(r'custom_call_target="([^"]*)"', after),
        in_place=tuple(
            int(place)
            for aliases in re.findall(r"output_to_operand_aliasing=\{(.*?\))\}", after)
            for place in re.findall(r": \((\d+),", aliases)
        ),
        is_root=root is not None,
    )


def _split_at_close(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes a list, and after it."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""


def _shapes(kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", kind)):
        yield name, tuple(int(d) for d in dims.split(",") if d)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else ""


def _width(kind: str) -> float:
    if kind in _WIDTHS:
        return _WIDTHS[kind]
    digits = re.search(r"\d+", kind)
    return int(digits.group()) / 8 if digits else 0
