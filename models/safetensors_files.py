"""The tensors of a model directory, one file or many shards, read one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from folojax.models.local_files import REFUSED_PICKLE, pickle_files, read_json, resolve_inside

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class TensorFiles:
    """Open safetensors files as one mapping from tensor name to array."""

    def __init__(self, handles: Mapping[str, tuple[Path, Any]]):
        """`handles` gives each tensor's name the path and the open file it lies in."""
        self._handles = handles

    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._handles[name][1].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors spells it ("F32", "BF16"), from the file's header."""
        return self._handles[name][1].get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """One tensor as a NumPy array; bfloat16 comes as ml_dtypes' type.

        Raises:
            ValueError: the file cannot be read; it is named.
        """
        path, handle = self._handles[name]
        try:
            return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: tensor {name!r} cannot be read: {error}") from error


@contextlib.contextmanager
def open_tensors(directory: Path) -> Iterator[TensorFiles]:
    """Opens model.safetensors, or else every shard of model.safetensors.index.json.

    Raises:
        FileNotFoundError: there are no weights, or the index names files that are absent (all are
            listed).
        ValueError: a file is truncated or malformed, the index is malformed or leaves the
            directory, a tensor is in two shards, or the only weights are pickles.
    """
    with contextlib.ExitStack() as stack:
        handles: dict[str, tuple[Path, Any]] = {}
        for path in _weight_files(directory):
            try:
                # NumPy and not Flax: joining and transposing happen before anything reaches a
                # device.
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
            for name in handle.keys():  # noqa: SIM118 - not a mapping, keys() is all it has
                if name in handles:
                    raise ValueError(f"tensor {name!r} is in {handles[name][0]} and in {path}")
                handles[name] = (path, handle)
        yield TensorFiles(handles)


def _weight_files(directory: Path) -> list[Path]:
    """Paths of the files that hold the weights, each checked to lie inside the directory."""
    single = resolve_inside(directory, SINGLE_FILE)
    if single.is_file():
        return [single]
    if not resolve_inside(directory, INDEX_FILE).is_file():
        pickles = pickle_files(directory)
        if pickles:
            raise ValueError(f"{directory} has only {', '.join(pickles)}: {REFUSED_PICKLE}")
        raise FileNotFoundError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    shards = _index_shards(directory)
    paths = {shard: resolve_inside(directory, shard) for shard in shards}
    absent = [shard for shard, path in paths.items() if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{directory / INDEX_FILE} names absent files: {', '.join(absent)}")
    return list(paths.values())


def _index_shards(directory: Path) -> list[str]:
    """The shard names of the index, sorted."""
    weight_map = read_json(directory, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{directory / INDEX_FILE} has no weight_map of tensor name to file name")
    shards = {shard for shard in weight_map.values() if isinstance(shard, str)}
    bad = sorted(
        name
        for name, shard in weight_map.items()
        if not isinstance(shard, str) or not shard.endswith(".safetensors")
    )
    if bad:
        raise ValueError(
            f"{directory / INDEX_FILE} puts tensors in files that are not .safetensors: "
            + ", ".join(f"{name} in {weight_map[name]!r}" for name in bad)
        )
    return sorted(shards)
