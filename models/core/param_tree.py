"""Parameter trees, nested dicts of arrays: told from others by names, shapes and dtypes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from folojax.models.quantized.quantize import is_quantized

_MOST_PROBLEMS = 50


def plain_tree(params: Any) -> Any:
    """Dicts in place of FrozenDicts and the like, without Flax's {"params": ...} around them."""
    tree = _plain(params)
    is_wrapped = isinstance(tree, dict) and tree.keys() == {"params"}
    return tree["params"] if is_wrapped else tree


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {name: _plain(one) for name, one in node.items()}
    return node


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves by name, such as "layers_0/qkv"; `is_leaf` as of `jax.tree.map`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def check_fit(wanted: Any, found: Any, describe: Callable[[Any], str] | None = None) -> None:
    """Compares two trees of dicts; whatever else stands in them is a leaf.

    Args:
        wanted: What a model has: arrays or shapes, with quantised kernels where it has such.
        found: What it was given.
        describe: What has to be equal of two leaves, as text; None: dtype and shape.

    Raises:
        ValueError: names the leaves that are missing, unknown or different, fifty at most.
    """
    describe = describe or kind_of
    expected, given = named_leaves(wanted, _is_no_block), named_leaves(found, _is_no_block)
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name or 'params'} is unknown" for name in given if name not in expected]
    for name, leaf in given.items():
        if name in expected and describe(leaf) != describe(expected[name]):
            one = expected[name]
            is_float = is_quantized(one) and not is_quantized(leaf)
            has = f"takes a float kernel {list(one.shape)}, or" if is_float else "has"
            problems.append(f"{name} is {describe(leaf)}, the model {has} {describe(one)}")
    if problems:
        raise ValueError("params do not fit the model: " + listed(problems))


def _is_no_block(node: Any) -> bool:
    return not isinstance(node, dict) or not node


def kind_of(leaf: Any) -> str:
    """Dtype and shape of an array, as text; of a quantised kernel, of its parts too."""
    if is_quantized(leaf):
        return f"{type(leaf).__name__}{list(leaf.shape)} of {', '.join(map(kind_of, leaf))}"
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return f"a {type(leaf).__name__}"
    return f"{leaf.dtype}{list(leaf.shape)}"


def listed(problems: Sequence[str], joint: str = "; ") -> str:
    """Problems one after the other, of very many the first ones and how many more there are."""
    rest = len(problems) - _MOST_PROBLEMS
    return joint.join([*problems[:_MOST_PROBLEMS], *([f"and {rest} more"] if rest > 0 else [])])
