"""Writing tensors one after the other, as one safetensors file or as shards with an index."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from folojax.models.files.safetensors_files import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 2**30


class ShardWriter:
    """Collects tensors up to a shard's size, then writes them into an existing directory.

    No more than a shard is in memory. The files have their names after `close`.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES):
        self._directory, self._shard_bytes = directory, shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes one tensor; not to be changed afterwards."""
        held = sum(one.nbytes for one in self._pending.values())
        if self._pending and held + array.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = np.ascontiguousarray(array)
        self._total_bytes += array.nbytes

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
