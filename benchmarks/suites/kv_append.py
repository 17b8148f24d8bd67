"""KV-cache append: decode-size appends with RoPE and QK-norm fused, and a long prefill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.rows import Row
from pytransformer.benchmarks.suites.common import no_grad, normal, ours

# (batch, new tokens, kv heads, head_dim, fused)
SHAPES = ((64, 1, 8, 128, True), (1, 1, 8, 128, True), (4, 4096, 8, 128, False))
TINY = ((2, 1, 2, 32, True), (2, 8, 2, 32, False))
Q_HEADS_PER_KV = 4


def rows(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Decode sizes first."""
    for shape in TINY if tiny else SHAPES:
        yield _row(device, *shape)


def _index_put(inputs: dict[str, Any]) -> Tensor:
    """What PyTorch does in two launches: an indexed write each for keys and values (no RoPE, no norm)."""
    batch, tokens = inputs["k"].shape[:2]
    sequences = torch.arange(batch, device=inputs["k"].device)[:, None]
    slots = inputs["cache_seqlens"][:, None] + torch.arange(tokens, device=inputs["k"].device)
    inputs["k_cache"].index_put_((sequences, slots), inputs["k"])
    inputs["v_cache"].index_put_((sequences, slots), inputs["v"])
    return inputs["v_cache"]


def _row(device: torch.device, batch: int, tokens: int, kv_heads: int, dim: int, fused: bool) -> Row:
    capacity = 2 * tokens + 64

    def draw(device: torch.device, seed: int) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "k": normal(device, 5 * seed, batch, tokens, kv_heads, dim),
            "v": normal(device, 5 * seed + 1, batch, tokens, kv_heads, dim),
            "k_cache": normal(device, 5 * seed + 2, batch, capacity, kv_heads, dim),
            "v_cache": normal(device, 5 * seed + 3, batch, capacity, kv_heads, dim),
            "cache_seqlens": torch.arange(batch, device=device, dtype=torch.int32) % 17,
        }
        if fused:
            cos, sin = pytransformer.rope_tables(dim, capacity, device=device)
            weight = torch.ones(dim, device=device, dtype=inputs["k"].dtype)
            q = normal(device, 5 * seed + 4, batch, tokens, kv_heads * Q_HEADS_PER_KV, dim)
            inputs.update(q=q, cos=cos, sin=sin, q_norm_weight=weight, k_norm_weight=weight)
        return inputs

    def append(backend: str) -> Any:
        def call(inputs: dict[str, Any]) -> Tensor:
            pytransformer.kv_append(**inputs, backend=backend)
            return inputs["v_cache"]

        return no_grad(call)

    def golden(inputs: dict[str, Any]) -> Tensor:
        cache = inputs["v_cache"].double()
        for sequence, start in enumerate(inputs["cache_seqlens"].tolist()):
            cache[sequence, start : start + tokens] = inputs["v"][sequence].double()
        return cache

    variants: dict[str, Any] = {backend: append(backend) for backend in ours(device)}
    variants["index_put"] = no_grad(_index_put)
    heads = 2 * kv_heads + (kv_heads * Q_HEADS_PER_KV if fused else 0)
    label = f"B{batch} {tokens} tokens Hkv{kv_heads} d{dim} bf16" + (" with RoPE and QK-norm" if fused else "")
    notes = {"index_put": "writes only, without RoPE and QK-norm"} if fused else {}
    moved = 2.0 * 2 * batch * tokens * heads * dim
    return Row("kv_append", label, 0.0, moved, draw, variants, golden, lambda cache: cache, notes=notes)
