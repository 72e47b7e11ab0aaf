r"""JSON Lines: a request a line in, an entry a line out.

A line of the input is an object with one prompt, and more where it is wanted:

    {"id": "a", "prompt": "The sea is", "sampling": {"max_tokens": 8, "stop": "\n"}}
    {"id": "b", "messages": [{"role": "user", "content": "Hello"}]}
    {"prompt_token_ids": [1, 2, 3]}

`prompt` is text as the model shall see it; `messages` go through the chat template. `sampling`
holds fields of SamplingParams; those that it leaves out keep the job's defaults. What the text must
be may stand in `response_format`, as OpenAI spells it. An id is a string or an integer, is unique
(1 and "1" are the same), and is "line-<number>" where none is given. Line numbers count from 1;
blank lines count, and mean nothing else.

A line of the output is the entry of one line of the input, in the order in which they finish:

    {"id": "a", "line": 1, "outputs": [{"index": 0, "text": ..., "token_ids": [...],
     "finish_reason": "length", "stop_reason": null, "seed": null}], "usage": {"prompt_tokens": 3,
     "output_tokens": 8}}
    {"id": null, "line": 7, "error": "not JSON: Expecting value: line 1 column 1 (char 0)"}

Samples have "cumulative_logprob" and "logprobs" where those were asked for, and an entry
"prompt_logprobs": for each token an object from token ids to {"logprob", "rank", "decoded_token"}.
They have a "record" where one was asked for: for each token an object with the fields of
LogprobRecord.
The id of an error is null where the line has none of its own: it could not be read, or it repeats
the id of another line. Numbers that JSON cannot spell (a log-probability of -inf) are null.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

import numpy as np

from folojax.requests.outputs import CompletionOutput, RequestOutput
from folojax.requests.sampling_params import SamplingParams
from folojax.requests.structured_outputs import response_format

Entry: TypeAlias = dict[str, Any]
"""One line of the output, as JSON holds it."""

ENTRY_START = b'{"id": '
"""How every entry begins."""

PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
KEYS = ("id", *PROMPT_KEYS, "sampling", "response_format")
_PROMPTS = ", ".join(PROMPT_KEYS)


def parse_object(raw: bytes) -> dict[str, Any]:
    """Reads a line of the input.

    Raises:
        ValueError: it is not UTF-8, not JSON, or not an object; or a key comes twice.
    """
    try:
        fields = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: brackets are nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a line is {fields!r:.60}; it must be an object with one of {_PROMPTS}")
    return fields


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} comes twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no number there")


def read_id(fields: Mapping[str, Any], number: int) -> str | int:
    """The id of a line, or the default that its number gives.

    Raises:
        ValueError: the id is neither a string nor an integer.
    """
    given = fields.get("id")
    if given is None:
        return f"line-{number}"
    if not isinstance(given, str | int) or isinstance(given, bool):
        raise ValueError(f"id is {given!r:.60}; it must be a string or an integer")
    return given


def check_fields(fields: Mapping[str, Any]) -> None:
    """Checks the form of a line, its prompt's and its parameters' values aside.

    Raises:
        ValueError: with every mismatch in one text.
    """
    problems = []
    unknown = sorted(fields.keys() - set(KEYS))
    if unknown:
        problems.append(f"unknown keys {unknown}; there are {list(KEYS)}")
    prompts = [key for key in PROMPT_KEYS if key in fields]
    if len(prompts) != 1:
        problems.append(f"prompts given: {prompts or 'none'}; there must be one of {_PROMPTS}")
    example = {"role": "user", "content": "Hello"}
    wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
        "prompt": (lambda value: isinstance(value, str), "text"),
        "prompt_token_ids": (lambda value: isinstance(value, list), "a list"),
        "messages": (_are_messages, f"a list of objects such as {json.dumps(example)}"),
    }
    problems += [
        f"{key} is {fields[key]!r:.60}; it must be {what}"
        for key, (is_right, what) in wanted.items()
        if key in fields and not is_right(fields[key])
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
        # Only a message that calls tools may say nothing.
        and all("content" in m or "tool_calls" in m for m in messages)
    )


def sampling_params(
    fields: Mapping[str, Any], defaults: SamplingParams, seed: int, line_id: str | int
) -> SamplingParams:
    """The parameters of a line.

    Args:
        fields: Of the line; without "sampling" it has the defaults.
        defaults: What it does not name.
        seed: Of the job; gives the line's own where it names none.
        line_id: Of the line.

    Raises:
        ValueError: a field is unknown or out of range.
    """
    given = fields.get("sampling")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"sampling is {given!r:.60}; it must be an object")
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ValueError(f"sampling has unknown fields {unknown}; there are {sorted(known)}")
    if isinstance(given.get("logit_bias"), dict):
        # JSON has no other keys than strings.
        given = given | {"logit_bias": {_as_id(k): v for k, v in given["logit_bias"].items()}}
    if fields.get("response_format") is not None:
        if given.get("structured_outputs") is not None:
            raise ValueError("response_format and structured_outputs say the same: give one")
        given = given | {"structured_outputs": response_format(fields["response_format"])}
    params = dataclasses.replace(defaults, **given)
    if params.seed is None and not params.is_greedy:
        return dataclasses.replace(params, seed=line_seed(seed, line_id))
    return params


def _as_id(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise ValueError(f"logit_bias has the key {key!r:.60}; it must be a token id") from None


def line_seed(seed: int, line_id: str | int) -> int:
    """The seed of a line that gives none: the same whenever and beside whatever it runs.

    Below 2**52, so that readers of JSON that hold numbers as doubles keep it, and the seeds of its
    `n` samples, as they are.
    """
    text = f"{seed} {line_id}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 12


def entry_of(line_id: str | int, number: int, output: RequestOutput) -> Entry:
    """The entry of a finished request. It depends on the line alone: no times are in it."""
    entry: Entry = {
        "id": line_id,
        "line": number,
        "outputs": [_sample(completion) for completion in output.outputs],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "output_tokens": sum(len(completion.token_ids) for completion in output.outputs),
        },
    }
    if output.prompt_logprobs is not None:
        entry["prompt_logprobs"] = output.prompt_logprobs
    return _plain(entry)


def _sample(completion: CompletionOutput) -> Entry:
    names = ["index", "text", "token_ids", "finish_reason", "stop_reason", "seed"]
    if completion.logprobs is not None:
        names.append("cumulative_logprob")
    asked_for = ("logprobs", "record", "activations", "routed_experts")
    names += [name for name in asked_for if getattr(completion, name) is not None]
    return {name: getattr(completion, name) for name in names}


def _plain(value: Any) -> Any:
    """A value as JSON holds it; a number that JSON cannot spell is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def error_entry(line_id: str | int | None, number: int, error: str) -> Entry:
    """The entry of a line that could not be run."""
    return {"id": line_id, "line": number, "error": " ".join(error.split())}


def find_error(entry: Entry) -> str | None:
    """What went wrong with a line: with the line itself, or with one of its samples."""
    if "error" in entry:
        return str(entry["error"])
    for completion in entry["outputs"]:
        if completion["finish_reason"] == "error":
            return str(completion["stop_reason"])
    return None


def dump(entry: Entry) -> bytes:
    """An entry as a line. All of it is ASCII, so any reader finds the same ends of lines."""
    return json.dumps(entry, allow_nan=False).encode("ascii") + b"\n"
