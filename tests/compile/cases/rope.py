"""What of RoPE is compiled in the gate: both layouts, each way to say where a token stands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from tests.support.launchers import rope_rotate


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch of every shipped configuration, for the compile gate."""

    def rotate(dtype: torch.dtype, heads: tuple[int, int], head_dim: int, rotary_dim: int, **options: object) -> object:
        q, k = (torch.empty(2, 8, count, head_dim, dtype=dtype) if count else None for count in heads)
        table = torch.empty(64, rotary_dim // 2)
        return rope_rotate(q, k, table, table, **options)  # type: ignore[arg-type]

    def packed() -> object:
        q, table = torch.empty(16, 32, 128, dtype=torch.bfloat16), torch.empty(64, 64)
        bounds = torch.zeros(3, dtype=torch.int32)
        return rope_rotate(q, q[:, :8].clone(), table, table, cu_seqlens=bounds, offsets=bounds[:2])

    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    case = functools.partial
    yield "rope-half-32/8x128-bfloat16", case(rotate, bfloat16, (32, 8), 128, 128)
    yield "rope-half-32/8x128-bfloat16-reverse", case(rotate, bfloat16, (32, 8), 128, 128, reverse=True)
    yield "rope-half-32/8x128-bfloat16-inplace", case(rotate, bfloat16, (32, 8), 128, 128, inplace=True)
    yield "rope-interleaved-32/8x128-bfloat16", case(rotate, bfloat16, (32, 8), 128, 128, interleaved=True)
    yield "rope-half-12/12x64-float16", case(rotate, float16, (12, 12), 64, 64)
    yield "rope-interleaved-12/12x64-float16", case(rotate, float16, (12, 12), 64, 64, interleaved=True)
    yield "rope-half-32/8x128-float32", case(rotate, float32, (32, 8), 128, 128)
    yield "rope-half-16/8x256-bfloat16", case(rotate, bfloat16, (16, 8), 256, 256)
    yield "rope-half-32/32x80-bfloat16-partial", case(rotate, bfloat16, (32, 32), 80, 32)
    yield "rope-half-32/32x96-bfloat16", case(rotate, bfloat16, (32, 32), 96, 96)
    yield "rope-half-16/0x64-bfloat16", case(rotate, bfloat16, (16, 0), 64, 64)
    yield (
        "rope-half-32/8x128-bfloat16-positions",
        case(rotate, bfloat16, (32, 8), 128, 128, positions=torch.zeros(2, 8, dtype=torch.int64)),
    )
    yield "rope-half-32/8x128-bfloat16-packed", packed
