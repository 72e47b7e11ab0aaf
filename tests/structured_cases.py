"""Schemas, regular expressions and grammars, each with a check that knows nothing of llguidance."""

import ast
import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema

_KEYS = ("name", "Größe", "日本", "a b", 'q"uote', "x", "🌶", "key-1", "back\\slash", "")
_PATTERNS = ("^[a-z]{1,4}$", "^(ab|cd)+x?$", r"^\d{3}-\d{2}$", "^[A-Z][a-z]{0,3}$", "^é{2}$")
_VALUES = (1, "one", None, True, [1, 2], {"k": "v"}, -2.5, "é", 20000000000)
_LIST: dict[str, Any] = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 9},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]},
    },
    "required": ["value", "next"],
    "additionalProperties": False,
}
_TREE: dict[str, Any] = {
    "type": "array",
    "items": {"$ref": "#/$defs/tree"},
    "maxItems": 2,
}


def schemas(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many schemas; the first ones have every kind in them."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        schema = _schema(draw, depth=3, kind=_KINDS[index % len(_KINDS)])
        used = json.dumps(schema)
        needed = {"list": _LIST, "tree": _TREE}
        defs = {name: one for name, one in needed.items() if f"$defs/{name}" in used}
        found.append(schema | ({"$defs": defs} if defs else {}))
    return found


_KINDS = (
    *("object", "array", "enum", "anyOf", "pattern", "integer", "number", "empty", "list", "tree"),
    *("string", "boolean", "null", "const", "format"),
)


def _schema(draw: random.Random, depth: int, kind: str | None = None) -> dict[str, Any]:
    kind = kind or draw.choice(_KINDS if depth else _KINDS[4:7] + _KINDS[10:])
    low = draw.choice((-20000000000, -7, 0, 3, 19999999990))
    match kind:
        case "object":
            keys = draw.sample(_KEYS, draw.randint(1, 4))
            return {
                "type": "object",
                "properties": {key: _schema(draw, depth - 1) for key in keys},
                "required": draw.sample(keys, draw.randint(0, len(keys))),
                "additionalProperties": False,
            }
        case "array":
            least = draw.randint(0, 2)
            items = _schema(draw, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + 1}
        case "enum":
            return {"enum": draw.sample(_VALUES, 3)}
        case "anyOf":
            return {"anyOf": [_schema(draw, depth - 1) for _ in range(2)]}
        case "pattern":
            return {"type": "string", "pattern": draw.choice(_PATTERNS)}
        case "integer":
            return {"type": "integer", "minimum": low, "maximum": draw.choice((low, 20000000000))}
        case "number":
            return {"type": "number", "exclusiveMinimum": low - 0.5, "maximum": 2e10}
        case "empty":
            return {"type": "object", "properties": {}, "additionalProperties": False}
        case "list" | "tree":
            return {"$ref": f"#/$defs/{kind}"}
        case "string":
            return {"type": "string", "minLength": draw.randint(0, 2), "maxLength": 4}
        case "const":
            return {"const": draw.choice(_VALUES)}
        case "format":
            return {"type": "string", "format": draw.choice(("date", "time", "ipv4", "uuid"))}
    return {"type": kind}


def is_json_of(schema: Any, text: str) -> bool:
    """Whether a text is JSON of a schema, as jsonschema sees it."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return True


REGEXES = (
    *("abc", "a|b|cd", "[a-z]{3,6}", "(ab)+c", "x?y?z", r"\d{1,4}", r"-?\d+(\.\d{1,3})?"),
    *(r"\d{4}-\d{2}-\d{2}", "(yes|no|maybe)!?", "[^a-z]{2}", "a{0,3}b{2}", "(a|(b|(c|d)))e"),
    *("😀", "😀{2,3}", "(😀|🌶)+!", "[😀-😄]{2}", "👍🏽|👍", "🇫🇷{1,2}", "👩‍👩‍👧", "a😀b🌶c"),
    *(
        "é+",
        "[äöüß]{3}",
        "日本(語|人)",
        "[αβγ]{4}",
        "[一-十]{1,3}",
        "שלום",
        "(é|日|😀)x",
        "caf(é|e)",
    ),
    *(r"[A-Z][a-z]+ [A-Z][a-z]+", r"\w{2,5}@\w{2,5}\.(com|org)", r"#[0-9a-f]{6}", r"\s?x\s?"),
    *(r"\(\d{3}\) \d{3}-\d{4}", r"(\d{1,3}\.){3}\d{1,3}", r"[01]?\d:[0-5]\d", r"\[(\d,){0,3}\d\]"),
    *(r"\{\}", r"\\n", "\\n", "\t?a", "a.c", "a.{0,3}c", "(?i:paris)", "[[:digit:]]{2}", r"\$\d+"),
    *("(a{2}){3}", "(|a)b", "[.]{3}", "'[^']{0,4}'", '"[^"]{0,4}"'),
)
"""Fifty, read alike by Rust's regex and by Python's re, but for one class that `matches` knows."""


def matches(regex: str, text: str) -> bool:
    """Whether a text is a match, as Python's re sees it."""
    return re.fullmatch(regex.replace("[[:digit:]]", "[0-9]"), text) is not None


def _is_expression(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return re.fullmatch(r"[0-9+*()]+", text) is not None


def _is_balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += {"(": 1, ")": -1}[letter]
        if depth < 0:
            return False
    return depth == 0


def _is_list(text: str) -> bool:
    return isinstance(json.loads(text), list)


def _re(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


def _is_assigned(text: str) -> bool:
    return text.startswith("x = ") and is_json_of({"type": "boolean"}, text[4:])


GRAMMARS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ('start: "yes" | "no"', _re("yes|no")),
    ('start: e\ne: t ("+" t)*\nt: f ("*" f)*\nf: /[1-9]/ | "(" e ")"', _is_expression),
    ('start: p*\np: "(" p* ")"', _is_balanced),
    ('start: s\ns: "a" s "b" | "ab"', lambda text: text == "a" * (n := len(text) // 2) + "b" * n),
    ('start: n ("," n)*\nn: /[0-9]/', _re("[0-9](,[0-9])*")),
    ('start: K "=" V\nK: /[a-z]{1,3}/\nV: /[0-9]{1,3}/', _re("[a-z]{1,3}=[0-9]{1,3}")),
    ("start: D\nD: /[0-9]{4}-[01][0-9]/", _re("[0-9]{4}-[01][0-9]")),
    ('start: "#" H{6}\nH: /[0-9a-f]/', _re("#[0-9a-f]{6}")),
    ('start: l\nl: "[" (l ("," l)*)? "]"', _is_list),
    ('start: "<b>" /[a-z]{0,5}/ "</b>"', _re("<b>[a-z]{0,5}</b>")),
    ('start: "x = " %json {"type": "boolean"}', _is_assigned),
    ('start: "SELECT " c " FROM " c\nc: "a" | "b" | "日本"', _re("SELECT .+ FROM (a|b|日本)")),
    ('start: "😀"+ "!"', _re("😀+!")),
    ('start: m m?\nm: /[KQRBN]?[a-h][1-8]/ " "', _re("([KQRBN]?[a-h][1-8] ){1,2}")),
    ('start: "a"{2,4}', _re("a{2,4}")),
    ('start: ("x" | "y")? "z"', _re("[xy]?z")),
    ('root ::= "yes" | "no"', _re("yes|no")),
    ('root ::= item ("," item)*\nitem ::= [a-c]+ | "é"', _re("([a-c]+|é)(,([a-c]+|é))*")),
    ('root ::= "(" root ")" | "x"', _re(r"\(*x\)*")),
    ('root ::= digit digit? "\\n"\ndigit ::= [0-9]', _re("[0-9]{1,2}\n")),
)
"""Twenty, of Lark and of GBNF."""
