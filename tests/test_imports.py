"""The one-way direction of the house, read from the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PACKAGES = ("attention", "backend", "kv")
FOLDERS = ("folojax", *(f"folojax/{name}" for name in PACKAGES), "models", "sched")

# Each module or package of the data path may import those before it, and nothing that comes later.
PATH = (
    (
        "kv",
        "logit_edits",
        "draws",
        "processors",
        "record",
        "packing",
        "state",
        "sampling",
        "attention",
        "residual",
        "programs",
        "step_rows",
        "step",
        "whole",
        "layered",
        "rowwise",
    ),
    ("likelihood",),
    ("plain", "sampling_params", "user_functions", "row_params"),
    ("shapes", "swap_cost", "memory_plan", "backend"),
    ("config",),
    ("memory_areas",),
    ("compile_plan",),
    ("batch", "taps", "results", "host_store", "processor_states", "sampler_calls", "runner"),
    ("deterministic", "ahead"),
    ("step_memory",),
    (
        "fair_lock",
        "time_limit",
        "chat_content",
        "tokenizer",
        "tokenizer_files",
        "prompt_end",
        "detokenizer",
    ),
    ("outputs", "prompts", "continuations", "snapshot"),
    ("arrays",),
    ("validation", "job", "score_job", "weights", "engine_metrics"),
    ("reports",),
    ("engine",),
    ("compilation_cache", "build", "calls", "branching"),
    ("request_loop",),
    ("lora",),
    ("llm",),
    ("rollout",),
    ("jsonl",),
    ("jsonl_output",),
    ("jsonl_job",),
)


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


@pytest.mark.parametrize("path", sorted((ROOT / "sched").glob("*.py")), ids=lambda p: p.stem)
def test_sched_is_plain_python(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"jax", "jaxlib", "flax", "numpy", "torch", "time"}
    assert all(name.startswith("folojax.sched") for name in ours(path))


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.py")), ids=lambda p: p.stem)
def test_models_do_not_know_the_engine(path: Path) -> None:
    assert all(name.startswith("folojax.models") for name in ours(path))


def test_the_engine_imports_one_way() -> None:
    order = {name: rank for rank, names in enumerate(PATH) for name in names}
    folder = ROOT / "folojax"
    files = [(path.stem, path) for path in folder.glob("*.py") if path.stem != "__init__"]
    files += [(name, path) for name in PACKAGES for path in (folder / name).glob("*.py")]
    assert {stem for stem, _ in files} == set(order), "a new module needs its place in PATH"
    for stem, path in files:
        for name in ours(path):
            other = name.split(".")[1] if "." in name else ""
            if other in order:
                assert order[other] <= order[stem], f"{path} imports {other}"


def test_adapters_are_imported_by_nobody_and_keep_to_their_package() -> None:
    """So that folojax needs none of the packages that they are for."""
    theirs = {"lm_eval": {"lm_eval"}, "ray_data": set(), "tunix": set()}
    files = {path.stem: path for path in (ROOT / "folojax" / "adapters").glob("*.py")}
    assert set(files) == {"__init__", *theirs}
    for stem, packages in theirs.items():
        roots = {name.split(".")[0] for name in imports(files[stem])}
        assert roots & {"lm_eval", "ray", "tunix", "google"} == packages
        assert all(not name.startswith("folojax.adapters") for name in ours(files[stem]))
    for folder in (*FOLDERS, "scripts"):
        for path in (ROOT / folder).glob("*.py"):
            assert all(not name.startswith("folojax.adapters") for name in ours(path)), path


def test_torch_is_never_imported_at_run_time() -> None:
    for folder in (*FOLDERS, "folojax/adapters", "scripts"):
        for path in (ROOT / folder).glob("*.py"):
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
        for folder in (*FOLDERS, "folojax/adapters", "scripts", "tests")
        for path in (ROOT / folder).glob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400 and "test_" not in path.name
    ]
    assert not long
