"""The paged KV cache: an immutable pytree whose layout is known only here and in attention.

A page holds S tokens of one request for every layer. Inside it keys lie as suits the way in which
the platform reads pages where they lie (`attention`):

    on CPU      keys [P, K, S, D]       values [P, K, S, D]     a token's numbers are together
    elsewhere   keys [P, K, D, S]       values [P, K, S, D]     plain products of matrices

with one array per layer and segment.

On CPU there is one *segment*, which is the pool. Elsewhere pages are numbered through several of
growing size (such as 128, 384, 512 ... pages):

    page id     0 ....... 127 | 128 ....... 511 | 512 ............ 1023 | 1024 ...
    segment           0       |        1        |           2           |   3

A decode step reads whole arrays there, because XLA copies a slice before a product. Segments bound
what it reads all the same: pages are allocated lowest first, and the step is given only the
segments that hold pages in use (`take_segments`), the others stay where they are.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from folojax.models.config import ModelConfig
from folojax.models.platforms import platform

_Pages = TypeVar("_Pages", Array, np.ndarray)

SegmentArrays: TypeAlias = tuple[Num[Array, "P K _ _"], ...]  # one array per layer


class KVCache(NamedTuple):
    """Keys and values, `keys[segment][layer]`."""

    keys: tuple[SegmentArrays, ...]
    values: tuple[SegmentArrays, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Shape of a cache.

    Attributes:
        segments: Pages of each segment, in page-id order.
        page_size: S, tokens of a page.
        num_layers: L.
        num_kv_heads: K.
        head_dim: D.
        dtype: Of the values that go in. On CPU the cache is float32 whatever they are: there XLA
            sends an array of half precision through float32 on every write and most reads.
    """

    segments: tuple[int, ...]
    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: DTypeLike

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: DTypeLike, segments: tuple[int, ...], page_size: int
    ) -> "KVLayout":
        """The layout for a model."""
        return cls(
            segments=segments,
            page_size=page_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
        )

    @property
    def num_pages(self) -> int:
        """Pages of all segments."""
        return sum(self.segments)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        elements = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.page_size
        return elements * storage_dtype(self.dtype).itemsize


