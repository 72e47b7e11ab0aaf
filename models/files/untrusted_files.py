"""Reading a model directory that came from somewhere else: nothing outside it is ever opened."""

import json
from pathlib import Path
from typing import Any

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})

# The index of the largest models has a few megabytes.
_MOST_JSON_BYTES = 2**26

REFUSED_PICKLE = (
    "pickled weights can run code when they are opened and are never read: "
    "get the safetensors version of the model, or convert it with "
    "transformers' save_pretrained(), which writes safetensors"
)


def resolve_inside(directory: Path, name: str) -> Path:
    """The path of a file that a checkpoint names, relative to its directory; it may not exist.

    Links are followed; they may lead to the directory itself, or, inside a cache of
    huggingface_hub, from snapshots/<revision> to the model's blobs.

    Raises:
        ValueError: the name is absolute or has `..`, or the link leaves the directory.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise ValueError(
            f"{directory} names the file {name!r}: only files inside the directory are read"
        )
    root = directory.resolve()
    path = (root / name).resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    if not any(path.is_relative_to(base) for base in allowed):
        raise ValueError(f"{directory / name} is a link that leaves the directory (to {path})")
    return path


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Reads a JSON object of a model directory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't UTF-8, isn't JSON, isn't an object, or is far too large.
    """
    path = resolve_inside(directory, name)
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no {name}")
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise ValueError(f"{directory / name} is larger than {_MOST_JSON_BYTES:,} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # RecursionError: thousands of nested brackets.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{directory / name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{directory / name} holds a {type(content).__name__}, not an object")
    return content


def pickle_files(directory: Path) -> list[str]:
    """Names of the weight files in the directory that are pickles."""
    return sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
