"""The tensors of a model directory, one file or many shards, read and written one at a time.

The safetensors library checks and writes the files. It does not read them here: that takes four
times as long, as it copies every tensor twice, and what it maps counts as this process's memory.
"""

import io
import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from folojax.models.files.untrusted_files import (
    REFUSED_PICKLE,
    pickle_files,
    read_json,
    resolve_inside,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""What parameters are read from, by safetensors' name."""

_PACKED_DTYPES = {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""What quantised kernels are made of besides: scales lie beside them, without which they are
nothing."""

_BLOCK_BYTES = 2**24
SHARD_BYTES = 2**30


class StoredTensor(NamedTuple):
    """A tensor in a checked file, as the file's header says."""

    name: str
    path: Path
    start: int  # of its bytes in the file
    shape: tuple[int, ...]
    dtype: str  # by safetensors' name, perhaps none of DTYPES

    def read_into(self, target: np.ndarray) -> None:
        """Copies it to where it is wanted.

        Block by block, converted on the way, so little more than `target` is in memory.

        Args:
            target: Of its shape and of its or any float dtype; may be a view, such as a transposed
                one.

        Raises:
            ValueError: the file cannot be read; it is named.
        """
        if not self.shape:
            self._replace(shape=(1,)).read_into(target[None])
            return
        dtype = (DTYPES | _PACKED_DTYPES)[self.dtype]
        row_bytes = dtype.itemsize * math.prod(self.shape[1:])
        num_rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                for first in range(0, self.shape[0], num_rows):
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
            raise ValueError(
                f"{self.path}: tensor {self.name!r} cannot be read: {error}"
            ) from error

    def cut(self, name: str, place: int, shape: tuple[int, ...]) -> "StoredTensor":
        """One of the parts of that shape that lie in it one behind the other."""
        dtype = (DTYPES | _PACKED_DTYPES).get(self.dtype)
        size = 0 if dtype is None else dtype.itemsize * math.prod(shape)
        return self._replace(name=name, start=self.start + place * size, shape=shape)

    def read(self) -> np.ndarray:
        """The whole of it, as it is stored; it may be a scalar."""
        flat = self._replace(shape=(math.prod(self.shape),))
        array = np.empty(flat.shape, (DTYPES | _PACKED_DTYPES)[self.dtype])
        flat.read_into(array)
        return array.reshape(self.shape)


class HeldTensor:
    """A tensor that is in memory already, as `StoredTensor` is one in a file."""

    def __init__(self, name: str, array: Any) -> None:
        """Takes an array of any library, or what NumPy makes one of.

        Raises:
            ValueError: NumPy has no such array; the tensor is named.
        """
        self.name = name
        try:
            self._array = np.asarray(array)
        except (TypeError, ValueError, RuntimeError) as error:  # PyTorch's, of bfloat16 or a GPU
            raise ValueError(
                f"tensor {name!r} is no array to NumPy ({error}): give it as float32 on the host"
            ) from error
        self.shape = self._array.shape
        names = {dtype: one for one, dtype in DTYPES.items()}
        self.dtype = names.get(self._array.dtype, str(self._array.dtype))

    def cut(self, name: str, place: int, shape: tuple[int, ...]) -> "HeldTensor":
        """As `StoredTensor.cut`."""
        return HeldTensor(name, self._array.reshape(-1, *shape)[place])

    def read_into(self, target: np.ndarray) -> None:
        """Copies it to where it is wanted, converted as `StoredTensor.read_into` does."""
        with np.errstate(over="ignore"):
            target[...] = self._array


@runtime_checkable
class Tensor(Protocol):
    """What parameters are read from."""

    @property
    def name(self) -> str:
        """Hugging Face's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the checkpoint has it."""

    @property
    def dtype(self) -> str:
        """By safetensors' name."""

    def read_into(self, target: np.ndarray) -> None:
        """Copies it to where it is wanted, converted; see `StoredTensor.read_into`."""


def _fill(file: io.FileIO, block: np.ndarray) -> None:
    """Reads as many bytes as the array has."""
    rest = block.view(np.uint8).reshape(-1).data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise OSError("the file has become shorter")
        rest = rest[count:]


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor by name: of model.safetensors, or else the shards of its index; all checked.

    Raises:
        FileNotFoundError: there are no weights, or the index names files that are absent (all are
            listed).
        ValueError: a file is truncated or malformed, the index is malformed or leaves the
            directory, a tensor is in two shards, or the only weights are pickles.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(directory):
        for tensor in read_header(path):
            name = tensor.name
            if name in tensors:
                raise ValueError(f"tensor {name!r} is in {tensors[name].path} and in {path}")
            tensors[name] = tensor
    return tensors


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file; that they fill it without gaps the library has checked by then."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    return [
        StoredTensor(
            name,
            path,
            8 + header_size + entry["data_offsets"][0],
            tuple(entry["shape"]),
            entry["dtype"],
        )
        for name, entry in header.items()
    ]


def _weight_files(directory: Path) -> list[Path]:
    """Paths of the files that hold the weights, each checked to lie inside the directory."""
    single = resolve_inside(directory, SINGLE_FILE)
    if single.is_file():
        return [single]
    index = directory / INDEX_FILE
    if not resolve_inside(directory, INDEX_FILE).is_file():
        pickles = pickle_files(directory)
        if pickles:
            raise ValueError(f"{directory} has only {', '.join(pickles)}: {REFUSED_PICKLE}")
        raise FileNotFoundError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json(directory, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map of tensor name to file name")
    bad = [
        f"{name} in {shard!r}"
        for name, shard in sorted(weight_map.items())
        if not isinstance(shard, str) or not shard.endswith(".safetensors")
    ]
    if bad:
        raise ValueError(
            f"{index} puts tensors in files that are not .safetensors: {', '.join(bad)}"
        )
    paths = {shard: resolve_inside(directory, shard) for shard in sorted(set(weight_map.values()))}
    absent = [shard for shard, path in paths.items() if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names absent files: {', '.join(absent)}")
    return list(paths.values())


class ShardWriter:
    """Collects tensors up to a shard's size, then writes them into an existing directory.

    No more than a shard is in memory. The files have their names after `close`.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES):
        self._directory, self._shard_bytes = directory, shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self.shapes: dict[str, tuple[int, ...]] = {}  # of all that was added
        self.float8: set[str] = set()  # of these, what is in it

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes one tensor; not to be changed afterwards."""
        held = sum(one.nbytes for one in self._pending.values())
        if self._pending and held + array.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = np.asarray(array, order="C")  # a scalar stays one
        self._total_bytes += array.nbytes
        self.shapes[name] = array.shape
        if array.dtype == _PACKED_DTYPES["F8_E4M3"]:
            self.float8.add(name)

    def close(self) -> None:
        """Writes what is left, and the index if there are several files."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._directory / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file_name = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._part(number).rename(self._directory / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        # transformers reads the metadata; "pt" is what its own files say.
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending = {}

    def _part(self, number: int) -> Path:
        return self._directory / f".part-{number:05}.safetensors"
