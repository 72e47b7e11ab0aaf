"""The cache: an immutable pytree of an array of pages a layer, or of the states of a recurrent one.

A page holds the keys and then the values of S tokens of one request, for one layer: N arrays, two
of them, or the keys alone where values are a part of these (latent attention). The order of the
numbers inside of it suits whoever reads pages where they lie (`folojax.attention`):

    order "heads"    [P, N, K, S, D]    what one head reads lies together: C++ on CPU
    order "tokens"   [P, N, S, K, D]    what one token writes lies together: cuDNN

A recurrent layer (`RecurrentState`) has no pages, unless it attends too (`Both`), but an entry for
each slot of the batch, the same size however long a request is. Whoever begins at position 0 begins
with zeros, whatever the slot's last owner has left. Behind the slots lie states that are kept for
the prefix cache (`folojax.kv.state_copies`), and last an entry where rows of padding write.

A page is handed on with its old content, which nobody may see: positions behind a request's last
token are masked, and no value is ever NaN, which a weight of zero would not hide (`write`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from folojax.models.core.recurrence import RecurrentState
from folojax.models.core.recurrent import Recurrent
from folojax.models.core.recurrent_shards import part_of_recurrent

PageOrder: TypeAlias = Literal["heads", "tokens"]


@dataclasses.dataclass(frozen=True)
class PageFormat:
    """How pages lie in memory and who reads them; hashable, static under jit."""

    page_size: int  # S, tokens of a page
    order: PageOrder  # of the numbers in a page
    kernels: tuple[str, ...]  # of `folojax.attention.KERNELS`, the preferred one first
    capability: float = 0.0  # NVIDIA's, of the device that reads them; 0 for any other

    def shape(
        self, num_pages: int, num_kv_heads: int, head_dim: int, num_arrays: int = 2
    ) -> tuple[int, ...]:
        """The shape of a layer's array of pages."""
        inner = (num_kv_heads, self.page_size)
        if self.order == "tokens":
            inner = (self.page_size, num_kv_heads)
        return (num_pages, num_arrays, *inner, head_dim)

    def by_token(self, pages: Any) -> Any:
        """Pages as they lie, [*, N, _, _, D], to [*, N, S, K, D], and the inverse."""
        return pages if self.order == "tokens" else pages.swapaxes(-2, -3)


class Both(NamedTuple):
    """What a layer keeps that has attention and, beside it, a recurrence."""

    pages: Any
    state: RecurrentState


def pages_of(kept: Any) -> Any:
    """The array of pages of a layer that has one."""
    return kept.pages if isinstance(kept, Both) else kept


def state_of(kept: Any) -> RecurrentState:
    """The state of a layer that has one."""
    return kept.state if isinstance(kept, Both) else kept


def with_part(kept: Any, new: Any) -> Any:
    """What a layer keeps, with other pages or another state, whichever `new` is."""
    if not isinstance(kept, Both):
        return new
    name = "state" if isinstance(new, RecurrentState) else "pages"
    return kept._replace(**{name: new})


