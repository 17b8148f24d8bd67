"""Inference: prefill, then decoding one token per step with a KV cache."""

from .cache import KVCache
from .generate import Generation, Step, generate
from .prepare import prepare_for_decoding, release
from .sampling import Sampler

__all__ = ["Generation", "KVCache", "Sampler", "Step", "generate", "prepare_for_decoding", "release"]
