"""Inference: prefill, then decoding one token per step with a KV cache."""

from .cache import KVCache
from .defaults import checkpoint_options
from .generate import generate, generate_stream
from .prepare import prepare_for_decoding, release
from .results import Generation, Step
from .sampling import Sampler

__all__ = [
    "Generation", "KVCache", "Sampler", "Step", "checkpoint_options", "generate", "generate_stream", "prepare_for_decoding", "release",
]  # fmt: skip
