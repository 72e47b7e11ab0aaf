"""Stores the keys and values of a step's tokens, and attends with the kernel that takes them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from folojax.attention import cudnn, native, ordered, reference
from folojax.attention.interface import AttentionSpec, Kernel
from folojax.kv.cache import KVCache, KVLayout
from folojax.kv.placement import Placement
from folojax.models.core.config import ModelConfig
from folojax.models.core.interface import PLAIN, Scoring

KERNELS: dict[str, Kernel] = {
    "cudnn": cudnn.KERNEL,
    "native": native.KERNEL,
    "ordered": ordered.KERNEL,
    "reference": reference.KERNEL,
    "alike": reference.ALIKE,
}
"""By the names that `PageFormat.kernels` holds."""


def attend(
    placement: Placement,
    cache: KVCache,
    layer: int,
    query: Float[Array, "T H D"],
    key: Float[Array, "T K D"],
    value: Float[Array, "T K D"],
    scoring: Scoring = PLAIN,
    sinks: Float[Array, " H"] | None = None,
) -> tuple[KVCache, Float[Array, "T H D"]]:
    """Attention of every token to all of its request so far, in the shape that models ask for.

    With the placement bound it is a `folojax.models.core.interface.Attend`. The kernel stores
    new keys and values, and a chunk sees its own tokens and those of earlier rows of the same call.
    It is the first of the cache's format that takes the layer.

    Returns:
        The cache with the new tokens, and the result for each token in the dtype of `query`.
    """
    spec = AttentionSpec(query.dtype, cache.dtype, query.shape[-1], cache.format, scoring)
    _, kernel = choose_kernel(spec)
    pages, out = kernel.attend(query, key, value, cache.layers[layer], placement, spec, sinks)
    layers = (*cache.layers[:layer], pages, *cache.layers[layer + 1 :])
    return KVCache(layers, cache.format), out


def kernels_of(
    config: ModelConfig, layout: KVLayout
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Which kernels the layers of a model use.

    Args:
        config: Of the model.
        layout: Of its cache.

    Returns:
        The layers by the name of their kernel, and those that do without the preferred one by the
        reason for that.
    """
    layers: dict[str, list[int]] = {}
    reasons: dict[str, list[int]] = {}
    dtype, storage = jnp.dtype(layout.dtype), jnp.dtype(layout.storage_dtype)
    for layer in range(config.num_layers):
        scoring = config.scoring(layer)
        spec = AttentionSpec(dtype, storage, config.head_dim, layout.format, scoring)
        name, _ = choose_kernel(spec)
        layers.setdefault(name, []).append(layer)
        preferred = layout.format.kernels[0]
        if name != preferred:
            reason = f"{preferred} {KERNELS[preferred].refusal(spec)}"
            reasons.setdefault(reason, []).append(layer)
    return layers, reasons


def choose_kernel(spec: AttentionSpec) -> tuple[str, Kernel]:
    """The first kernel of the format that takes such layers, and its name.

    Raises:
        ValueError: none does; the text has the reason of each.
    """
    reasons = []
    for name in spec.page_format.kernels:
        reason = KERNELS[name].refusal(spec)
        if reason is None:
            return name, KERNELS[name]
        reasons.append(f"{name} {reason}")
    raise ValueError("no attention kernel takes this layer: " + "; ".join(reasons))
