"""From a directory to a tokenizer: through transformers once, and without it ever after.

transformers reads several files, by rules of each model's own class, and imports PyTorch where it
is installed: seconds. What comes of it is nearly always one object of the tokenizers library, which
that library writes as a single file and reads in a tenth of a second. So the object is kept in the
cache, and transformers is loaded only when something needs it: chat templates, or the user.

    directory ──(first start)──> transformers ──> tokenizers.Tokenizer ──> cache
                (later)          <──(templates)── tokenizers.Tokenizer <── cache
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from folojax.models.artefacts import build_once, cache_root, file_digest
from folojax.models.local_files import PICKLE_SUFFIXES
from folojax.tokenizer import Tokenizer

_FILE = "tokenizer.json"
_NO_TOKENIZER = PICKLE_SUFFIXES | {".safetensors", ".gguf"}
"""Suffixes of files that are no part of a tokenizer."""

_DONE_BY_BACKEND = (
    "added_tokens_decoder",
    "encode",
    "_encode_plus",
    "decode",
    "_decode",
    "get_vocab",
)
"""What transformers' class leaves to its backend, unless a model's own class does otherwise."""


class Backend:
    """What a transformers tokenizer leaves to its backend, under the same names."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend_tokenizer = backend
        # As transformers does before it encodes: files may ask for either.
        backend.no_padding()
        backend.no_truncation()

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


class KeptTokenizer(Tokenizer):
    """A tokenizer that needs transformers only when somebody asks for `hf`."""

    def __init__(self, backend: tokenizers.Tokenizer, load: Callable[[], Any]) -> None:
        """`load` gives the transformers tokenizer that the backend was once part of."""
        super().__init__(Backend(backend))
        self._load: Callable[[], Any] | None = load

    @property
    def hf(self) -> Any:
        """The tokenizer of transformers, loaded when it is first asked for.

        From then on it encodes and decodes too, for whoever has it may change it.
        """
        if self._load is not None:
            self._source, self._load = self._load(), None
        return self._source


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer of a directory in the Hugging Face layout; its code is never run.

    Raises:
        ValueError: the directory has no tokenizer that transformers can read.
    """
    directory = Path(path)
    load = functools.partial(_load_hf, path)
    if not directory.is_dir():
        return Tokenizer(load())
    place = cache_root() / "tokenizers" / _digest(directory)
    if place.is_dir():
        return KeptTokenizer(tokenizers.Tokenizer.from_file(str(place / _FILE)), load)
    hf_tokenizer = load()
    if _is_all_in_backend(hf_tokenizer):
        # Where nothing can be written, the next start is slow again.
        with contextlib.suppress(OSError):
            build_once(
                place, lambda part: hf_tokenizer.backend_tokenizer.save(str(part / _FILE), False)
            )
    return Tokenizer(hf_tokenizer)


def _load_hf(path: str | os.PathLike[str]) -> Any:
    # Else transformers advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Slow to import, and not needed with token ids.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer imports more of PyTorch, to find a class: seconds that a tokenizer which names
    # the plain one can do without.
    loader: Any = PreTrainedTokenizerFast if _is_plain(path) else AutoTokenizer
    try:
        return loader.from_pretrained(os.fspath(path), trust_remote_code=False)
    # The tokenizers library raises bare exceptions on files it cannot read.
    except Exception as error:
        raise ValueError(
            f"no tokenizer could be loaded from {os.fspath(path)}: {error}; "
            "pass tokenizer= a directory or a transformers tokenizer"
        ) from error


def _is_plain(path: str | os.PathLike[str]) -> bool:
    """Whether a directory's tokenizer is all in its tokenizer.json, by its own account."""
    try:
        config = json.loads((Path(path) / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(config, dict)
        and config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
        and "auto_map" not in config
        and (Path(path) / _FILE).is_file()
    )


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
    parts += [
        (path.name, file_digest(path))
        for path in sorted(directory.iterdir())
        if path.suffix not in _NO_TOKENIZER and path.is_file()
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
