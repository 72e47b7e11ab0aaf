"""The paged KV cache: how its pages lie in memory, and whole pages on the move."""

from folojax.kv.cache import KVCache, KVLayout, PageFormat, init_cache
from folojax.kv.placement import Placement, place_tokens

__all__ = ["KVCache", "KVLayout", "PageFormat", "Placement", "init_cache", "place_tokens"]
