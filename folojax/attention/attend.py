"""What the layers of a step do with the cache: attend to pages, and go on with states."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from folojax.attention import cudnn, latent, native, ordered, reference
from folojax.attention.interface import AttentionSpec, Kernel
from folojax.kv.cache import KVCache, KVLayout, pages_of, state_of, with_part
from folojax.kv.placement import Placement
from folojax.models.core.config import ModelConfig
from folojax.models.core.interface import PLAIN, Scoring
from folojax.models.core.recurrence import RecurrentState, Rows, convolve_rows, recur_rows

KERNELS: dict[str, Kernel] = {
    "cudnn": cudnn.KERNEL,
    "latent": latent.KERNEL,
    "native": native.KERNEL,
    "ordered": ordered.KERNEL,
    "reference": reference.KERNEL,
    "alike": reference.ALIKE,
}
"""By the names that `PageFormat.kernels` holds."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedAttend:
    """An `Attend` and a `Recur` of `folojax.models.core.interface`, for the rows of a placement."""

    placement: Placement

    def __call__(
        self, cache: KVCache, layer: int, *args: Any, **options: Any
    ) -> tuple[KVCache, Float[Array, "T H V"]]:
        """As `attend`."""
        return attend(self.placement, cache, layer, *args, **options)

    def convolve(
        self, cache: KVCache, layer: int, x: Float[Array, "T X"], kernel: Float[Array, "X W"]
    ) -> tuple[KVCache, Float[Array, "T X"]]:
        """As `Recur.convolve`."""
        state = state_of(cache.layers[layer])
        by_row = self.placement.by_row(x)
        conv, out = convolve_rows(state.conv, self._rows(state), by_row, kernel)
        return _with_layer(cache, layer, state._replace(conv=conv)), self.placement.by_token(out)

    def recur(
        self,
        cache: KVCache,
        layer: int,
        query: Float[Array, "T K D"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T H Z"],
        decay: Float[Array, "T H"],
        beta: Float[Array, "T H"] | None = None,
    ) -> tuple[KVCache, Float[Array, "T H Z"]]:
        """As `Recur.recur`."""
        state = state_of(cache.layers[layer])
        given = (query, key, value, decay) if beta is None else (query, key, value, decay, beta)
        by_row = map(self.placement.by_row, given)
        assert state.memory is not None, "the layer is more than a convolution"
        memory, out = recur_rows(state.memory, self._rows(state), *by_row)
        cache = _with_layer(cache, layer, state._replace(memory=memory))
        return cache, self.placement.by_token(out)

    def _rows(self, state: RecurrentState) -> Rows:
        """The rows, those of padding at the last entry of a state."""
        rows = self.placement.rows
        return rows._replace(slot=jnp.minimum(rows.slot, len(state.conv) - 1))


def _with_layer(cache: KVCache, layer: int, new: Any) -> KVCache:
    kept = with_part(cache.layers[layer], new)
    return KVCache((*cache.layers[:layer], kept, *cache.layers[layer + 1 :]), cache.format)


def attend(
    placement: Placement,
    cache: KVCache,
    layer: int,
    query: Float[Array, "T H D"],
    key: Float[Array, "T K D"],
    value: Float[Array, "T K D"] | None,
    scoring: Scoring = PLAIN,
    sinks: Float[Array, " H"] | None = None,
) -> tuple[KVCache, Float[Array, "T H V"]]:
    """Attention of every token to all of its request so far, in the shape that models ask for.

    The kernel stores new keys and values, and a chunk sees its own tokens and those of earlier rows
    of the same call.
    It is the first of the cache's format that takes the layer.

    Returns:
        The cache with the new tokens, and the result for each token in the dtype of `query`.
    """
    if (
        scoring.chunk is not None
        and placement.page_table.shape[1] * cache.page_size <= scoring.chunk
    ):
        scoring = dataclasses.replace(scoring, chunk=None)  # all that rows may have lies in one
    spec = AttentionSpec(query.dtype, cache.dtype, query.shape[-1], cache.format, scoring)
    _, kernel = choose_kernel(spec)
    pages, out = kernel.attend(
        query, key, value, pages_of(cache.layers[layer]), placement, spec, sinks
    )
    return _with_layer(cache, layer, pages), out


def kernels_of(
    config: ModelConfig, layout: KVLayout
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Which kernels the layers of a model use.

    Args:
        config: Of the model.
        layout: Of its cache.

    Returns:
        The layers that attend by the name of their kernel, and those that do without the preferred
        one by the reason for that.
    """
    layers: dict[str, list[int]] = {}
    reasons: dict[str, list[int]] = {}
    dtype, storage = jnp.dtype(layout.dtype), jnp.dtype(layout.storage_dtype)
    for layer in range(config.num_layers):
        if not config.has_pages(layer):
            continue
        scoring = config.scoring(layer)
        dim = layout.heads_of(layer)[1]
        spec = AttentionSpec(dtype, storage, dim, layout.format, scoring)
        name, _ = choose_kernel(spec)
        layers.setdefault(name, []).append(layer)
        given = layout.format.kernels
        preferred = "latent" if scoring.value_dim and "latent" in given else given[0]
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
