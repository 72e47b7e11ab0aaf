"""From a directory to a tokenizer: without transformers, where it would add nothing.

transformers reads several files, by rules of each model's own class, and imports PyTorch where it
is installed: seconds. What comes of it is nearly always one object of the tokenizers library, which
that library reads from a single file in a tenth of a second. If tokenizer.json is all that there
is, it is read as it is. Else the object that transformers makes of the directory is kept in the
cache, for the next start. Transformers itself is loaded when somebody asks for its tokenizer, or
for more than the usual of a chat template (`folojax.text.chat_template`).

    tokenizer.json ─────────────────────────────────────────────> tokenizers.Tokenizer
    directory ──> transformers ──> tokenizers.Tokenizer ──> cache ──────^
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from folojax.models.files.gguf_tokenizer import special_token
from folojax.models.files.untrusted_files import PICKLE_SUFFIXES
from folojax.models.machine.artefacts import build_once, cache_root, file_digest
from folojax.text.chat_messages import Message
from folojax.text.chat_template import render_usual
from folojax.text.tokenizer import Tokenizer

_FILE = "tokenizer.json"
_ROLES_FILE = "roles.json"
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATES = "additional_chat_templates"
"""A directory of named ones."""
_NO_TOKENIZER = PICKLE_SUFFIXES | {".safetensors", ".gguf"}
"""Suffixes of files that are no part of a tokenizer."""

_TOKENIZER_FILE = re.compile(r"token|vocab|merges|tekken|\.(model|spm|tiktoken)$")
"""What is in the name of every file that a tokenizer could be read from."""

_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Two names of the class that does nothing of its own."""

_PLAIN_KEYS = {
    "backend",
    "bos_token",
    "chat_template",
    "clean_up_tokenization_spaces",
    "eos_token",
    "model_max_length",
    "pad_token",
    "tokenizer_class",
    "unk_token",
}
"""Of tokenizer_config.json: what has no effect on a tokenizer that knows its special tokens."""

_OLDER_FILES = ("added_tokens.json", "special_tokens_map.json")
"""What transformers reads beside the tokenizer's file and config."""

_DONE_BY_BACKEND = (
    "added_tokens_decoder",
    "encode",
    "_encode_plus",
    "decode",
    "_decode",
    "get_vocab",
)
"""What transformers' class leaves to its backend, unless a model's own class does otherwise."""


class Roles(NamedTuple):
    """What transformers knows of a tokenizer beside its backend.

    Attributes:
        special_tokens: Texts by name, such as "bos_token".
        chat_template: In Jinja; something else where there are several with names.
    """

    special_tokens: dict[str, str]
    chat_template: Any


class Backend:
    """What a transformers tokenizer leaves to its backend, under the same names."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str | None) -> None:
        self.backend_tokenizer = backend
        # As transformers does before it encodes: files may ask for either.
        backend.no_padding()
        backend.no_truncation()
        self.eos_token_id = None if eos_token is None else backend.token_to_id(eos_token)

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """Added tokens by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added ones included."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = False,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of tokens; backends never write spaces between special ones."""
        return self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


class LazyTokenizer(Tokenizer):
    """A tokenizer that needs transformers only when somebody asks for `hf`."""

    def __init__(
        self, backend: tokenizers.Tokenizer, load: Callable[[], Any], roles: Roles
    ) -> None:
        """`load` gives the transformers tokenizer whose backend and roles these are."""
        super().__init__(Backend(backend, roles.special_tokens.get("eos_token")))
        self._load: Callable[[], Any] | None = load
        self._roles = roles

    @property
    def hf(self) -> Any:
        """The tokenizer of transformers, loaded when it is first asked for.

        From then on it encodes and decodes too, for whoever has it may change it.
        """
        if self._load is not None:
            self._source, self._load = self._load(), None
        return self._source

    @property
    def has_chat_template(self) -> bool:
        """Whether it has a template of its own."""
        if self._load is None:
            return super().has_chat_template
        return self._roles.chat_template is not None

    def _apply_chat_template(
        self, messages: list[Message], chat_template: str | None, options: Mapping[str, Any]
    ) -> str:
        own = self._roles.chat_template
        template = own if chat_template is None else chat_template
        # Where there are several, the one that is asked for may be a name.
        if self._load is not None and isinstance(template, str) and isinstance(own, str | None):
            text = render_usual(template, messages, self._roles.special_tokens, options)
            if text is not None:
                return text
        return super()._apply_chat_template(messages, chat_template, options)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has files of a tokenizer, whatever is in them."""
    return any(_TOKENIZER_FILE.search(path.name) for path in directory.iterdir())


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer of a directory in the Hugging Face layout; its code is never run.

    Raises:
        ValueError: the directory has no tokenizer that transformers can read.
    """
    directory = Path(path)
    load = functools.partial(_load_hf, path)
    if not directory.is_dir():
        return Tokenizer(load())
    backend = _read_plain(directory)
    if backend is not None:
        return LazyTokenizer(backend, load, _plain_roles(directory))
    kept = cache_root() / "tokenizers" / _digest(directory)
    if kept.is_dir():
        roles = Roles(*json.loads((kept / _ROLES_FILE).read_text(encoding="utf-8")))
        return LazyTokenizer(tokenizers.Tokenizer.from_file(str(kept / _FILE)), load, roles)
    hf_tokenizer = load()
    if _is_all_in_backend(hf_tokenizer):

        def keep(part: Path) -> None:
            hf_tokenizer.backend_tokenizer.save(str(part / _FILE), pretty=False)
            roles = Roles(hf_tokenizer.special_tokens_map, hf_tokenizer.chat_template)
            (part / _ROLES_FILE).write_text(json.dumps(roles), encoding="utf-8")

        # Where nothing can be written, the next start is slow again.
        with contextlib.suppress(OSError):
            build_once(kept, keep)
    return Tokenizer(hf_tokenizer)