def split_segments(num_pages: int, head: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of segments: small ones for small batches, then growing with the extent.

    After the head, whose sum is the unit, the extent grows by half each time, in whole units.

    >>> split_segments(200, head=(8, 8, 16))
    (8, 8, 16, 32, 32, 32, 64, 8)
    >>> split_segments(3000, head=(128, 384))
    (128, 384, 512, 512, 512, 952)
    """
    sizes: list[int] = []
    unit = sum(head)
    while (extent := sum(sizes)) < num_pages:
        grown = max(unit, extent // (2 * unit) * unit)
        size = head[len(sizes)] if len(sizes) < len(head) else grown
        sizes.append(min(size, num_pages - extent))
    return tuple(sizes)


def init_cache(layout: KVLayout) -> KVCache:
    """A cache of zeros."""
    dtype = storage_dtype(layout.dtype)

    def segment(num_pages: int, *page_shape: int) -> SegmentArrays:
        shape = (num_pages, layout.num_kv_heads, *page_shape)
        return tuple(jnp.zeros(shape, dtype) for _ in range(layout.num_layers))

    size, dim = layout.page_size, layout.head_dim
    key_shape = (size, dim) if are_keys_upright() else (dim, size)
    return KVCache(
        keys=tuple(segment(pages, *key_shape) for pages in layout.segments),
        values=tuple(segment(pages, size, dim) for pages in layout.segments),
    )


def num_pages(cache: KVCache) -> int:
    """P: pages of all segments."""
    return sum(segment[0].shape[0] for segment in cache.keys)


def dtype(cache: KVCache) -> jnp.dtype:
    """Of the arrays: attention computes in it, where the cache lies, and converts what is small."""
    return cache.keys[0][0].dtype


def page_size(cache: KVCache) -> int:
    """S: tokens of a page."""
    return cache.values[0][0].shape[2]


def are_keys_upright() -> bool:
    """Whether keys lie in a page as values do, token by token."""
    return platform() == "cpu"


def turn_keys(pages: _Pages) -> _Pages:
    """Pages of keys [*, D, S] as they lie in the cache; also the inverse."""
    return pages.swapaxes(-1, -2) if are_keys_upright() else pages


def take_segments(cache: KVCache, count: int) -> tuple[KVCache, KVCache]:
    """Splits a cache into its first `count` segments and the rest; copies nothing."""
    return (
        KVCache(cache.keys[:count], cache.values[:count]),
        KVCache(cache.keys[count:], cache.values[count:]),
    )


def join_segments(head: KVCache, tail: KVCache) -> KVCache:
    """The inverse of `take_segments`."""
    return KVCache(head.keys + tail.keys, head.values + tail.values)


def layer_of(cache: KVCache, layer: int) -> KVCache:
    """The cache of one layer, which has index 0 in it; copies nothing."""
    return KVCache(
        keys=tuple((segment[layer],) for segment in cache.keys),
        values=tuple((segment[layer],) for segment in cache.values),
    )


def with_layers(layers: Sequence[KVCache]) -> KVCache:
    """The inverse of `layer_of`: caches of single layers as one."""
    return KVCache(
        keys=tuple(
            tuple(one[0] for one in parts) for parts in zip(*(x.keys for x in layers), strict=True)
        ),
        values=tuple(
            tuple(one[0] for one in parts)
            for parts in zip(*(x.values for x in layers), strict=True)
        ),
    )


def write(
    cache: KVCache,
    layer: int,
    page: Int[Array, " T"],
    offset: Int[Array, " T"],
    key: Float[Array, "T K D"],
    value: Float[Array, "T K D"],
) -> KVCache:
    """Stores one token per row at (page, offset) of a layer; pages outside the cache drop theirs.

    In place where the cache is donated to the jitted function that calls this.

    A page is handed on with its old content, which later owners give a weight of zero; a NaN or
    infinity among the values would spoil them all the same. So no such value is ever stored: it
    becomes zero, and its key NaN, which its own request cannot miss and nobody else reads.
    """
    if page.shape[0] == 1:
        # Never a single write: XLA on CPU makes it a slice update and copies the array for that.
        nowhere = jnp.full_like(page, num_pages(cache))
        page, offset = jnp.append(page, nowhere), jnp.append(offset, offset)
        key, value = jnp.concatenate((key, key)), jnp.concatenate((value, value))
    is_finite = jnp.isfinite(value).all(axis=-1, keepdims=True)
    value = jnp.where(is_finite, value, 0)
    key = jnp.where(is_finite, key, jnp.nan)
    keys, values, first = list(cache.keys), list(cache.values), 0
    for index, (segment_keys, segment_values) in enumerate(zip(*cache, strict=True)):
        old_key, old_value = segment_keys[layer], segment_values[layer]
        size = old_key.shape[0]
        # Whatever lies outside goes past the end, to be dropped (a negative index would wrap
        # around), each row to a place of its own: then no two writes meet, and saying so spares
        # the GPU an atomic operation for every element.
        outside = size + jnp.arange(page.shape[0])
        local = jnp.where((page >= first) & (page < first + size), page - first, outside)
        options: dict[str, Any] = {"mode": "drop", "unique_indices": True}
        upright, turned = (local, slice(None), offset), (local, slice(None), slice(None), offset)
        key_at = upright if are_keys_upright() else turned
        new_key = old_key.at[key_at].set(key.astype(old_key.dtype), **options)
        new_value = old_value.at[upright].set(value.astype(old_value.dtype), **options)
        keys[index] = _replace(segment_keys, layer, new_key)
        values[index] = _replace(segment_values, layer, new_value)
        first += size
    return KVCache(tuple(keys), tuple(values))


def places(
    cache: KVCache, page_table: Int[Array, "B N"], position: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Page and offset of one token a row; that of a row of padding is the page out of range."""
    size = page_size(cache)
    index = jnp.minimum(position // size, page_table.shape[1] - 1)
    page = jnp.take_along_axis(page_table, index[:, None], axis=1)[:, 0]
    return page, position % size


def layer_segments(
    cache: KVCache, layer: int, dtype: jnp.dtype
) -> list[tuple[Float[Array, "P K _ _"], Float[Array, "P K _ _"]]]:
    """Keys and values of a layer, segment by segment, where and as they lie."""
    return [
        (keys[layer].astype(dtype), values[layer].astype(dtype))
        for keys, values in zip(*cache, strict=True)
    ]


def gather_pages(
    cache: KVCache, layer: int, page_table: Int[Array, "*pages"], dtype: jnp.dtype
) -> tuple[Float[Array, "*pages K D S"], Float[Array, "*pages K S D"]]:
    """Copies pages out of a layer; the content of padding entries is unspecified."""
    keys = _gather([segment[layer] for segment in cache.keys], page_table)
    values = _gather([segment[layer] for segment in cache.values], page_table)
    return turn_keys(keys.astype(dtype)), values.astype(dtype)


def _gather(arrays: Sequence[Array], pages: Int[Array, "..."]) -> Array:
    """Pages out of the segments of one layer; the content of those out of range is unspecified."""
    first, out = 0, None
    for array in arrays:
        size = array.shape[0]
        picked = array[jnp.clip(pages - first, 0, size - 1)]
        is_later = jnp.expand_dims(pages >= first, (-3, -2, -1))
        out = picked if out is None else jnp.where(is_later, picked, out)
        first += size
    assert out is not None, "a cache has at least one segment"
    return out


def _replace(arrays: SegmentArrays, layer: int, new: Array) -> SegmentArrays:
    return (*arrays[:layer], new, *arrays[layer + 1 :])


def storage_dtype(dtype: DTypeLike) -> jnp.dtype:
    """What a cache of a dtype keeps: see `KVLayout.dtype`."""
    return jnp.dtype(jnp.float32) if platform() == "cpu" else jnp.dtype(dtype)
