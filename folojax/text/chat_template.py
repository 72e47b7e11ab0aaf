"""Chat templates without transformers, which takes seconds to import, and PyTorch with it.

The settings and names are those that transformers gives to templates, so the text is the same: the
tests compare them. Only the usual is done here: messages of a role and a text, and no options. All
else (tools and their calls, a last message to be gone on with, variables of a template's own,
marks for training) is left to transformers.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from folojax.text.chat_messages import Message


def render_usual(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    options: Mapping[str, Any],
) -> str | None:
    """The text of a conversation; None if transformers has to render it.

    Args:
        template: In Jinja; it comes from anywhere, and runs in a sandbox.
        messages: As `read_messages` gives them.
        special_tokens: By name, such as "bos_token".
        options: As of transformers' `apply_chat_template`.

    Raises:
        Exception: whatever the template does wrong.
    """
    asked: dict[str, Any] = {"tools": None, "continue_final_message": False, **options}
    is_prompted = asked.pop("add_generation_prompt", False)
    is_usual = asked == {"tools": None, "continue_final_message": False}
    if not (is_usual and messages and all(map(_is_usual, messages))):
        return None
    compiled = _compile(template)
    if compiled is None:
        return None
    return compiled.render(
        **special_tokens,
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=is_prompted,
    )


def _is_usual(message: Message) -> bool:
    """Whether transformers would hand a message to the template as it is."""
    content = message.get("content")
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    # Of subclasses a template could call more methods.
    return message.keys() == {"role", "content"} and all(
        type(text) is str for text in (message["role"], *texts)
    )


@functools.lru_cache
def _compile(template: str) -> Any:
    """The template, ready to render; None if it is not in the language that is known here."""
    import jinja2.ext  # slow to import, and not needed with token ids
    import jinja2.sandbox

    class Namespace(jinja2.utils.Namespace):
        """What `{% set box.name = value %}` writes to; names with an underscore lead out of it."""

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")

    def namespace(*args: Any, **kwargs: Any) -> Namespace:
        fields = dict(*args, **kwargs)
        for name in fields:
            check_name(name)
        return Namespace(fields)

    class Dict:
        """The class `dict` as a value that has none of a class's attributes."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": namespace,
    }
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError:
        return None
