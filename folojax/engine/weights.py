"""Parameters as an argument: the user's own, new ones in place of old ones, and which they are."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from folojax.backend.devices import fetch
from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama
from folojax.models.core.param_tree import check_fit, kind_of, named_leaves, plain_tree
from folojax.models.core.shards import cut_params, join_params, parts_of, problems_of
from folojax.models.files.params import param_shapes
from folojax.models.quantized.quantize import is_quantized, quantization_of, quantize_like
from folojax.runner.runner import Runner

_NUM_PROBED = 256

UPDATE_POLICIES = ("recompute", "keep", "restart")


def checked_pair(model: Any) -> tuple[Llama, Any]:
    """A module and its parameters as the engine takes them, in plain dicts; no array is touched.

    Args:
        model: What the user gave, and should be a pair (module, params).

    Raises:
        ValueError: it is none, the module is none of folojax, or the parameters do not have its
            names, shapes and dtypes; what differs is named.
    """
    module, params = model if isinstance(model, tuple) and len(model) == 2 else (model, None)
    if not isinstance(module, Llama) or not isinstance(params, Mapping):
        parts = model if isinstance(model, tuple | list) and len(model) < 4 else ()
        what = f" of {', '.join(type(part).__name__ for part in parts)}" if parts else ""
        raise ValueError(
            f"model is a {type(model).__name__}{what}; it must be a path, a Hub name or a tuple "
            "(module, params), where module comes from folojax.build_module(config, dtype) and "
            "params is a dict of its arrays; docs/weights.md makes both of other modules' weights"
        )
    params = plain_tree(params)

    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, module.dtype)

    # Quantised kernels may stand wherever the module has kernels of floats.
    floats = jax.tree.map(
        lambda leaf: shape(leaf) if is_quantized(leaf) else leaf, params, is_leaf=is_quantized
    )
    config, count = module.config, parts_of(params)
    wanted = param_shapes(config, module.dtype)
    if count > 1 and not problems_of(config, count):  # of an engine on several devices
        wanted = jax.eval_shape(lambda params: cut_params(params, config, count), wanted)
    check_fit(wanted, floats)
    return module, params


def placed_like(runner: Runner, params: Any) -> Any:
    """New parameters as those of a runner lie; ValueError if they do not fit, or lie elsewhere."""
    devices, config = runner.backend.devices, runner.model.config
    devices.check(params)
    return devices.place_params(check_same_shapes(runner.params, params, config), config)


def check_same_shapes(old: Any, new: Any, config: ModelConfig) -> Any:
    """Returns new parameters in the tree that the jitted steps know; no array is touched.

    But for kernels of floats that take the place of quantised ones: these are quantised likewise.


    Args:
        old: The parameters that the executables were compiled for.
        new: A pytree of arrays, in the nesting of the old ones; mappings of any kind, and with
            Flax's {"params": ...} around them or without. Whole, or in parts as the old ones are.
        config: Of the model.

    Raises:
        ValueError: leaves are missing or new, or have another shape or dtype; they are named.
    """
    new = plain_tree(new)
    if parts_of(old) != parts_of(new):
        old = jax.eval_shape(lambda params: join_params(params, config), old)
    if quantization_of(old):
        new = _quantized_as(old, new)
    check_fit(old, new)
    return new


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


def fingerprint_of(runner: Runner) -> str:
    """That of the parameters of a runner, on however many devices."""
    join = functools.partial(runner.backend.devices.join_param, config=runner.model.config)
    return fingerprint(runner.params, join)


def fingerprint(params: Any, join: Callable[[str, Any], Any] = lambda name, leaf: leaf) -> str:
    """Tells parameters from others: equal ones have the same, on any machine.

    Of each array some elements are read, spread over the whole: so a change of all of its elements,
    such as a step of training, is seen, and one of a few may not be.
    """
    digest = hashlib.sha256()
    for name, given in sorted(named_leaves(params, is_quantized).items()):
        param = join(name.rpartition("/")[2], given)
        for part, leaf in named_leaves(param).items():
            digest.update(f"{name}/{part} {kind_of(leaf)}".encode())
            digest.update(np.asarray(fetch(_probe(leaf))).tobytes())
    return digest.hexdigest()[:32]


@jax.jit
def _probe(leaf: Array) -> Array:
    """Some elements, evenly spread, the first among them."""
    flat = leaf.reshape(-1)
    return flat[:: max(1, flat.size // _NUM_PROBED)]


def check_policy(running: str) -> None:
    """Raises a ValueError unless it says what becomes of unfinished requests."""
    if running not in UPDATE_POLICIES:
        raise ValueError(f"running is {running!r}; it must be one of {list(UPDATE_POLICIES)}")
