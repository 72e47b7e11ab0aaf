"""What a text is asked to be: which fields that takes, and what is refused before it runs."""

import math
from typing import Any

import pytest

from folojax import LLM, SamplingParams, StructuredOutputsParams
from tests.reference import MORE_LIMITS


def asked(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=80, structured_outputs=StructuredOutputsParams(**fields))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"json": {"$ref": "#"}}, "refers to itself without end"),
    (
        {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
        "refers to itself without end",
    ),
    ({"json": {"type": "string", "minLength": 5, "maxLength": 2}}, "minLength .5. is greater"),
    ({"json": {"not": {"type": "string"}}}, "Unimplemented keys"),
    ({"json": "{"}, "no JSON"),
    ({"json": '{"a":' * 20_000 + "1" + "}" * 20_000}, "no JSON|recursion"),
    ({"json": {"properties": [1]}}, "structured_outputs: json: "),
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": "(((a{1000}){1000}){1000}){1000}"}, "too many expressions"),
    ({"regex": r"[^\s\S]"}, "no text is one"),
    ({"grammar": "start: a"}, "unknown name"),
    ({"grammar": "start: start"}, "no text is one"),
    ({"grammar": "foo: 'a'"}, "structured_outputs: grammar: "),
    ({"choice": ["é"]}, "none that the tokenizer can write"),
    ({"structural_tag": {"structures": []}}, '"triggers"'),
    ({"structural_tag": {"structures": [], "triggers": ["<a>"]}}, 'no "structures"'),
    ({"structural_tag": {"structures": [{"end": ""}], "triggers": ["<a>"]}}, "begin"),
]


@pytest.mark.parametrize(("fields", "match"), REFUSED)
def test_a_grammar_that_cannot_be_followed_is_refused(
    letters_llm: LLM, fields: dict[str, Any], match: str
) -> None:
    params = asked(**fields)
    with pytest.raises(ValueError, match=match) as error:
        letters_llm.generate("The sea", [params], use_tqdm=False)
    assert len(str(error.value)) < 1000


def test_an_engine_without_texts_refuses(tiny_model: tuple) -> None:
    params = asked(json={"type": "object"})
    with pytest.raises(ValueError, match="needs a tokenizer and an end token"):
        LLM(tiny_model, **MORE_LIMITS).generate([[5]], params, use_tqdm=False)


def test_nothing_is_shared_that_a_caller_can_change() -> None:
    schema: dict[str, Any] = {"type": "object"}
    params = StructuredOutputsParams(json=schema)
    schema["type"] = "array"
    assert params == StructuredOutputsParams(json={"type": "object"})
    assert hash(params) == hash(StructuredOutputsParams(json='{"type": "object"}'))
    as_dict = SamplingParams(structured_outputs={"json": {"type": "object"}})  # type: ignore[arg-type]
    assert as_dict.structured_outputs == params


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "given are none"),
        ({"regex": "a", "choice": ["a"]}, "there must be one of json, regex"),
        ({"json_object": False}, "given are none"),
        ({"choice": []}, "at least one text"),
        ({"choice": "ab"}, "at least one text"),
        ({"choice": [1]}, "at least one text"),
        ({"regex": 5}, "must be a text"),
        ({"regex": "a" * 1_000_001}, "must be a text of at most 1,000,000"),
        ({"json": {"a": math.pi, "b": {1, 2}}}, "no JSON"),
        ({"json": 5}, "an object, or its JSON"),
        ({"regex": "a", "disable_any_whitespace": True}, "are for JSON"),
        ({"json_object": 1}, "True or False"),
        ({"regex": "a", "backend": "outlines"}, "llguidance is behind"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        StructuredOutputsParams(**fields)
    with pytest.raises(ValueError, match=match):
        SamplingParams(structured_outputs=fields)  # type: ignore[arg-type]
