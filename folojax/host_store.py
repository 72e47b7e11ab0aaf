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

from folojax import kv_cache, page_copies
from folojax.kv_cache import KVCache, KVLayout
from folojax.page_copies import TakenPages
from folojax.sched.host_pages import PageLoad, PageSave


@dataclasses.dataclass(frozen=True, eq=False)
class TokenKV:
    """K/V of the first T tokens of a request.

    Attributes:
        keys: All layers; bfloat16 where the cache is.
        values: Likewise.
    """

    keys: Num[np.ndarray, "L T K D"]
    values: Num[np.ndarray, "L T K D"]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.keys.shape[1]

    def take(self, num_tokens: int) -> "TokenKV":
        """The first tokens of it."""
        return TokenKV(self.keys[:, :num_tokens], self.values[:, :num_tokens])


class HostStore:
    """Pages by key, in the memory of the host."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._taken: dict[int, list[TakenPages]] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def save(self, cache: KVCache, saves: Iterable[PageSave]) -> None:
        """Copies pages out of the cache. Does not wait for the device."""
        for save in saves:
            taken = page_copies.take_pages(cache, save.page_ids)
            self._taken[save.key] = [_to_host(pages) for pages in taken]

    def load(self, cache: KVCache, loads: Iterable[PageLoad]) -> KVCache:
        """Writes what was saved into other pages, and forgets it. DONATES `cache`."""
        for load in loads:
            targets = {load.first + place: page for place, page in enumerate(load.page_ids)}
            taken = [_to_device(pages) for pages in self._taken.pop(load.key)]
            cache = page_copies.put_pages(cache, taken, targets)
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

    def put(self, key: int, kv: TokenKV) -> None:
        """Keeps tokens as if their pages had been saved.

        Raises:
            ValueError: they are those of another model.
        """
        layout = self._layout
        wanted = (layout.num_layers, kv.num_tokens, layout.num_kv_heads, layout.head_dim)
        dtype = np.dtype(layout.dtype)
        if not kv.keys.shape == kv.values.shape == wanted or kv.keys.dtype != dtype:
            raise ValueError(
                f"the K/V are {kv.keys.dtype}{list(kv.keys.shape)}; those of this engine's model "
                f"are {dtype}{list(wanted)} [layers, tokens, heads, head dim]: use the engine's "
                "own model and dtype"
            )
        self._taken[key] = [_to_host(write_tokens(kv, layout))]


def read_tokens(taken: Sequence[TakenPages], num_tokens: int, layout: KVLayout) -> TokenKV:
    """Waits for pages, and lays out the first tokens in them one behind the other."""
    num_pages = -(-num_tokens // layout.page_size)
    num_layers = layout.num_layers
    shape = (num_layers, num_pages, layout.num_kv_heads, layout.head_dim, layout.page_size)
    storage = kv_cache.storage_dtype(layout.dtype)
    keys: np.ndarray = np.zeros(shape, storage)
    values: np.ndarray = np.zeros((*shape[:3], *shape[:2:-1]), storage)
    for place, arrays in jax.device_get([(pages.place, pages.arrays) for pages in taken]):
        is_wanted = (place >= 0) & (place < num_pages)
        for layer in range(num_layers):
            keys[layer, place[is_wanted]] = kv_cache.turn_keys(arrays[layer])[is_wanted]
            values[layer, place[is_wanted]] = arrays[num_layers + layer][is_wanted]
    # [L, N, K, D, S] and [L, N, K, S, D] to [L, N * S, K, D]
    by_token = (num_layers, -1, layout.num_kv_heads, layout.head_dim)
    dtype = np.dtype(layout.dtype)
    return TokenKV(
        keys.transpose(0, 1, 4, 2, 3).reshape(by_token)[:, :num_tokens].astype(dtype),
        values.transpose(0, 1, 3, 2, 4).reshape(by_token)[:, :num_tokens].astype(dtype),
    )


def write_tokens(kv: TokenKV, layout: KVLayout) -> TakenPages:
    """The inverse of `read_tokens`: the pages that hold these tokens."""
    num_pages = -(-kv.num_tokens // layout.page_size)
    storage = kv_cache.storage_dtype(layout.dtype)
    padding = ((0, 0), (0, num_pages * layout.page_size - kv.num_tokens), (0, 0), (0, 0))
    shape = (layout.num_layers, num_pages, layout.page_size, layout.num_kv_heads, layout.head_dim)
    keys, values = (np.pad(x.astype(storage), padding).reshape(shape) for x in (kv.keys, kv.values))
    stored_keys = kv_cache.turn_keys(keys.transpose(0, 1, 3, 4, 2))
    arrays = [*stored_keys, *values.transpose(0, 1, 3, 2, 4)]
    # One group: its size is its own, and so is what `put_pages` compiles for it.
    return TakenPages(np.arange(num_pages), [jax.numpy.asarray(array) for array in arrays])


def _to_host(pages: TakenPages) -> TakenPages:
    return pages._replace(arrays=[_move(array, "pinned_host") for array in pages.arrays])


def _to_device(pages: TakenPages) -> TakenPages:
    return pages._replace(arrays=[_move(array, "device") for array in pages.arrays])


def _move(array: jax.Array, memory_kind: str) -> jax.Array:
    """Between the memories of an accelerator and its host; a CPU has only the one."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return array
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind=memory_kind)
    return jax.device_put(array, sharding)
