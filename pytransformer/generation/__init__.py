"""Inference: prefill, then decoding one token per step with a KV cache."""

from .caches import KVCache, NotEnoughMemory, PagedCache, PoolExhausted, Prefix, make_cache, predict_bytes
from .generate import Generation, Step, generate
from .prepare import prepare_for_decoding, release
from .sampling import Sampler

__all__ = [
    "Generation",
    "KVCache",
    "NotEnoughMemory",
    "PagedCache",
    "PoolExhausted",
    "Prefix",
    "Sampler",
    "Step",
    "generate",
    "make_cache",
    "predict_bytes",
    "prepare_for_decoding",
    "release",
]
