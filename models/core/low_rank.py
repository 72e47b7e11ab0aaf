"""Adapters as values: the low-rank updates of a model's kernels, checked against the model."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from folojax.models.core.adapted import ADAPTED, Stack, part_widths
from folojax.models.core.config import ModelConfig
from folojax.models.core.param_tree import listed, plain_tree

_ANY_RANK = 2**30


class LowRank(NamedTuple):
    """The update of one of the linear layers that a kernel joins: `scale * b @ a`."""

    a: Any  # [r, I], of NumPy or JAX
    b: Any  # [o, r]
    scale: float


Adapter: TypeAlias = Mapping[str, Mapping[str, tuple[LowRank | None, ...]]]
"""By layer and kernel, what is added to each of its parts; what has no update is left out."""


def kernel_shapes(params: Any) -> dict[str, dict[str, tuple[int, int]]]:
    """By layer and name, the sides [O, I] of the kernels that may have updates."""
    return {
        layer: {name: tuple(block[name].shape[-2:]) for name in sorted(ADAPTED & block.keys())}
        for layer, block in params.items()
        if isinstance(block, Mapping)
    }


def split_outputs(name: str, config: ModelConfig, pair: LowRank) -> tuple[LowRank, ...]:
    """The update of a whole kernel as those of its parts, which then have the same `a`."""
    borders = np.cumsum(part_widths(name, config, pair.b.shape[0]))[:-1].tolist()
    starts = [0, *borders, pair.b.shape[0]]
    return tuple(pair._replace(b=pair.b[start:end]) for start, end in itertools.pairwise(starts))


def adapter_of_tree(
    tree: Any, params: Any, config: ModelConfig, max_rank: int, scale: float = 1.0
) -> Adapter:
    """An adapter of a tree as `folojax.init_lora` makes it; copies no array.

    Args:
        tree: ``{"layers_0": {"qkv": {"a": [r, I], "b": [O, r]}}}``, as far as it has anything.
        params: Of the model.
        config: Likewise.
        max_rank: Of r.
        scale: Of all updates; often alpha / r.

    Raises:
        ValueError: the tree names what the model lacks, or shapes do not fit; all are named.
    """
    kernels, problems = kernel_shapes(params), list[str]()
    tree, found = plain_tree(tree), dict[str, dict[str, tuple[LowRank, ...]]]()
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number):
        problems.append(f"scale is {scale!r}; it must be a number")
    elif not np.isfinite(scale):
        problems.append(f"scale is {scale!r}; it must be finite")
    if not isinstance(tree, Mapping) or not tree:
        raise ValueError(f"the adapter is {_told(tree)}; it must be a dict as init_lora makes it")
    for layer, block in tree.items():
        if layer not in kernels or not isinstance(block, Mapping):
            told = "is no dict of kernels" if layer in kernels else "is no layer of the model"
            problems.append(f"{layer} {told}")
            continue
        found[layer] = {}
        for name, pair in block.items():
            where = f"{layer}/{name}"
            if name not in kernels[layer]:
                has = ", ".join(kernels[layer])
                problems.append(f"{where} has no updates here; {layer} has {has}")
                continue
            given = _pair_problems(where, pair, kernels[layer][name], max_rank)
            problems += given
            if not given:
                whole = LowRank(pair["a"], pair["b"], float(scale))
                found[layer][name] = split_outputs(name, config, whole)
    if problems:
        raise ValueError("the adapter does not fit the model: " + listed(problems))
    return found


def stacks_of_tree(tree: Any, params: Any, config: ModelConfig, scale: float) -> dict[str, Any]:
    """An adapter as stacks of one slot, whose arrays come from it by traceable operations.

    Arguments and errors are those of `adapter_of_tree`.
    """
    adapter_of_tree(tree, params, config, _ANY_RANK, scale)

    def stack(pair: Any) -> Stack:
        return Stack(pair["a"][None, None], ((scale * pair["b"]).T[None],))

    return {
        layer: {name: stack(pair) for name, pair in block.items()}
        for layer, block in plain_tree(tree).items()
    }


def rank_problems(where: str, rank: int, max_rank: int) -> list[str]:
    """Why an update of this rank is refused, if it is."""
    if 1 <= rank <= max_rank:
        return []
    return [f"{where} has rank {rank}; it must be from 1 to max_lora_rank, {max_rank}"]


def _pair_problems(where: str, pair: Any, sides: tuple[int, int], max_rank: int) -> list[str]:
    if not isinstance(pair, Mapping) or set(pair) != {"a", "b"}:
        return [f'{where} is no pair {{"a": ..., "b": ...}}']
    shapes = [tuple(getattr(one, "shape", ())) for one in (pair["a"], pair["b"])]
    (a, b), (width_out, width_in) = shapes, sides
    if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != (width_out, width_in) or a[0] != b[1]:
        return [
            f"{where} has a {list(a)} and b {list(b)}, the kernel is {[width_out, width_in]}: a "
            f"must be [r, {width_in}] and b [{width_out}, r]"
        ]
    kinds = [np.dtype(one.dtype).kind for one in (pair["a"], pair["b"])]
    if not set(kinds) <= {"f", "V"}:  # bfloat16 is of NumPy's kind V
        return [f"{where} has dtypes {pair['a'].dtype} and {pair['b'].dtype}; floats are needed"]
    return rank_problems(where, a[0], max_rank)


def _told(tree: Any) -> str:
    return "empty" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
