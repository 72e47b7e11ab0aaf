"""Latent attention: keys and values of all heads come from one latent of a token (DeepSeek V2, V3).

A head's key is its part of `kv_b` times the latent, and its value is another part times it:

    score = q . (K latent) = (q K) . latent           sum of w V latent = V (sum of w latent)

So queries go into the space of latents and results out of it, and attention is that of H queries
to one key: the latent, whose numbers are the values too, and beside it the part of a key that turns
with its position, which all heads share. That is what the cache keeps of a token.

Axes: N tokens, H heads, D numbers of a head's key that do not turn, V of a value, r of the latent.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from folojax.models.core.adapted import AdaptedKernel
from folojax.models.core.declared import ONES, kernel_of
from folojax.models.core.layers import norm

if TYPE_CHECKING:
    from folojax.models.core.block import Block

_FEW_ROWS = {"cpu": 64, "default": 512}
"""By platform, for which reading the whole kernel takes no longer than copying the part of it that
is asked for."""


def heads_of_latents(block: "Block", normed: Float[Array, "N E"], rotary: Any) -> Any:
    """Queries and keys in the space of latents, which are the values; and what leads out of it.

    Latents come first in queries and keys, then what turns; one key is that of all heads.
    """
    config, heads = block.config, block.config.num_heads
    assert config.rotary_dim is not None
    still = config.head_dim - config.rotary_dim
    latent, name = normed, "q"
    if config.query_rank:
        latent, name = _latent(block, "q", normed, config.query_rank)[0], "q_b"
    query = block.linear(name, latent, heads * config.head_dim, False).astype(block.dtype)
    query = query.reshape(-1, heads, config.head_dim)
    latent, turning = _latent(block, "kv", normed, config.kv_rank, config.rotary_dim)
    kernel = kernel_of(block, "kv_b", heads * (still + config.value_dim), config.kv_rank)
    query_turn, key_turn = block.norm_and_turn(query[..., still:], turning[:, None], rotary)
    query_still = query[..., :still]
    if rotary is not None and rotary.growth is not None:
        query_still = query_still * rotary.growth
    absorbed = into_latents(query_still, kernel, config.value_dim)
    query = jnp.concatenate((absorbed, query_turn), axis=-1)
    return query, jnp.concatenate((latent[:, None], key_turn), axis=-1), None, kernel


def _latent(block: "Block", name: str, x: Float[Array, "N E"], rank: int, rest: int = 0) -> Any:
    """A normed latent, and what a product has beside it."""
    config = block.config
    out = block.linear(f"{name}_a", x, rank + rest, config.qkv_bias).astype(block.dtype)
    weight = block.param(f"{name}_a_norm", ONES, (rank,), block.dtype)
    # Whatever the other norms have, as in transformers.
    small = dataclasses.replace(config, rms_norm_eps=1e-6)
    return norm(out[:, :rank], weight, None, small), out[:, rank:]


def into_latents(
    query: Float[Array, "N H D"], kernel: Any, value_dim: int
) -> Float[Array, "N H r"]:
    """Queries times the keys' part of `kv_b`, [H * (D + V), r]; an `AdaptedKernel` of it, too."""
    return _by_head(query, kernel, slice(0, query.shape[2]), query.shape[2] + value_dim, True)


def out_of_latents(
    mixed: Float[Array, "N H r"], kernel: Any, value_dim: int
) -> Float[Array, "N H V"]:
    """Sums of latents times the values' part of it."""
    base = kernel.kernel if isinstance(kernel, AdaptedKernel) else kernel
    of_head = base.shape[0] // mixed.shape[1]
    return _by_head(mixed, kernel, slice(of_head - value_dim, of_head), of_head, False)


def _by_head(
    x: Float[Array, "N H _"], kernel: Any, part: slice, of_head: int, is_into: bool
) -> Float[Array, "N H _"]:
    """Each head's numbers times rows of its kernel, or these transposed; in the dtype of `x`."""
    base = kernel.kernel if isinstance(kernel, AdaptedKernel) else kernel
    weights = base.reshape(x.shape[1], of_head, -1)
    branches = {
        platform: functools.partial(
            _product, part=part, is_into=is_into, is_whole=len(x) <= few, is_cpu=platform == "cpu"
        )
        for platform, few in _FEW_ROWS.items()
    }
    out = jax.lax.platform_dependent(x, weights, **branches)
    if isinstance(kernel, AdaptedKernel):
        out = out + _low_rank(x, kernel, part, of_head, is_into)
    return out.astype(x.dtype)


def _product(
    x: Array, weights: Array, *, part: slice, is_into: bool, is_whole: bool, is_cpu: bool
) -> Array:
    """With some rows of each head's kernel, or with all of them, of which others count for nothing.

    Batches come first, and for sums over latents XLA on CPU has kernels on the left, turned
    afterwards: it is several times slower with other orders.
    """
    if is_whole and is_into:
        x = jnp.pad(x, ((0, 0), (0, 0), (part.start, weights.shape[1] - part.stop)))
    weights = weights if is_whole else weights[:, part]
    x = x.swapaxes(0, 1)
    if is_into:
        return _sum("hnd,hdr->hnr", x, weights).swapaxes(0, 1)
    if is_cpu:
        # The barrier, or XLA makes of it the other order again.
        out = jax.lax.optimization_barrier(_sum("hdr,hnr->hdn", weights, x)).transpose(2, 0, 1)
    else:
        out = _sum("hnr,hdr->hnd", x, weights).swapaxes(0, 1)
    return out[..., part] if is_whole else out


def _low_rank(
    x: Float[Array, "N H _"], kernel: AdaptedKernel, part: slice, of_head: int, is_into: bool
) -> Float[Array, "N H _"]:
    """What the adapters of the rows add: all adapters with all rows, of which each keeps its own.

    A request's tokens all have its adapter, so that of a query is that of the latents it reads.
    """
    stack, slot = kernel.stack, kernel.slot
    _, slots, rank, width = stack.a.shape  # the kernel is one linear layer
    rows, heads, _ = x.shape
    b = stack.b[0].reshape(slots * rank, heads, of_head)[:, :, part]
    a = stack.a.reshape(slots * rank, width)
    flat = x.astype(a.dtype)
    if is_into:
        inner = _sum("hnd,hsd->hns", flat.swapaxes(0, 1), b.swapaxes(0, 1)).swapaxes(0, 1)
    else:
        inner = _sum("nr,sr->ns", flat.reshape(rows * heads, -1), a).reshape(rows, heads, -1)
    if slot is not None:
        is_own = jnp.repeat(slot[:, None] == jnp.arange(slots)[None, :], rank, axis=1)
        inner = jnp.where(is_own[:, None, :], inner, 0.0)
    inner = inner.astype(a.dtype)
    if is_into:
        return _sum("ns,sr->nr", inner.reshape(rows * heads, -1), a).reshape(rows, heads, -1)
    return _sum("hns,hsd->hnd", inner.swapaxes(0, 1), b.swapaxes(0, 1)).swapaxes(0, 1)


def _sum(formula: str, left: Array, right: Array) -> Array:
    return jnp.einsum(formula, left, right, preferred_element_type=jnp.float32)
