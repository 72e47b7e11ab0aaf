"""Other engines on the same weights and the same prompts. Each gets its best: see the classes."""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_isolation import Contender
from bench_peers_common import check_workload
from bench_peers_files import KINDS, variant
from bench_peers_llama import LlamaCpp, is_llama_cpp_there
from bench_peers_torch import GenerateBatch, Transformers
from bench_workloads import Workload

from folojax.models.files.checkpoint import embedded_model, open_checkpoint

PEERS = ("transformers", "generate_batch", "llama.cpp")
"""Contenders of other engines have names that begin so."""

AS_IT_IS = "packaged"

FILES = (AS_IT_IS, *KINDS)
"""What llama.cpp may be given: the file itself, or its weights in another type."""

Peer = tuple[str, Callable[[], Contender]]


def is_transformers_there() -> bool:
    """Whether transformers can run models: it needs PyTorch."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def find_peers(
    names: Sequence[str],
    model: str | None,
    dtypes: Sequence[str],
    files: Sequence[str],
    most_rows: int,
    workload: Workload,
) -> Iterator[Peer]:
    """The peers that were asked for, by their names in the table.

    Args:
        names: Of PEERS; or "auto": those that are installed and can run this.
        model: As LLM takes it.
        dtypes: In which transformers computes.
        files: Of FILES.
        most_rows: Requests at once.
        workload: What they are to run.

    Raises:
        ValueError: llama.cpp is to run a model that is no GGUF file.
    """
    source = _gguf_file(model)
    wanted = set(names)
    if "auto" in wanted:
        wanted = set(_found(workload, has_gguf=source is not None))
    directory = open_checkpoint(model).directory
    for name, engine in (("transformers", Transformers), ("generate_batch", GenerateBatch)):
        if name in wanted:
            for dtype in dtypes:
                make = functools.partial(engine, directory, dtype, most_rows)
                yield f"{name} {dtype}", make
    if "llama.cpp" in wanted:
        if source is None:
            raise ValueError(f"llama.cpp reads GGUF files; the model is {model!r}")
        for kind in files:
            yield _llama_cpp(source, kind, most_rows)


def find_far_behind(throughputs: Mapping[str, float]) -> set[str]:
    """Peers with less than half of the best throughput of the same engine.

    One round says that they are not how this engine is best run.

    >>> find_far_behind({"llama.cpp BF16": 5.0, "llama.cpp Q4_0": 11.0, "transformers f32": 1.0})
    {'llama.cpp BF16'}
    """
    behind = set()
    for engine in PEERS:
        own = {name: value for name, value in throughputs.items() if name.startswith(engine)}
        behind |= {name for name, value in own.items() if 2 * value < max(own.values())}
    return behind


def _found(workload: Workload, has_gguf: bool) -> Iterator[str]:
    can_be_static, can_run = (_is_possible(workload, is_static) for is_static in (True, False))
    if is_transformers_there() and can_be_static:
        yield "transformers"
    if is_transformers_there() and can_run:
        yield "generate_batch"
    if is_llama_cpp_there() and can_run and has_gguf:
        yield "llama.cpp"


def _is_possible(workload: Workload, is_static: bool) -> bool:
    try:
        check_workload(workload, needs_all_at_once=is_static)
    except ValueError:
        return False
    return True


def _gguf_file(model: str | None) -> Path | None:
    path = embedded_model() if model is None else Path(model)
    return path if path.suffix == ".gguf" else None


def _llama_cpp(source: Path, kind: str, most_rows: int) -> Peer:
    # The packaged file says its own type: "SmolLM2-135M-Instruct.Q4_1.gguf".
    own = source.stem.rpartition(".")[2] if "." in source.stem else "as it is"
    name = f"llama.cpp {own if kind == AS_IT_IS else kind}"
    path = source if kind == AS_IT_IS else variant(source, kind)
    return name, functools.partial(LlamaCpp, name, path, most_rows)


# Rounding may turn a close call between two tokens, so agreement is a share. A peer that reads the
# weights, the prompt or the positions wrongly shares next to nothing, and its speed means nothing.
_TEXTS = (
    "The capital of France is",
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "Monday, Tuesday, Wednesday, Thursday,",
    "def add(a, b):\n    return",
    "Water boils at 100 degrees",
    "Once upon a time, there was a",
)

_NUM_TOKENS = 8

_LEAST_AGREEMENT = 0.25


def find_agreements(
    contenders: Mapping[str, Any], encode: Callable[[str], list[int]]
) -> dict[str, float]:
    """By contender, the share of tokens that are the first contender's, up to the first other one.

    Args:
        contenders: By name.
        encode: From text to token ids.

    Raises:
        RuntimeError: a contender's tokens are not those of the same model.
    """
    if not contenders:
        return {}
    prompts = [encode(text) for text in _TEXTS]
    tokens = {
        name: contender.greedy(prompts, _NUM_TOKENS) for name, contender in contenders.items()
    }
    first = next(iter(tokens.values()))
    shares = {name: agreement(first, theirs) for name, theirs in tokens.items()}
    for name, share in shares.items():
        if share < _LEAST_AGREEMENT:
            raise RuntimeError(
                f"{name} does not run the same model: of {_NUM_TOKENS} tokens after each of "
                f"{len(_TEXTS)} prompts it shares {share:.0%}; its first are {tokens[name][0]}, "
                f"not {first[0]}"
            )
    return shares


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Tokens before the first that differs, as a share of all."""
    common = 0
    for left, right in zip(ours, theirs, strict=True):
        is_same = [a == b for a, b in zip(left, right, strict=True)]
        common += (*is_same, False).index(False)
    return common / sum(map(len, ours))
