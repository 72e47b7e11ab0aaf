"""Parameters as an argument: new ones in place of old ones, and which ones they are."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from folojax.models.quantized.quantize import is_quantized, quantization_of, quantize_like

_NUM_PROBED = 256


def check_same_shapes(old: Any, new: Any) -> Any:
    """Returns new parameters as the jitted steps know the old ones.

    JAX arrays are taken as they are, with no copy; others go to where the old ones lie. A kernel of
    floats that takes the place of a quantised one is quantised likewise.

    Args:
        old: The parameters that the executables were compiled for.
        new: A pytree of arrays, in the nesting of the old ones.

    Raises:
        ValueError: leaves are missing or new, or have another shape or dtype; all are named.
    """
    if quantization_of(old):
        new = _quantized_as(old, new)
    expected, found = _kernels(old), _kernels(new)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    for name, leaf in found.items():
        if name in expected:
            wanted, got = _kind(expected[name]), _kind(leaf)
            if got != wanted:
                is_float = is_quantized(expected[name]) and not is_quantized(leaf)
                has = (
                    f"takes a float kernel {list(expected[name].shape)}, or" if is_float else "has"
                )
                problems.append(f"{name} is {got}, the model {has} {wanted}")
    wanted_tree, tree = str(jax.tree.structure(old)), str(jax.tree.structure(new))
    if not problems and tree != wanted_tree:
        problems.append(f"the tree is {tree}, the model has {wanted_tree}")
    if problems:
        raise ValueError("params do not fit the model: " + "; ".join(problems))
    return jax.tree.map(_as_known, old, new)


def _quantized_as(old: Any, new: Any) -> Any:
    """New parameters with quantised kernels where the old ones have them, as far as both agree."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {
            name: _quantized_as(old[name], leaf) if name in old else leaf
            for name, leaf in new.items()
        }
    if not is_quantized(old) or is_quantized(new) or not hasattr(new, "dtype"):
        return new
    is_kernel = jnp.issubdtype(new.dtype, jnp.floating) and new.shape == old.shape
    return quantize_like(old, jnp.asarray(new)) if is_kernel else new


def fingerprint(params: Any) -> str:
    """Tells parameters from others: equal ones have the same, on any machine.

    Of each array some elements are read, spread over the whole: so a change of all of its elements,
    such as a step of training, is seen, and one of a few may not be.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(_leaves(params).items()):
        digest.update(f"{name} {_kind(leaf)}".encode())
        digest.update(np.asarray(_probe(leaf)).tobytes())
    return digest.hexdigest()[:32]


@jax.jit
def _probe(leaf: Array) -> Array:
    """Some elements, evenly spread, the first among them."""
    flat = leaf.reshape(-1)
    return flat[:: max(1, flat.size // _NUM_PROBED)]


def _kernels(params: Any) -> dict[str, Any]:
    """By name, a quantised kernel as one."""
    return _leaves(params, is_leaf=is_quantized)


def _leaves(params: Any, is_leaf: Any = None) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _kind(leaf: Any) -> str:
    if is_quantized(leaf):
        parts = ", ".join(map(_kind, leaf))
        return f"{type(leaf).__name__}{list(leaf.shape)} of {parts}"
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return f"a {type(leaf).__name__}"
    return f"{leaf.dtype}{list(leaf.shape)}"


def _as_known(old: jax.Array, new: Any) -> jax.Array:
    # A weak type would be another executable.
    if not isinstance(new, jax.Array):
        return jax.device_put(new, old.sharding)
    return new if new.weak_type == old.weak_type else jnp.asarray(new, dtype=old.dtype)
