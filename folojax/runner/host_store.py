"""K/V of requests in host memory: pages as they lie in the cache, or tokens, which fit any cache.

cache ──save──> pages by key ──load──> cache          a preempted request, in the same engine
                     │  ^
                read v  │ put
                    TokenKV  (numpy)                   a snapshot, for any page size
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Num

from folojax.backend import Backend
from folojax.backend.devices import fetch
from folojax.kv.cache import KVCache, KVLayout
from folojax.kv.page_copies import PageCopies, TakenPages
from folojax.sched.host_pages import PageLoad, PageSave


@dataclasses.dataclass(frozen=True, eq=False)
class TokenKV:
    """K/V of the first T tokens of a request.

    Attributes:
        keys: All layers; bfloat16 where the cache is. Where these differ in K or D, they are one
            layer of one head, as wide as all heads together.
        values: Likewise; with V = 0 where they are a part of the keys.
    """

    keys: Num[np.ndarray, "L T K D"]
    values: Num[np.ndarray, "L T K V"]

    @property
    def num_tokens(self) -> int:
        """T, tokens whose K/V these are."""
        return self.keys.shape[1]

    def take(self, num_tokens: int) -> "TokenKV":
        """The first tokens of it."""
        return TokenKV(self.keys[:, :num_tokens], self.values[:, :num_tokens])


class HostStore:
    """Pages by key, in the memory of the host."""

    def __init__(self, layout: KVLayout, copies: PageCopies, backend: Backend) -> None:
        """An empty one.

        Args:
            layout: Of the cache.
            copies: Moves the pages.
            backend: Where these lie, and the memory that holds them.
        """
        self._layout = layout
        self._copies = copies
        self._backend = backend
        self._taken: dict[int, list[TakenPages]] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def save(self, cache: KVCache, saves: Iterable[PageSave]) -> None:
        """Copies pages out of the cache. Does not wait for the device."""
        for save in saves:
            taken = self._copies.take(cache, save.page_ids)
            self._taken[save.key] = [self._to_host(pages) for pages in taken]

    def load(self, cache: KVCache, loads: Iterable[PageLoad]) -> KVCache:
        """Writes what was saved into other pages, and forgets it. DONATES `cache`."""
        for load in loads:
            targets = {load.first + place: page for place, page in enumerate(load.page_ids)}
            taken = [self._move(pages, "device") for pages in self._taken.pop(load.key)]
            cache = self._copies.put(cache, taken, targets)
        return cache

    def drop(self, keys: Iterable[int]) -> None:
        """Forgets; unknown keys are passed over."""
        for key in keys:
            self._taken.pop(key, None)

    def clear(self) -> None:
        """Forgets everything."""
        self._taken.clear()

    def read(self, key: int, num_tokens: int) -> TokenKV:
        """The first tokens of what a key holds."""
        return read_tokens(self._taken[key], num_tokens, self._layout)

    def read_pages(self, cache: KVCache, page_ids: Sequence[int], num_tokens: int) -> TokenKV:
        """Waits for the first tokens in some pages of the cache."""
        num_pages = -(-num_tokens // self._layout.page_size)
        taken = self._copies.take(cache, page_ids[:num_pages])
        return read_tokens(taken, num_tokens, self._layout)

    def put(self, key: int, kv: TokenKV) -> None:
        """Keeps tokens as if their pages had been saved.

        Raises:
            ValueError: they are those of another model.
        """
        layout = self._layout
        wanted = (layout.num_layers, kv.num_tokens, layout.num_kv_heads, layout.head_dim)
        if layout.heads:
            wanted = (1, kv.num_tokens, 1, sum(heads * dim for heads, dim in layout.heads))
        dtype = np.dtype(layout.dtype)
        values = wanted if layout.num_arrays == 2 else (*wanted[:3], 0)
        if kv.keys.shape != wanted or kv.values.shape != values or kv.keys.dtype != dtype:
            raise ValueError(
                f"the K/V are {kv.keys.dtype}{list(kv.keys.shape)}; those of this engine's model "
                f"are {dtype}{list(wanted)} [layers, tokens, heads, head dim]: use the engine's "
                "own model and dtype"
            )
        pages = write_tokens(kv, layout)
        placed = pages._replace(layers=self._backend.devices.place(pages.layers))
        self._taken[key] = [self._to_host(placed)]

    def _to_host(self, pages: TakenPages) -> TakenPages:
        return self._move(pages, self._backend.host_memory)

    def _move(self, pages: TakenPages, memory_kind: str | None) -> TakenPages:
        if memory_kind is None or self._backend.host_memory is None:
            return pages
        sharding = pages.layers[0].sharding.with_memory_kind(memory_kind)
        return pages._replace(layers=jax.device_put(pages.layers, sharding))


def read_tokens(taken: Sequence[TakenPages], num_tokens: int, layout: KVLayout) -> TokenKV:
    """Waits for pages, and lays out the first tokens in them one behind the other."""
    num_pages = -(-num_tokens // layout.page_size)
    sizes = [layout.heads_of(layer) for layer in range(layout.num_layers)]
    count = layout.num_arrays
    by_layer: list[np.ndarray] = [
        np.zeros(
            (num_pages, count, layout.page_size, heads * layout.copies_of(heads), dim),
            np.dtype(layout.storage_dtype),
        )
        for heads, dim in sizes
    ]
    for place, layers in fetch([(one.place, one.layers) for one in taken]):
        is_wanted = (place >= 0) & (place < num_pages)
        for pages, found in zip(by_layer, layers, strict=True):
            pages[place[is_wanted]] = layout.format.by_token(found)[is_wanted]
    # [n, N, S, K, D] to [N, n * S, K, D]
    tokens = [
        pages.swapaxes(0, 1).reshape(count, -1, *pages.shape[3:])[
            :, :num_tokens, :: layout.copies_of(heads)
        ]
        for pages, (heads, _) in zip(by_layer, sizes, strict=True)
    ]
    if layout.heads:  # side by side
        flat = [one.reshape(count, num_tokens, 1, -1) for one in tokens]
        tokens = [np.concatenate(flat, axis=-1)]
    keys, *values = np.stack(tokens, axis=1).astype(np.dtype(layout.dtype))
    return TokenKV(keys, values[0] if values else keys[..., :0])


def write_tokens(kv: TokenKV, layout: KVLayout) -> TakenPages:
    """The inverse of `read_tokens`: the pages that hold these tokens."""
    num_pages = -(-kv.num_tokens // layout.page_size)
    arrays = (kv.keys, kv.values)[: layout.num_arrays]
    both = np.stack(arrays, axis=1).astype(np.dtype(layout.storage_dtype))
    sizes = [layout.heads_of(layer) for layer in range(layout.num_layers)]
    parts = list(both)
    if layout.heads:
        borders = np.cumsum([heads * dim for heads, dim in sizes])[:-1]
        cut = np.split(both[0], borders, axis=-1)
        parts = [one.reshape(*one.shape[:2], *size) for one, size in zip(cut, sizes, strict=True)]
    missing = num_pages * layout.page_size - kv.num_tokens
    layers = []
    for part, (heads, _) in zip(parts, sizes, strict=True):  # [N, T, K, D]
        padded = np.pad(part, ((0, 0), (0, missing), (0, 0), (0, 0)))
        padded = np.repeat(padded, layout.copies_of(heads), axis=2)
        pages = padded.reshape(len(part), num_pages, layout.page_size, *padded.shape[2:])
        layers.append(layout.format.by_token(pages.swapaxes(0, 1)))
    # One group: its size is its own, and so is what `PageCopies.put` compiles for it.
    return TakenPages(np.arange(num_pages), layers)
