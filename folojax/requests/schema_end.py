"""Whether JSON of a schema can end: one whose parts need themselves has no finite value."""

import urllib.parse
from collections.abc import Iterator
from typing import Any

_MOST_ROUNDS = 100


def has_end(schema: Any) -> bool:
    """Whether some finite value may be of a schema, as far as its references decide that.

    Of the references those are found, round by round, whose values end with the ones found so far.
    """
    ending: set[str] = set()
    targets = {ref: _target(schema, ref) for ref in _references(schema)}
    try:
        for _ in range(_MOST_ROUNDS):
            left = targets.keys() - ending
            found = {ref for ref in left if _ends(targets[ref], ending)}
            if not found:
                return _ends(schema, ending)
            ending |= found
    except (AttributeError, TypeError):
        pass  # of a misshapen one llguidance says what is wrong
    return True


def _ends(schema: Any, ending: set[str]) -> bool:
    if not isinstance(schema, dict):
        return True
    if "enum" in schema or "const" in schema:
        return True
    ref = schema.get("$ref")
    if isinstance(ref, str) and ref.startswith("#") and ref not in ending:
        return False
    for name in ("anyOf", "oneOf"):
        if schema.get(name) and not any(_ends(one, ending) for one in _list(schema[name])):
            return False
    if not all(_ends(one, ending) for one in _list(schema.get("allOf"))):
        return False
    kinds = schema.get("type")
    if kinds == "object":
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        needed = _list(schema.get("required"))
        return all(_ends(properties.get(str(name), others), ending) for name in needed)
    if kinds == "array":
        least, first = schema.get("minItems", 0), _list(schema.get("prefixItems"))
        has_more = least > len(first)
        needed = [*first[:least], *([schema.get("items")] if has_more else [])]
        return all(_ends(one, ending) for one in needed)
    return True


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _references(schema: Any) -> Iterator[str]:
    """All within the schema, in any order."""
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            if isinstance(one.get("$ref"), str):
                yield one["$ref"]
            left += one.values()
        elif isinstance(one, list):
            left += one


def _target(schema: Any, ref: str) -> Any:
    """What a reference within the schema points at; nothing where that is not there."""
    one = schema
    for part in ref.lstrip("#").split("/")[1:]:
        name = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(one, list) and name.isdecimal() and int(name) < len(one):
            one = one[int(name)]
        elif isinstance(one, dict):
            one = one.get(name)
        else:
            return None
    return one
