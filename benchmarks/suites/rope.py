"""RoPE on q and k in one launch, against torch.compile of the usual formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.rows import Row
from pytransformer.benchmarks.suites.common import no_grad, normal, ours

# (tokens, q heads, kv heads, head_dim)
SHAPES = ((8192, 32, 8, 128), (32768, 32, 8, 128))
TINY = ((32, 4, 2, 32),)


def rows(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Out of place, half layout."""
    for shape in TINY if tiny else SHAPES:
        yield _row(device, *shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _row(device: torch.device, tokens: int, heads: int, kv_heads: int, dim: int) -> Row:
    def draw(device: torch.device, seed: int) -> dict[str, Any]:
        cos, sin = pytransformer.rope_tables(dim, tokens, device=device)
        return {
            "q": normal(device, 2 * seed, 1, tokens, heads, dim),
            "k": normal(device, 2 * seed + 1, 1, tokens, kv_heads, dim),
            "cos": cos,
            "sin": sin,
        }

    variants: dict[str, Any] = {
        backend: no_grad(lambda inputs, backend=backend: pytransformer.rope(**inputs, backend=backend))
        for backend in ours(device)
    }
    if device.type == "cuda":
        compiled = torch.compile(_plain, dynamic=False)
        variants["torch_compile"] = no_grad(lambda inputs: compiled(**inputs))
    else:
        variants["plain"] = no_grad(lambda inputs: _plain(**inputs))

    def golden(inputs: dict[str, Any]) -> Tensor:
        return _rotate(inputs["k"].double(), inputs["cos"].double(), inputs["sin"].double())

    moved = 2.0 * 2 * tokens * (heads + kv_heads) * dim + 4.0 * tokens * dim
    return Row(
        "rope_forward",
        f"{tokens} tokens H{heads}+{kv_heads} d{dim} bf16",
        0.0,
        moved,
        draw,
        variants,
        golden,
        lambda out: out[1],
    )
