"""Decoding with a model of Llama 8B's shape and random bfloat16 weights: tokens per second at a context that the cache already holds.

A token costs the reading of every weight but the embedding, and of the cache; so the record says how many bytes that is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytransformer import Transformer, TransformerConfig
from pytransformer.benchmarks.end_to_end import models
from pytransformer.benchmarks.harness.rows import Absent
from pytransformer.benchmarks.harness.timing import wait
from pytransformer.generation import KVCache


@dataclass(frozen=True)
class DecodingShape:
    """``batch`` sequences of ``context`` tokens each, continued by ``bursts`` × ``burst`` tokens."""

    name: str
    config: TransformerConfig
    batch: int
    context: int
    burst: int
    bursts: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def capacity(self) -> int:
        """Of the cache: two bursts more warm up."""
        return self.context + self.burst * (self.bursts + 2)

    def bytes_per_step(self) -> float:
        """Weights but the embedding, and keys and values of every layer at the beginning."""
        config = self.config
        cache = 2 * config.num_layers * self.batch * self.context * config.num_kv_heads * config.head_dim
        return float(self.dtype.itemsize * (models.matrix_weights(config) + cache))


def llama_8b(batch: int, tiny: bool) -> DecodingShape:
    """The shape of Llama 3 8B at 4k context."""
    if tiny:
        return DecodingShape("Llama tiny", models.tiny_llama(64), batch, 16, 4, 2)
    config = TransformerConfig.llama(
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=14336,
        max_seqlen=8192,
    )
    return DecodingShape("Llama 8B", config, batch, 4096, 16, 8)


Burst = Callable[[int], object]


class Decoder:
    """Our model with its own cache, whose context is random, and the newest token of each sequence."""

    def __init__(self, shape: DecodingShape, device: torch.device) -> None:
        self.model = Transformer(shape.config, device=device, dtype=shape.dtype).eval()
        self.cache = KVCache(shape.config, shape.batch, shape.capacity, device=device, dtype=shape.dtype)
        self.cache.k_cache.normal_()
        self.cache.v_cache.normal_()
        self.cache.advance(shape.context, shape.context)
        self.tokens = torch.zeros(shape.batch, dtype=torch.int64, device=device)

    def step(self) -> None:
        """Feeds the newest token and chooses the next; the cache does not count it yet."""
        hidden = self.model.model(self.tokens[:, None], cache=self.cache)
        self.tokens.copy_(self.model.lm_head(hidden[:, 0]).argmax(-1))

    def eager(self, count: int) -> None:
        for _ in range(count):
            self.step()
            self.cache.advance(1, self.cache.max_length + 1)

    def let_the_device_count(self) -> None:
        """From here on the lengths are one tensor, which :meth:`counted_step` counts up; the host only knows the largest they may reach."""
        self.cache.advance(0, self.cache.capacity - 1)

    def counted_step(self) -> None:
        """What a CUDA graph captures: everything that a step changes is changed in place."""
        self.step()
        self.cache.lengths.add_(1)


def ours(shape: DecodingShape, device: torch.device, graph: bool) -> Burst:
    """Our model, one step after another from the host, or one captured step replayed.

    Raises:
        Absent: a graph without a GPU.
    """
    if graph and device.type != "cuda":
        raise Absent("CUDA graphs need a GPU")
    decoder = Decoder(shape, device)
    if not graph:
        return decoder.eager
    # This compiles.
    decoder.eager(2)
    decoder.let_the_device_count()
    captured = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(captured):
        decoder.counted_step()

    def replay(count: int) -> None:
        for _ in range(count):
            captured.replay()

    return replay


def theirs(shape: DecodingShape, device: torch.device, compiled: bool) -> Burst:
    """transformers' model with its static cache; eager, or under torch.compile with CUDA graphs.

    Its attention reads the whole static cache behind a mask, whatever the length, so the context is not filled in.

    Raises:
        Absent: it is not installed.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            model = models.transformers_model(shape.config).eval()
    finally:
        torch.set_default_dtype(default)
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=shape.capacity)
    tokens = torch.zeros(shape.batch, 1, dtype=torch.int64, device=device)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model.forward

    def run(count: int) -> None:
        nonlocal tokens
        for _ in range(count):
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            logits: Tensor = forward(tokens, past_key_values=cache, use_cache=True).logits
            tokens = logits[:, -1:].argmax(-1).clone()

    return run


DECODERS: dict[str, tuple[Callable[[DecodingShape, torch.device, bool], Burst], bool]] = {
    "pytransformer": (ours, False),
    "pytransformer graph": (ours, True),
    "transformers": (theirs, False),
    "transformers compiled": (theirs, True),
}


@torch.no_grad()
def measure(shape: DecodingShape, decoder: str, device: torch.device) -> dict[str, Any]:
    """Tokens per second of each burst, the device waited for at its end.

    Raises:
        Absent: the decoder is not here.
    """
    models.start_afresh(device)
    make, option = DECODERS[decoder]
    run = make(shape, device, option)
    samples = []
    for index in range(shape.bursts + (1 if "graph" in decoder else 2)):
        wait(device)
        start = time.perf_counter()
        run(shape.burst)
        wait(device)
        if index >= 1:
            samples.append(shape.batch * shape.burst / (time.perf_counter() - start))
    samples = samples[-shape.bursts :]
    found: dict[str, Any] = {"samples": samples, "bytes_per_step": shape.bytes_per_step(), "context": shape.context}
    if device.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        found["gbytes_per_second"] = shape.bytes_per_step() * sorted(samples)[len(samples) // 2] / shape.batch * 1e-9
    return found
