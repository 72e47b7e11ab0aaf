"""GGUF files, of which one model may have several."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
"""How llama-gguf-split names the parts of a model."""


def parts_of(path: Path) -> list[Path]:
    """All files of the model that a file is or is a part of, in their order.

    Raises:
        ValueError: some are not beside it, or its number is none of theirs.
    """
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    prefix, _, count = found.groups()
    numbers = range(1, int(count) + 1)
    parts = [path.with_name(f"{prefix}-{number:05}-of-{count}.gguf") for number in numbers]
    if path not in parts:
        raise ValueError(f"{path} is none of {len(parts)} parts: name it as llama-gguf-split does")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ValueError(
            f"{path} is one of {len(parts)} parts, and beside it there is no {missing[0]}"
            + (f", nor {len(missing) - 1} others" if len(missing) > 1 else "")
            + ": put all parts into one folder"
        )
    return parts


def read_parts(parts: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the first one says, and the tensors of all by name, which are read when they are used.

    Raises:
        ValueError: one is malformed or no GGUF file, or they are not all parts of one model.
    """
    # Here, because a conversion that is in the cache already has no use for it.
    import gguf

    stated: list[dict[str, Any]] = []
    tensors: dict[str, Any] = {}
    for path in parts:
        try:
            reader = gguf.GGUFReader(path)
            stated.append({name: field.contents() for name, field in reader.fields.items()})
        # The reader has no errors of its own: a truncated file ends in whatever NumPy says.
        except (ValueError, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is truncated or no GGUF file: {error}") from error
        again = sorted(tensors.keys() & {tensor.name for tensor in reader.tensors})
        if again:
            raise ValueError(f"{path} has {again[0]}, which a part before it has too")
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    for place, (path, metadata) in enumerate(zip(parts, stated, strict=True)):
        count, number = (metadata.get(f"split.{key}") for key in ("count", "no"))
        if (count or 1) != len(parts) or (number or 0) != place:
            raise ValueError(
                f"{path}: it says that it is part {number} of {count}, counted from 0, and is "
                f"{place} of {len(parts)}: name parts as llama-gguf-split does, or join them with "
                "llama-gguf-split --merge"
            )
    wanted = stated[0].get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise ValueError(f"{parts[0]} and its parts have {len(tensors)} tensors of {wanted}")
    return stated[0], tensors
