"""Inference: prefill, then decoding one token per step with a KV cache."""

from .caches import KVCache, NotEnoughMemory, PagedCache, PoolExhausted, Prefix, make_cache, predict_bytes
from .defaults import checkpoint_options
from .engine import Engine, Event, Request, Statistics
from .generate import generate, generate_stream
from .prepare import prepare_for_decoding, release
from .results import Generation, Step
from .sampling import Sampler

__all__ = [
    "Engine",
    "Event",
    "Generation",
    "KVCache",
    "NotEnoughMemory",
    "PagedCache",
    "PoolExhausted",
    "Prefix",
    "Request",
    "Sampler",
    "Statistics",
    "Step",
    "checkpoint_options",
    "generate",
    "generate_stream",
    "make_cache",
    "predict_bytes",
    "prepare_for_decoding",
    "release",
]
