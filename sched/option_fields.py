"""Dataclass fields that carry what else there is to say of them: what they mean and may be.

::

    max_num_seqs: int | None = option(None, "Most requests that run at once.", at_least=1)

From such a field follow its check (`option_problems`), its place in the docstring of its class
(`documented`), and in `folojax.config` its line in docs/options.md and its flag on the command
line. Of what type it is, and whether None is a value, is its annotation.
"""

import dataclasses
import functools
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_KEY = "folojax option"

_Class = TypeVar("_Class", bound=type)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """What a field says of itself.

    Attributes:
        name: Of the field.
        default: Likewise.
        doc: What it means, in sentences.
        kind: bool, int, float, str, or what else it is annotated with; of a list, that of an item.
        is_list: Whether it holds several of them.
        has_none: Whether None is a value.
        at_least: The lowest number.
        above: What every number is above.
        at_most: The highest number.
        below: What every number is below.
        choices: The texts that it may be; empty: any.
        is_valid: The check of what is none of these types.
        must_be: What passes that check, as it follows on "it must be".
    """

    name: str = ""
    default: Any = None
    doc: str = ""
    kind: Any = None
    is_list: bool = False
    has_none: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    is_valid: Callable[[Any], bool] | None = None
    must_be: str = ""

    @property
    def wanted(self) -> str:
        """What it may be, as it follows on "it must be"."""
        if self.must_be:
            return self.must_be
        if self.choices:
            return f"{'None or ' if self.has_none else ''}one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "True or False"
        if self.kind is int and self.at_most is None:
            return f"an integer of at least {self.at_least}"
        if self.kind is int:
            return f"an integer from {self.at_least} to {self.at_most}"
        low = f"({self.above:g}" if self.at_least is None else f"[{self.at_least:g}"
        high = f"{self.below:g})" if self.at_most is None else f"{self.at_most:g}]"
        return f"a finite number in {low}, {high}"

    def accepts(self, value: Any) -> bool:
        """Whether a value may stand in the field."""
        if value is None:
            return self.has_none
        if self.is_valid is not None:
            return self.is_valid(value)
        if self.choices:
            return isinstance(value, str) and value in self.choices
        # A bool is an int to Python, but `page_size=True` is a mistake.
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if not isinstance(value, int if self.kind is int else int | float):
            return False
        return (  # and False of NaN, which is neither above nor below
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def option(default: Any, doc: str, **rules: Any) -> Any:
    """A dataclass field with its documentation and rules.

    Args:
        default: Of the field; `dataclasses.MISSING` where it must be given.
        doc: What it means, in sentences.
        **rules: `at_least`, `above`, `at_most`, `below`, `choices`, or `is_valid` and `must_be`;
            see `Option`.
    """
    declared = Option(doc=" ".join(doc.split()), **rules)
    return dataclasses.field(default=default, metadata={_KEY: declared})


def option_like(cls: type, name: str, default: Any, more: str = "") -> Any:
    """A field with the documentation and rules of another class's, and a default of its own.

    Args:
        cls: That class.
        name: Of its field.
        default: Of the new field.
        more: What is to be said of it beyond; what None is, if the default is None.
    """
    (other,) = (one for one in options_of(cls) if one.name == name)
    doc = " ".join(f"{other.doc} {more}".split())
    return dataclasses.field(default=default, metadata={_KEY: dataclasses.replace(other, doc=doc)})


@functools.cache
def options_of(cls: type) -> tuple[Option, ...]:
    """The options among the fields of a dataclass, in their order."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        if _KEY in field.metadata:
            kinds = _alternatives(hints[field.name])
            lists = [kind for kind in kinds if typing.get_origin(kind) is Iterable]
            kind = typing.get_args(lists[0])[0] if lists else kinds[0]
            found.append(
                dataclasses.replace(
                    field.metadata[_KEY],
                    name=field.name,
                    default=field.default,
                    kind=kind,
                    is_list=bool(lists),
                    has_none=types.NoneType in kinds,
                )
            )
    return tuple(found)


def option_problems(instance: Any) -> list[str]:
    """Says of each option that holds what it may not be what it must be; empty if none does."""
    cls: type = type(instance)
    problems = []
    for one in options_of(cls):
        value = getattr(instance, one.name)
        if not one.accepts(value):
            shown = list(value) if one.is_list and isinstance(value, tuple) else value
            problems.append(f"{one.name} is {shown!r}; it must be {one.wanted}")
    return problems


def documented(cls: _Class) -> _Class:
    """Puts the options of a dataclass into its docstring, as its attributes."""
    lines = [
        textwrap.fill(
            f"{one.name}: {one.doc}", 100, initial_indent=" " * 8, subsequent_indent=" " * 12
        )
        for one in options_of(cls)
    ]
    head, *rest = (cls.__doc__ or "").rstrip().split("\n    Raises:")
    sections = [head.rstrip(), "", "    Attributes:", *lines]
    sections += [f"\n    Raises:{text}" for text in rest]
    cls.__doc__ = "\n".join(sections) + "\n    "
    return cls


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)
