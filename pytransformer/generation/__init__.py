"""Inference: prefill, then decoding one token per step with a KV cache."""

from .beams import BeamOptions
from .caches import KVCache, NotEnoughMemory, PagedCache, PoolExhausted, Prefix, make_cache, predict_bytes
from .chat import Chat, ContextFull, Turn
from .defaults import checkpoint_options
from .drafts import DraftModel, PromptLookup
from .engine import Engine, Event, Request, Statistics
from .generate import generate, generate_stream
from .kept import KeptCache
from .prepare import prepare_for_decoding, release
from .results import Generation, Step
from .sampling import Sampler

__all__ = [
    "BeamOptions",
    "Chat",
    "ContextFull",
    "DraftModel",
    "Engine",
    "Event",
    "Generation",
    "KVCache",
    "KeptCache",
    "NotEnoughMemory",
    "PagedCache",
    "PoolExhausted",
    "Prefix",
    "PromptLookup",
    "Request",
    "Sampler",
    "Statistics",
    "Step",
    "Turn",
    "checkpoint_options",
    "generate",
    "generate_stream",
    "make_cache",
    "predict_bytes",
    "prepare_for_decoding",
    "release",
]
