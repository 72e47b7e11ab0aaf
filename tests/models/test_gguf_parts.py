"""GGUF files of one model in several."""

from pathlib import Path

import chex
import pytest

from folojax.models.files.checkpoint import load_params, open_checkpoint
from tests import gguf_writer
from tests.models.test_gguf_families import contents, llama_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory of every test's own."""
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path / "cache"))


def split(path: Path, count: int) -> list[Path]:
    """The same in parts, of which the first has no tensors, as llama-gguf-split makes them."""
    metadata, tensors = contents(path)
    names = list(tensors)
    paths = [path.with_name(f"{path.stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for place, part in enumerate(paths):
        said = {"split.no": place, "split.count": count, "split.tensors.count": len(names)}
        held = {name: tensors[name] for name in names[place - 1 :: count - 1] if place}
        gguf_writer.write(part, "llama", said | ({} if place else metadata), held)
    return paths


def test_a_model_in_parts_is_read_of_any_of_them(tmp_path: Path) -> None:
    whole = llama_file(tmp_path / "tiny.gguf", {})
    paths = split(whole, 3)
    opened = [open_checkpoint(path) for path in (paths[0], paths[2])]
    assert opened[0].directory == opened[1].directory
    plain = open_checkpoint(whole)
    assert opened[0].config == plain.config
    chex.assert_trees_all_equal(load_params(opened[0]), load_params(plain))


def test_parts_that_are_missing_or_mistaken_are_told(tmp_path: Path) -> None:
    whole = llama_file(tmp_path / "tiny.gguf", {})
    paths = split(whole, 4)
    third = paths[2].read_bytes()
    paths[2].unlink()
    with pytest.raises(ValueError, match="one of 4 parts, and beside it there is no tiny-00003-of"):
        open_checkpoint(paths[0])
    paths[2].write_bytes(paths[3].read_bytes())
    with pytest.raises(ValueError, match=r"tiny-00004.* has .*, which a part before it has too"):
        open_checkpoint(paths[0])
    paths[2].write_bytes(third)
    gguf_writer.write(paths[3], "llama", {"split.no": 3, "split.count": 4}, {})
    with pytest.raises(ValueError, match="and its parts have 8 tensors of 11"):
        open_checkpoint(paths[1])
    (tmp_path / "tiny-00005-of-00004.gguf").write_bytes(third)
    with pytest.raises(ValueError, match=r"00005-of-00004.gguf is none of 4 parts: name it as"):
        open_checkpoint(tmp_path / "tiny-00005-of-00004.gguf")
    paths[1].rename(tmp_path / "other.gguf")
    with pytest.raises(
        ValueError, match=r"it says that it is part 1 of 4, .* is 0 of 1: name parts"
    ):
        open_checkpoint(tmp_path / "other.gguf")