@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values, or states, of all layers."""

    # An array [P, N, _, _, D] each, a `RecurrentState`, or `Both`; JAX also puts what stands for an
    # array.
    layers: tuple[Any, ...]
    format: PageFormat  # how pages lie; static

    @property
    def pages(self) -> list[Any]:
        """The arrays of the layers that have pages, in order."""
        return [pages_of(one) for one in self.layers if not isinstance(one, RecurrentState)]

    def with_pages(self, pages: Sequence[Any]) -> "KVCache":
        """The same with other arrays in the place of `pages`."""
        left = iter(pages)
        layers = [
            one if isinstance(one, RecurrentState) else with_part(one, next(left))
            for one in self.layers
        ]
        return KVCache(tuple(layers), self.format)

    @property
    def states(self) -> list[RecurrentState]:
        """Those of the layers that have one."""
        return [state_of(one) for one in self.layers if isinstance(one, RecurrentState | Both)]

    def with_states(self, states: Sequence[RecurrentState]) -> "KVCache":
        """The same with others in the place of `states`."""
        left = iter(states)
        layers = [
            with_part(one, next(left)) if isinstance(one, RecurrentState | Both) else one
            for one in self.layers
        ]
        return KVCache(tuple(layers), self.format)

    @property
    def num_pages(self) -> int:
        """P, pages of the pool."""
        return self.pages[0].shape[0]

    @property
    def page_size(self) -> int:
        """S, tokens of a page."""
        return self.format.page_size

    @property
    def dtype(self) -> jnp.dtype:
        """Of the arrays that keep keys and values."""
        return self.pages[0].dtype


jax.tree_util.register_dataclass(KVCache, data_fields=["layers"], meta_fields=["format"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVLayout:
    """What a cache is allocated from: its sizes, dtypes and format."""

    num_pages: int  # P, pages of the pool
    num_layers: int  # L, layers of the model
    num_kv_heads: int  # K, heads of keys and values in a layer of the model
    head_dim: int  # D, numbers of a key in a head
    dtype: DTypeLike  # of the keys and values that go in
    storage_dtype: DTypeLike  # of the arrays that keep them
    format: PageFormat  # how a page lies in memory, and who reads it
    value_dim: int | None = None
    """V: values are the first V numbers of keys; None: they lie behind these, as many numbers."""
    num_shards: int = 1  # devices, each of which has some of the heads
    recurrent: Recurrent | None = None  # layers that have states instead of pages
    num_slots: int = 0  # requests that have a state at once, where there are such layers
    num_kept_states: int = 0  # room for states beside theirs
    heads: tuple[tuple[int, int], ...] = ()  # K and D by layer where these differ; (): they do not

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Those among the layers."""
        layers = () if self.recurrent is None else self.recurrent.layers
        return tuple(layer for layer in layers if layer < self.num_layers)

    @property
    def paged_layers(self) -> tuple[int, ...]:
        """The others, or all if they have both."""
        layers = tuple(range(self.num_layers))
        if self.recurrent is not None and self.recurrent.is_beside:
            return layers
        return tuple(layer for layer in layers if layer not in self.recurrent_layers)

    def heads_of(self, layer: int) -> tuple[int, int]:
        """K and D of a layer."""
        return self.heads[layer] if self.heads else (self.num_kv_heads, self.head_dim)

    @property
    def num_states(self) -> int:
        """Entries of a recurrent layer: of slots, kept ones, and that of padding."""
        return self.num_slots + self.num_kept_states + 1

    @property
    def state_bytes(self) -> int:
        """Bytes of all states, over all layers, of a device."""
        if self.recurrent is None:
            return 0
        sizes = part_of_recurrent(self.recurrent, self.num_shards)
        of_conv = sizes.num_channels * (sizes.conv_width - 1)
        elements = of_conv + (sizes.num_values * sizes.key_dim if sizes.has_memory else 0)
        return 4 * elements * self.num_states * len(self.recurrent_layers)

    @property
    def page_size(self) -> int:
        """S, tokens of a page."""
        return self.format.page_size

    @property
    def num_arrays(self) -> int:
        """N, arrays of a page: keys and values, or keys alone."""
        return 2 if self.value_dim is None else 1

    def copies_of(self, heads: int) -> int:
        """How often each of a layer's heads is there: once, unless devices are more than these."""
        return max(1, self.num_shards // heads) if heads else 1

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers, keys and values, of a device."""
        width = sum(
            heads * self.copies_of(heads) * dim
            for heads, dim in map(self.heads_of, self.paged_layers)
        )
        of_token = self.num_arrays * (width // self.num_shards)
        elements = of_token * self.page_size
        return elements * jnp.dtype(self.storage_dtype).itemsize


def init_cache(layout: KVLayout) -> KVCache:
    """Allocates the cache of a layout, full of zeros."""
    recurrent, paged = layout.recurrent_layers, layout.paged_layers

    def init(layer: int) -> Any:
        if layer not in recurrent:
            return _init_pages(layout, layer)
        state = _init_states(layout)
        return Both(_init_pages(layout, layer), state) if layer in paged else state

    return KVCache(tuple(map(init, range(layout.num_layers))), layout.format)


def _init_pages(layout: KVLayout, layer: int) -> Array:
    heads, dim = layout.heads_of(layer)
    stored = heads * layout.copies_of(heads)
    shape = layout.format.shape(layout.num_pages, stored, dim, layout.num_arrays)
    return jnp.zeros(shape, layout.storage_dtype)


def _init_states(layout: KVLayout) -> RecurrentState:
    """Those of a layer."""
    sizes, count = layout.recurrent, layout.num_states
    assert sizes is not None, "the layer is recurrent"
    of_head = (sizes.num_value_heads, sizes.key_dim, sizes.value_dim)
    channels = layout.num_shards * part_of_recurrent(sizes, layout.num_shards).num_channels
    return RecurrentState(
        jnp.zeros((count, sizes.conv_width - 1, channels), jnp.float32),
        jnp.zeros((count, *of_head), jnp.float32) if sizes.has_memory else None,
    )


def finite_values(
    key: Float[Array, "*shape D"], value: Float[Array, "*shape D"]
) -> tuple[Float[Array, "*shape D"], Float[Array, "*shape D"]]:
    """Keys and values as they are stored, and may be attended to.

    Later owners of a page give its old tokens a weight of zero, which does not hide a value of NaN
    or infinity. So such a value becomes zero and the key's number in its place NaN, which the
    token's own request cannot miss and which nobody else reads.
    """
    is_finite = jnp.isfinite(value)
    return jnp.where(is_finite, key, jnp.nan), jnp.where(is_finite, value, 0)


def finite_latents(key: Float[Array, "*shape D"], value_dim: int) -> Float[Array, "*shape D"]:
    """The same where values are the first numbers of keys: all those behind are NaN then."""
    value, rest = jnp.split(key, (value_dim,), axis=-1)
    is_finite = jnp.isfinite(value)
    rest = jnp.where(is_finite.all(axis=-1, keepdims=True), rest, jnp.nan)
    return jnp.concatenate((jnp.where(is_finite, value, 0), rest), axis=-1)


def write(
    pages: Num[Array, "P N _ _ D"],
    page: Int[Array, " T"],
    offset: Int[Array, " T"],
    key: Float[Array, "T K D"],
    value: Float[Array, "T K D"] | int,
    order: PageOrder,
) -> Num[Array, "P N _ _ D"]:
    """Stores the keys and values of T tokens in a layer's pages, each at its page and offset.

    A page outside of the pool drops its token. In place where the pages are donated to the jitted
    function that calls this. No value of NaN or infinity is ever stored (`finite_values`). A number
    in place of the values says how many numbers of keys these are.
    """
    num_pages = pages.shape[0]
    if isinstance(value, int):
        both = finite_latents(key, value)[:, None].astype(pages.dtype)
    else:
        both = jnp.stack(finite_values(key, value), axis=1).astype(pages.dtype)
    if page.shape[0] == 1:
        # Never a single write: XLA on CPU makes it a slice update and copies the array for that.
        page, offset = jnp.append(page, num_pages), jnp.append(offset, offset)
        both = jnp.concatenate((both, both))
    # What is to be dropped goes past the end (a negative index would wrap around), each to a place
    # of its own: no two writes meet, and saying so spares a GPU an atomic operation an element.
    outside = num_pages + jnp.arange(page.shape[0])
    page = jnp.where((page >= 0) & (page < num_pages), page, outside)
    whole = slice(None)
    in_heads, in_tokens = (page, whole, whole, offset), (page, whole, offset)
    place: Any = in_tokens if order == "tokens" else in_heads
    return pages.at[place].set(both, mode="drop", unique_indices=True)
