"""Calls of RoPE that several test files draw."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pytransformer import rope_tables

BACKENDS = ("triton", "torch", "reference")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
ALL_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
LENGTH = 24


def draw(
    device: torch.device, dtype: torch.dtype = FLOAT32, tokens: tuple[int, ...] = (2, 6), head_dim: int = 12
) -> list[Tensor]:
    """q with 3 heads, k with 1, both requiring grad."""
    return [torch.randn(*tokens, heads, head_dim).to(device, dtype).requires_grad_() for heads in (3, 1)]


def tables(device: torch.device, rotary_dim: int = 8) -> tuple[Tensor, Tensor]:
    return rope_tables(rotary_dim, LENGTH, base=100.0, device=device)


WHERE = {
    "index": ((2, 6), {}),
    "offset": ((2, 6), {"offsets": 3}),
    "offsets": ((2, 6), {"offsets": torch.tensor([4, 18])}),
    "positions": ((2, 6), {"positions": torch.tensor([3, 1, 4, 1, 5, 23], dtype=torch.int32)}),
    "positions per sequence": ((2, 6), {"positions": torch.arange(12).view(2, 6).flip(0)}),
    "one packed sequence": ((12,), {"offsets": 2}),
    "packed": ((12,), {"cu_seqlens": torch.tensor([0, 0, 5, 5, 11, 12, 12], dtype=torch.int32)}),
    "packed, offsets": (
        (12,),
        {"cu_seqlens": torch.tensor([0, 7, 7, 12], dtype=torch.int32), "offsets": torch.tensor([9, 0, 2])},
    ),
    "packed, positions": ((12,), {"positions": torch.arange(23, 11, -1)}),
}


def place(where: dict[str, object], device: torch.device) -> dict[str, object]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in where.items()}


def results(function, tensors: list[Tensor], dtype: torch.dtype, device: torch.device, **options) -> tuple[dict, dict]:
    """Outputs, and gradients for output gradients that are the same in every dtype."""
    leaves = [tensor.detach().to(device, dtype).requires_grad_() for tensor in tensors]
    wide = torch.promote_types(dtype, FLOAT32)
    outputs = function(*leaves, *(table.to(wide) for table in tables(device)), **options)
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(out.shape, generator=generator).to(BFLOAT16).to(device, dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, drawn)
    return dict(zip(("q", "k"), outputs)), dict(zip(("dq", "dk"), gradients))
