"""The tensors of a model directory, one file or many shards, read one at a time."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from folojax.models.files.local_files import REFUSED_PICKLE, pickle_files, read_json, resolve_inside

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


# float8 and packed types exist too, but then scales lie beside them that nobody would apply.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""What can be read, by safetensors' name."""

_BLOCK_BYTES = 2**24


class _Place(NamedTuple):
    """Where a tensor's bytes are."""

    path: Path
    start: int
    end: int
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """Checked safetensors files as one mapping from tensor name to array."""

    def __init__(self, places: Mapping[str, _Place]):
        """`places` has every tensor."""
        self._places = places

    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors spells it ("F32", "BF16"), from the file's header."""
        return self._places[name].dtype

    def read_into(self, name: str, target: np.ndarray) -> None:
        """Copies one tensor, of a dtype in `DTYPES`, to where it is wanted.

        Block by block, converted on the way, so little more than `target` is in memory. Not from
        a memory map, whose pages would count as this process's own.

        Args:
            name: The tensor.
            target: Of its shape and any float dtype; may be a view, such as a transposed one.

        Raises:
            ValueError: the file cannot be read; it is named.
        """
        place = self._places[name]
        dtype = DTYPES[place.dtype]
        row_bytes = dtype.itemsize * math.prod(place.shape[1:])
        num_rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
        try:
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.start)
                for first in range(0, place.shape[0], num_rows):
                    rows = target[first : first + num_rows]
                    if rows.dtype == dtype and rows.flags.c_contiguous:
                        _fill(file, rows)
                        continue
                    block = np.empty(rows.shape, dtype)
                    _fill(file, block)
                    # float16 of what is too large is infinite, as everywhere.
                    with np.errstate(over="ignore"):
                        rows[...] = block
        except OSError as error:
            raise ValueError(f"{place.path}: tensor {name!r} cannot be read: {error}") from error

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of a tensor, block by block, whatever its dtype.

        Raises:
            ValueError: the file cannot be read; it is named.
        """
        place = self._places[name]
        try:
            with place.path.open("rb", buffering=0) as file:
                for start in range(place.start, place.end, _BLOCK_BYTES):
                    file.seek(start)
                    block = np.empty(min(_BLOCK_BYTES, place.end - start), np.uint8)
                    _fill(file, block)
                    yield block
        except OSError as error:
            raise ValueError(f"{place.path}: tensor {name!r} cannot be read: {error}") from error


def open_tensors(directory: Path) -> TensorFiles:
    """Checks model.safetensors, or else every shard of model.safetensors.index.json.

    Raises:
        FileNotFoundError: there are no weights, or the index names files that are absent (all are
            listed).
        ValueError: a file is truncated or malformed, the index is malformed or leaves the
            directory, a tensor is in two shards, or the only weights are pickles.
    """
    places: dict[str, _Place] = {}
    for path in _weight_files(directory):
        for name, place in _read_header(path).items():
            if name in places:
                raise ValueError(f"tensor {name!r} is in {places[name].path} and in {path}")
            places[name] = place
    return TensorFiles(places)


def _read_header(path: Path) -> dict[str, _Place]:
    """Where the tensors of one file are.

    The library has checked by then that all lie inside the file, side by side and without gaps.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    return {
        name: _Place(
            path=path,
            start=8 + header_size + entry["data_offsets"][0],
            end=8 + header_size + entry["data_offsets"][1],
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
        )
        for name, entry in header.items()
    }


def _fill(file: io.FileIO, block: np.ndarray) -> None:
    """Reads as many bytes as the array has."""
    rest = block.view(np.uint8).reshape(-1).data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise OSError("the file has become shorter")
        rest = rest[count:]


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
