"""Low-rank updates of kernels: pure functions over parameter trees.

A LoRA tree has the nesting of the parameter tree, as far as it has anything to say; where that has
a kernel [O, I], it has a pair, oriented as in peft::

    {"layers_0": {"qkv": {"a": [r, I], "b": [O, r]}}}        kernel + scale * b @ a
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt32

from folojax.models.quantized.quantize import is_quantized

_IS_QUANTIZED = (
    "is quantised: take the parameters that it was made from; update_params quantises what they "
    "become"
)


def init_lora(
    rng: Key[Array, ""] | UInt32[Array, " 2"],
    params: Mapping[str, Any],
    rank: int,
    names: Sequence[str] = ("qkv", "o", "gate_up", "down"),
) -> dict[str, Any]:
    """A LoRA tree for the kernels of these names, in float32; merged, it changes nothing yet.

    Args:
        rng: For `a`, normal with variance 1 / I; `b` is zero.
        params: The model's parameters.
        rank: r.
        names: Of two-dimensional kernels inside of layers.

    Raises:
        ValueError: no kernel has one of the names, or what has it is no matrix, or quantised.
    """
    lora: dict[str, Any] = {}
    for layer, block in params.items():
        if not isinstance(block, Mapping):
            continue
        for name in names:
            if name in block:
                if is_quantized(block[name]):
                    raise ValueError(f"{layer}/{name} {_IS_QUANTIZED}")
                shape = block[name].shape
                if len(shape) != 2:
                    raise ValueError(
                        f"{layer}/{name} has shape {list(shape)}; a low-rank update needs a kernel "
                        "[O, I]: leave it out of names"
                    )
                rng, key = jax.random.split(rng)
                width_out, width_in = shape
                a = jax.random.normal(key, (rank, width_in), jnp.float32) * width_in**-0.5
                pair = {"a": a, "b": jnp.zeros((width_out, rank), jnp.float32)}
                lora.setdefault(layer, {})[name] = pair
    if not lora:
        raise ValueError(f"no layer has a kernel named {' or '.join(names)}")
    return lora


def merge_lora(params: Mapping[str, Any], lora: Mapping[str, Any], scale: float = 1.0) -> Any:
    """New parameters with the low-rank updates added, for `LLM.update_params`.

    Pure and differentiable: a trainer may take gradients with respect to `lora` through it. What
    the LoRA does not name is shared, not copied.

    Args:
        params: The model's parameters, unmerged.
        lora: A tree as `init_lora` makes it.
        scale: Of all updates; often alpha / r.

    Raises:
        ValueError: the LoRA names what the parameters lack, or shapes do not fit; all are named.
    """
    problems: list[str] = []

    def merge(params: Mapping[str, Any], lora: Mapping[str, Any], path: str) -> dict[str, Any]:
        merged = dict(params)
        for name, update in lora.items():
            where = f"{path}{name}"
            if name not in params:
                problems.append(f"{where} is unknown")
            elif isinstance(params[name], Mapping):
                if isinstance(update, Mapping):
                    merged[name] = merge(params[name], update, f"{where}/")
                else:
                    problems.append(f"{where} is no dict of {', '.join(params[name])}")
            elif not isinstance(update, Mapping) or set(update) != {"a", "b"}:
                problems.append(f'{where} is no pair {{"a": ..., "b": ...}}')
            elif is_quantized(params[name]):
                problems.append(f"{where} {_IS_QUANTIZED}")
            else:
                kernel, a, b = params[name], update["a"], update["b"]
                if (*b.shape[:-1], *a.shape[1:]) != kernel.shape or b.shape[-1] != a.shape[0]:
                    problems.append(
                        f"{where} has a {list(a.shape)} and b {list(b.shape)}, the kernel is "
                        f"{list(kernel.shape)}"
                    )
                    continue
                # In float32, and rounded once.
                change = jnp.matmul(b, a, preferred_element_type=jnp.float32)
                wide = kernel.astype(jnp.float32) + scale * change
                merged[name] = wide.astype(kernel.dtype)
        return merged

    merged = merge(params, lora, "")
    if problems:
        raise ValueError("lora does not fit the parameters: " + "; ".join(problems))
    return merged
