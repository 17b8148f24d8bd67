"""Decode attention: one new query per sequence against a contiguous or paged bfloat16 cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.rows import Row
from pytransformer.benchmarks.suites.common import generator, no_grad, normal, ours

# (batch, keys, q heads, kv heads, head_dim, page size; 0 = contiguous)
SHAPES = (
    (64, 4096, 32, 8, 128, 0),
    (1, 32768, 32, 8, 128, 0),
    (1, 1024, 32, 8, 128, 0),
    (64, 4096, 32, 8, 128, 16),
    (64, 4096, 32, 8, 128, 256),
)
TINY = ((2, 128, 4, 2, 32, 0), (2, 128, 4, 2, 32, 16))

Shape = tuple[int, int, int, int, int, int]


def rows(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Contiguous caches first, then paged."""
    for shape in TINY if tiny else SHAPES:
        yield _row(device, shape)


def _inputs(shape: Shape) -> Any:
    batch, keys, heads, kv_heads, dim, page_size = shape

    def draw(device: torch.device, seed: int) -> dict[str, Any]:
        cache_shape = (
            (batch, keys, kv_heads, dim) if not page_size else (batch * keys // page_size, page_size, kv_heads, dim)
        )
        inputs: dict[str, Any] = {
            "q": normal(device, 3 * seed, batch, 1, heads, dim),
            "k_cache": normal(device, 3 * seed + 1, *cache_shape),
            "v_cache": normal(device, 3 * seed + 2, *cache_shape),
            "cache_seqlens": torch.full((batch,), keys, dtype=torch.int32, device=device),
        }
        if page_size:
            pages = torch.randperm(cache_shape[0], device=device, generator=generator(device, seed))
            inputs["block_table"] = pages.view(batch, -1).to(torch.int32)
        return inputs

    return draw


def _sequence(inputs: dict[str, Any], cache: str) -> Tensor:
    """Keys or values of the first sequence's first kv head, in order."""
    if "block_table" in inputs:
        return inputs[cache][inputs["block_table"][0].long()].flatten(0, 1)[:, 0]
    return inputs[cache][0, :, 0]


def _golden(inputs: dict[str, Any]) -> Tensor:
    q, k, v = (
        inputs["q"][0, 0, 0].double(),
        _sequence(inputs, "k_cache").double(),
        _sequence(inputs, "v_cache").double(),
    )
    return (k @ q / math.sqrt(q.shape[0])).softmax(0) @ v


def _sdpa(inputs: dict[str, Any]) -> Tensor:
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k_cache", "v_cache"))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def _row(device: torch.device, shape: Shape) -> Row:
    batch, keys, heads, kv_heads, dim, page_size = shape
    variants: dict[str, Any] = {
        backend: no_grad(lambda inputs, backend=backend: pytransformer.decode_attention(**inputs, backend=backend))
        for backend in ours(device)
    }
    if not page_size:
        variants["sdpa"] = no_grad(_sdpa)
    label = f"B{batch} kv{keys} H{heads}/{kv_heads} d{dim} bf16 " + (
        f"pages of {page_size}" if page_size else "contiguous"
    )
    flop = 4.0 * batch * heads * keys * dim
    moved = 2.0 * batch * dim * (2 * keys * kv_heads + 2 * heads)
    return Row(
        "decode_attention", label, flop, moved, _inputs(shape), variants, _golden, lambda out: out[0, 0, 0], "read"
    )
