"""What a text must be, as a user says it and with vLLM's names; and as llguidance reads it."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from folojax.requests.schema_end import has_end
from folojax.requests.vllm_names import STRUCTURED_FIELDS, takes_names
from folojax.sched.option_fields import documented, option, option_problems

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

MAX_GRAMMAR_LENGTH = 1_000_000
"""Letters of a schema, an expression or a grammar."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_GRAMMAR_LENGTH


_TEXT: dict[str, Any] = {
    "is_valid": _is_text,
    "must_be": f"a text of at most {MAX_GRAMMAR_LENGTH:,} letters",
}
_JSON = {
    "is_valid": _is_text,
    "must_be": f"an object, or its JSON, of at most {MAX_GRAMMAR_LENGTH:,} letters",
}


@takes_names(STRUCTURED_FIELDS)
@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What a text must be: exactly one of the first six says it.

    The end of the text is an end token, which can be sampled where the text is whole, and nothing
    else where it cannot go on. Objects are kept as JSON.

    Raises:
        ValueError: it is none of them or several, or a field is not what it must be.
    """

    json: str | Mapping[str, Any] | None = option(
        None, "JSON of this schema, an object or its JSON.", **_JSON
    )
    regex: str | None = option(
        None, "A match of this regular expression, in the syntax of Rust's crate regex.", **_TEXT
    )
    choice: Iterable[str] | None = option(
        None,
        "One of these texts.",
        is_valid=lambda value: (
            isinstance(value, tuple) and bool(value) and all(map(_is_text, value))
        ),
        must_be="a list of at least one text",
    )
    grammar: str | None = option(
        None, "A text of this grammar, which is llguidance's Lark or llama.cpp's GBNF.", **_TEXT
    )
    json_object: bool | None = option(None, "Any JSON object.")
    structural_tag: str | Mapping[str, Any] | None = option(
        None,
        """Free text; but what follows one of "triggers" is one of "structures", each of a "begin",
        JSON of a "schema" and an "end".""",
        **_JSON,
    )
    disable_any_whitespace: bool = option(
        False, "JSON has no spaces and line breaks between its parts."
    )
    disable_additional_properties: bool = option(
        False, "Objects of a schema that lists properties have no others, unless it says so."
    )
    whitespace_pattern: str | None = option(
        None, "A regular expression of what may stand between parts of JSON.", **_TEXT
    )

    def __post_init__(self) -> None:
        for name in ("json", "structural_tag"):
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, _to_json(name, getattr(self, name)))
        if isinstance(self.choice, Iterable) and not isinstance(self.choice, str):
            object.__setattr__(self, "choice", tuple(self.choice))
        if problems := option_problems(self) or list(self._conflicts()):
            raise ValueError("StructuredOutputsParams: " + "; ".join(problems))

    @property
    def kind(self) -> str:
        """The name of the field that says it."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    def source(self, special_tokens: Collection[str]) -> str:
        """It as llguidance reads it.

        Args:
            special_tokens: Of the tokenizer; a trigger may be one.

        Raises:
            ValueError: it cannot be read so.
        """
        from llguidance import LLMatcher, grammar_from

        if self.kind in ("json", "json_object"):
            return self._schema_source(self.json or '{"type": "object"}')
        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.regex or "")
        if self.kind == "choice":
            return grammar_from("choice", json.dumps(list(self.choice or ())))
        if self.kind == "grammar":
            return grammar_from("grammar", self.grammar or "")
        return self._tag_source(special_tokens)

    def _conflicts(self) -> Iterator[str]:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            yield f"given are {given or 'none'}; there must be one of {', '.join(KINDS)}"
        others = self.disable_any_whitespace, self.disable_additional_properties
        is_json = given in (["json"], ["json_object"], ["structural_tag"])
        if not is_json and (any(others) or self.whitespace_pattern is not None):
            yield "disable_* and whitespace_pattern are for JSON: leave them out"

    def _schema_source(self, schema: Any) -> str:
        from llguidance import LLMatcher

        return LLMatcher.grammar_from_json_schema(
            json.dumps(self._schema(schema)), self._json_options()
        )

    def _json_options(self) -> Any:
        options: dict[str, Any] = {"whitespace_flexible": not self.disable_any_whitespace}
        if self.whitespace_pattern is not None:
            options["whitespace_pattern"] = self.whitespace_pattern
        return options

    def _schema(self, given: Any) -> Any:
        """A schema of JSON's own kinds, with what the options add."""
        schema = _read("the schema", given) if isinstance(given, str) else given
        if not has_end(schema):
            raise ValueError("the schema refers to itself without end: no value has all its parts")
        return _closed(schema) if self.disable_additional_properties else schema

    def _tag_source(self, special_tokens: Collection[str]) -> str:
        from llguidance import StructTag

        tag: Any = _read("structural_tag", self.structural_tag)
        if not isinstance(tag, dict) or not {"triggers", "structures"} <= tag.keys():
            raise ValueError('structural_tag must be an object with "structures" and "triggers"')
        tags, triggers = [], tag["triggers"]
        for one in tag["structures"]:
            begin, schema, end = one["begin"], one.get("schema", {}), one["end"]
            trigger = next((text for text in triggers if text and begin.startswith(text)), None)
            if trigger is None:
                raise ValueError(f'the "begin" {begin!r} starts with none of {triggers}')
            inner = self._schema(schema) | {"x-guidance": self._json_options()}
            tags.append(StructTag(trigger=trigger, begin=begin, grammar=inner, end=end))
        if not tags:
            raise ValueError('structural_tag has no "structures"')
        is_special = any(one.trigger in special_tokens for one in tags)
        return StructTag.to_grammar(tags, assume_special=is_special)


def structured_outputs(fields: Mapping[str, Any]) -> StructuredOutputsParams:
    """Of fields as JSON has them; ValueError if one is unknown or out of range."""
    known = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    if unknown := sorted(fields.keys() - {*known, *STRUCTURED_FIELDS}):
        raise ValueError(f"structured_outputs has unknown fields {unknown}; there are {known}")
    return StructuredOutputsParams(**fields)


def response_format(value: Any) -> StructuredOutputsParams | None:
    """Of a "response_format" as OpenAI spells it; None if it says nothing of the text.

    Raises:
        ValueError: it is none.
    """
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=value)
    schema = value.get("json_schema") if kind == "json_schema" else None
    if not isinstance(schema, Mapping) or not isinstance(schema.get("schema"), Mapping):
        raise ValueError(
            f"response_format is {value!r:.80}; its type must be text, json_object, structural_tag "
            'or json_schema, which has {"json_schema": {"schema": ...}}'
        )
    return StructuredOutputsParams(json=schema["schema"])


def _to_json(name: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"StructuredOutputsParams: {name} is no JSON: {error}") from error


def _read(name: str, text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from error


def _closed(schema: Any) -> Any:
    """A schema whose objects have the properties that it lists, and no others."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(one) for name, one in schema.items()}
    if "properties" in closed or "patternProperties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed
