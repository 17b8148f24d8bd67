"""Weights in four bits with a common power of two for each 32 of them (Open Compute Project, Microscaling Formats, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # numbers with one scale, in 16 bytes

# What the eight codes without a sign mean (E2M1); those from 8 on are their negatives.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CODES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
# Groups that are unpacked at a time: what lies between is eight times as large as the bytes.
_CHUNK = 1 << 16


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Numbers of blocks of four bits, in bfloat16, which holds them exactly (above its range they are infinite).

    Args:
        blocks: (…, groups, 16) uint8, two codes in a byte, the lower half first.
        scales: (…, groups) uint8, exponents of two with an offset of 127. All are numbers: 255, which the standard takes for NaN, is 2^128
            in GPT-OSS.

    Returns:
        (…, 32 · groups) bfloat16.

    Raises:
        TypeError: a dtype other than uint8.
        ValueError: shapes that do not fit.
    """
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8, got {tensor.dtype}")
    if blocks.shape != (*scales.shape, GROUP // 2):
        raise ValueError(
            f"blocks must be (…, groups, {GROUP // 2}) and scales (…, groups), got {tuple(blocks.shape)} and {tuple(scales.shape)}"
        )
    # A byte's two numbers lie side by side as one element of 32 bits, so that one look-up writes both. They are doubled and the powers of
    # two halved: 2^128 is none of bfloat16's, 2^127 is, and zero times it stays zero.
    pairs = [[2.0 * _CODES[byte & 15], 2.0 * _CODES[byte >> 4]] for byte in range(256)]
    table = torch.tensor(pairs, dtype=torch.bfloat16, device=blocks.device).view(torch.int32).flatten()
    powers = torch.tensor([2.0 ** (byte - 128) for byte in range(256)], dtype=torch.bfloat16, device=blocks.device)
    out = torch.empty(*scales.shape, GROUP, dtype=torch.bfloat16, device=blocks.device)
    parts = (
        torch.split(tensor, _CHUNK)
        for tensor in (out.view(-1, GROUP), blocks.reshape(-1, GROUP // 2), scales.reshape(-1))
    )
    for numbers, codes, exponents in zip(*parts):
        doubled = table[codes.int()].view(torch.bfloat16)
        torch.mul(doubled, powers[exponents.int()].unsqueeze(-1), out=numbers)
    return out.flatten(-2)