def _read_plain(directory: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of tokenizer.json, if transformers would add nothing to it; else None."""
    config = _config(directory)
    is_plain = (
        config.get("tokenizer_class") in _PLAIN_CLASSES
        and config.keys() <= _PLAIN_KEYS
        and not config.get("clean_up_tokenization_spaces")
        and not any((directory / name).exists() for name in (*_OLDER_FILES, _TEMPLATES))
    )
    if not is_plain:
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(directory / _FILE))
    # The library raises bare exceptions on files it cannot read; transformers shall name the error.
    except Exception:
        return None
    added = set(map(repr, backend.get_added_tokens_decoder().values()))
    roles = [value for key, value in config.items() if key.endswith("_token")]
    if all(isinstance(text, str) and repr(special_token(text)) in added for text in roles):
        return backend
    return None


def _plain_roles(directory: Path) -> Roles:
    """The roles of a plain tokenizer: a template's own file counts before its config."""
    config, file = _config(directory), directory / _TEMPLATE_FILE
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    roles = {name: text for name, text in config.items() if name.endswith("_token")}
    return Roles(roles, template)


def _load_hf(path: str | os.PathLike[str]) -> Any:
    # Else transformers advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Slow to import, and not needed with token ids.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer imports more of PyTorch, to find a class: seconds that a tokenizer which names
    # the plain one can do without.
    config = _config(Path(path))
    is_plain = config.get("tokenizer_class") in _PLAIN_CLASSES and "auto_map" not in config
    has_file = (Path(path) / _FILE).is_file()
    loader: Any = PreTrainedTokenizerFast if is_plain and has_file else AutoTokenizer
    try:
        return loader.from_pretrained(os.fspath(path), trust_remote_code=False)
    # The tokenizers library raises bare exceptions on files it cannot read.
    except Exception as error:
        name = os.fspath(path)
        where = "" if os.path.exists(name) else ": there is no such folder, and as a Hub name"
        raise ValueError(
            f"no tokenizer could be loaded from {name}{where}: {error}; "
            "pass tokenizer= a directory or a transformers tokenizer"
        ) from error


def _config(directory: Path) -> dict[str, Any]:
    """A directory's tokenizer_config.json; {} where there is none that can be read."""
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _is_all_in_backend(hf_tokenizer: Any) -> bool:
    """Whether the backend alone encodes and decodes as the whole does."""
    from transformers import PreTrainedTokenizerFast

    kind = type(hf_tokenizer)
    return (
        issubclass(kind, PreTrainedTokenizerFast)
        and all(
            getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None)
            for name in _DONE_BY_BACKEND
        )
        and not hf_tokenizer.clean_up_tokenization_spaces
        and not hf_tokenizer.split_special_tokens
    )


def _digest(directory: Path) -> str:
    """Names what a tokenizer depends on: all that is beside the weights, and who reads it."""
    parts = [(name, importlib.metadata.version(name)) for name in ("tokenizers", "transformers")]
    parts.append(("kept files", _ROLES_FILE))
    parts += [
        (path.name, file_digest(path))
        for path in sorted([*directory.iterdir(), *(directory / _TEMPLATES).glob("*.jinja")])
        if path.suffix not in _NO_TOKENIZER and path.is_file()
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
