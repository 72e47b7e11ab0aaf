"""The one-way direction of the house, read from the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The house: each room, and the rooms that it may import. Lowest first, arrows go down only.
# `config` and `llm` are the user's door, beside others under vLLM's names: modules of their own.
ROOMS: dict[str, set[str]] = {
    "sched": set(),
    "models/machine": set(),
    "models/quantized": {"models/machine"},
    "models/core": {"models/quantized", "models/machine"},
    "models/families": {"models/core"},
    "models/files": {"models/core", "models/families", "models/machine", "models/quantized"},
    "kv": {"models/core"},
    "attention": {"kv", "models/core", "models/machine"},
    "sampling": set(),
    "compile": {"sampling", "sched"},
    "steps": {"attention", "compile", "kv", "models/core", "models/machine", "sampling"},
    "backend": {
        *("compile", "kv", "sched", "steps"),
        *("models/core", "models/machine", "models/quantized"),
    },
    "text": {"models/files", "models/machine"},
    "requests": {"sampling", "sched", "steps", "text"},
    "sampling_params": {"requests"},
    "outputs": {"requests"},
    "inputs": {"requests"},
    "config": {"backend", "models/quantized", "requests", "sched"},
    "runner": {
        *("backend", "compile", "kv", "requests", "sampling", "sched", "steps"),
        *("models/core", "models/machine", "models/quantized"),
    },
    "engine": {
        *("attention", "backend", "compile", "config", "kv", "requests", "runner", "sched", "text"),
        *("models/core", "models/files", "models/quantized"),
    },
    "llm": {
        *("backend", "compile", "config", "engine", "requests", "runner", "sampling", "steps"),
        *("models/core", "models/files"),
    },
    "llm_engine": {"llm"},
    "train": {"llm", "models/core", "models/quantized", "requests"},
    "jsonl": {"llm", "requests"},
    "adapters": {"jsonl", "llm", "requests"},
    "cli": {"config", "jsonl", "llm", "requests"},
}


def package_files() -> list[Path]:
    """Every Python file of the package, models and scheduler included, once."""
    folders = [ROOT / "folojax", ROOT / "models", ROOT / "sched"]
    found = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    links = (ROOT / "folojax" / "models", ROOT / "folojax" / "sched")
    return [path for path in found if not any(path.is_relative_to(link) for link in links)]


def room_of(name: str) -> str | None:
    """The room of a dotted name; None for the package itself."""
    parts = name.split(".")[1:]
    if parts[:1] == ["models"]:
        return "/".join(parts[:2])
    return parts[0] if parts and parts[0] in ROOMS else None


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "folojax" else ("folojax", *parts))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] in ("folojax", "models", "sched")}


def test_every_file_lies_in_a_room() -> None:
    doors = {"folojax"}  # folojax/__init__.py: the public names
    lost = [path for path in package_files() if room_of(module_of(path)) not in ROOMS]
    assert [module_of(path) for path in lost if path.name != "__init__.py"] == []
    assert {module_of(path.parent) for path in lost} == doors


def test_rooms_import_downward_only() -> None:
    floors = list(ROOMS)
    for number, below in enumerate(ROOMS.values()):
        assert below <= set(floors[:number]), floors[number]
    for path in package_files():
        room = room_of(module_of(path))
        if room is None:
            continue
        for name in sorted(ours(path)):
            other = room_of(name)
            assert other in (None, room, *ROOMS[room]), f"{path} of {room} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "sched").glob("*.py")), ids=lambda p: p.stem)
def test_sched_is_plain_python(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"jax", "jaxlib", "flax", "numpy", "torch", "time"}


def test_adapters_are_imported_by_nobody_and_keep_to_their_package() -> None:
    """So that folojax needs none of the packages that they are for."""
    theirs = {"lm_eval": {"lm_eval"}, "ray_data": set(), "tunix": set()}
    files = {path.stem: path for path in (ROOT / "folojax" / "adapters").glob("*.py")}
    assert set(files) == {"__init__", *theirs}
    for stem, packages in theirs.items():
        roots = {name.split(".")[0] for name in imports(files[stem])}
        assert roots & {"lm_eval", "ray", "tunix", "google"} == packages
        assert all(not name.startswith("folojax.adapters") for name in ours(files[stem]))
    for path in [*package_files(), *(ROOT / "scripts").rglob("*.py")]:
        if path.parent.name != "adapters":
            assert all(not name.startswith("folojax.adapters") for name in ours(path)), path


def test_torch_is_never_imported_at_run_time() -> None:
    for path in [*package_files(), *(ROOT / "scripts").rglob("*.py")]:
        if path.stem.startswith(("gpu_peer", "bench_peers")):  # they measure what runs on torch
            continue
        assert "torch" not in {name.split(".")[0] for name in imports(path)}, path


def test_the_folders_of_the_card_are_linked_into_the_package() -> None:
    for name in ("models", "sched"):
        link = ROOT / "folojax" / name
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert not (ROOT / name / "__init__.py").exists()


def test_files_are_one_idea_long() -> None:
    long = [
        (path, lines)
        for path in [
            *package_files(),
            *(ROOT / "scripts").rglob("*.py"),
            *(ROOT / "tests").rglob("*.py"),
        ]
        if (lines := len(path.read_text().splitlines())) > 400 and "test_" not in path.name
    ]
    assert not long
