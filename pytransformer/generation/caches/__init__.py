"""KV caches: contiguous or in pages, plain or quantised, and prompts whose cache is kept on disk."""

from .contiguous import KVCache
from .make import make_cache
from .paged import PagedCache
from .pool import PagePool, PoolExhausted
from .prefix import Prefix
from .sequence import SequenceCache
from .sizes import KINDS, CacheSize, NotEnoughMemory, predict, predict_bytes

__all__ = [
    "KINDS",
    "CacheSize",
    "KVCache",
    "NotEnoughMemory",
    "PagePool",
    "PagedCache",
    "PoolExhausted",
    "Prefix",
    "SequenceCache",
    "make_cache",
    "predict",
    "predict_bytes",
]
