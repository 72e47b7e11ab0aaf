"""What the messages of a chat say: text, or a list of parts."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = dict[str, Any]

CONTENT_FORMATS = ("auto", "string", "openai")


def read_messages(messages: Sequence[Any]) -> list[Message]:
    """Copies of messages, whose lists of parts hold only parts of text.

    Raises:
        ValueError: a message has no role, or content that is no text; all of them are named.
    """
    problems, found = [], []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            problems.append(
                f'messages holds {message!r}; a message must be {{"role": ..., "content": ...}}'
            )
            continue
        copy = dict(message)
        content: Any = copy.get("content")
        if _has_parts(copy):
            parts = [_read_part(part) for part in content]
            problems += [
                f"message {index} has {_name(part)} at {place}; the model reads text only: give "
                'parts {"type": "text", "text": ...}, or a string'
                for place, part in enumerate(content)
                if parts[place] is None
            ]
            copy["content"] = [{"type": "text", "text": text} for text in parts] or ""
        # What a tool returned may be anything: there are templates that write it as JSON.
        elif not (content is None or isinstance(content, str) or copy["role"] == "tool"):
            problems.append(
                f"message {index} has content that is a {type(content).__name__}: "
                f"{content!r:.60}; it must be text, or a list of parts"
            )
        found.append(copy)
    if problems:
        raise ValueError("; ".join(problems))
    return found


def render(
    messages: list[Message], apply: Callable[[list[Message]], str], content_format: str = "auto"
) -> str:
    """A template's text for messages; it gets their parts, if it knows what they are.

    Elsewhere they are joined, each in a line of its own. Whether a template walks them is tried
    out: with marks for texts, it has to write every mark, and nothing of what is around them.

    Args:
        messages: As `read_messages` gives them.
        apply: Renders the template.
        content_format: "string" joins parts without trying; "openai" gives the template parts, also
            of contents that are one text.
    """
    if content_format == "openai":
        return apply([_in_parts(message) for message in messages])
    if not any(_has_parts(message) for message in messages):
        return apply(messages)
    numbers = itertools.count()

    def change(change_content: Callable[[list[Message]], Any]) -> list[Message]:
        return [
            message | {"content": change_content(message["content"])}
            if _has_parts(message)
            else message
            for message in messages
        ]

    marked = change(
        lambda content: [{"type": "text", "text": f"part{next(numbers)}end"} for _ in content]
    )
    joined = change(lambda content: "\n".join(part["text"] for part in content))
    if content_format == "string":
        return apply(joined)
    try:
        text = apply(marked)
    # Templates fail in any way on what they do not know.
    except Exception:
        return apply(joined)
    is_walking = all(f"part{number}end" in text for number in range(next(numbers))) and not any(
        around in text for around in ("'text':", '"text":', "'type':", '"type":')
    )
    return apply(messages if is_walking else joined)


def _has_parts(message: Mapping[str, Any]) -> bool:
    """Whether content is a list, and not what a tool returned: that is typed only if it is parts.

    A message that calls tools may have no content.
    """
    content = message.get("content")
    if not isinstance(content, Sequence) or isinstance(content, str | bytes):
        return False
    is_typed = all(isinstance(part, Mapping) and "type" in part for part in content)
    return is_typed or message["role"] != "tool"


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    is_text = isinstance(content, str)
    return message | {"content": [{"type": "text", "text": content}]} if is_text else message


def _read_part(part: Any) -> str | None:
    """The text of a part; None if it is of another kind."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        text = part.get("text")
        return text if isinstance(text, str) else None
    return None


def _name(part: Any) -> str:
    if not isinstance(part, Mapping):
        return f"a {type(part).__name__}"
    if part.get("type", "text") == "text":
        return f"a part without text ({part!r:.60})"
    return f"a part of type {part['type']!r}"
