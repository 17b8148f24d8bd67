"""LayerNorm and RMSNorm in plain PyTorch, with the residual addition that precedes them in a transformer block.

Sources: Ba et al. 2016 (LayerNorm), Zhang and Sennrich 2019 (RMSNorm); Gemma's weight is an offset from 1.

16-bit inputs are normalised in float32 and rounded once, at the end; float64 stays float64. With a residual, the sum
s = x + residual is first rounded to the residual's dtype and returned, and y normalises that rounded s: what the next block
adds to is then exactly what this one has normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(s - mean) / sqrt(var + eps) · weight + bias over the last dimension, with s = x, or x + residual if that is given.

    Args:
        x: (..., width).
        weight, bias: (width), any floating dtype; None = 1 and 0.
        eps: added to the variance (which divides by width, not width - 1).
        residual: like x; its dtype may be wider.

    Returns:
        y in x's shape and dtype; with a residual (y, s), s in the residual's dtype.
    """
    total, values = _add_residual(x, residual)
    centred = values - values.mean(dim=-1, keepdim=True)
    normalised = centred / torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        normalised = normalised * weight.to(values.dtype)
    if bias is not None:
        normalised = normalised + bias.to(values.dtype)
    y = normalised.to(x.dtype)
    return y if residual is None else (y, total)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """s / sqrt(mean(s²) + eps) · (weight + weight_offset) over the last dimension, with s = x, or x + residual if given.

    Args:
        x: (..., width). For QK-norm (..., num_heads, head_dim): every head is normalised by itself.
        weight: (width), any floating dtype; None = no multiplication.
        eps: added to the mean square.
        weight_offset: 1.0 for Gemma, whose weights are stored as differences from 1.
        residual: like x; its dtype may be wider.

    Returns:
        y in x's shape and dtype; with a residual (y, s), s in the residual's dtype.
    """
    total, values = _add_residual(x, residual)
    normalised = values / torch.sqrt((values * values).mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        normalised = normalised * (weight.to(values.dtype) + weight_offset)
    y = normalised.to(x.dtype)
    return y if residual is None else (y, total)


def _add_residual(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """s in its own dtype, and s widened to the dtype of the arithmetic."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if residual is None:
        return x, x.to(wide)
    wide = torch.promote_types(wide, residual.dtype)
    total = (x.to(wide) + residual.to(wide)).to(residual.dtype)
    return total, total.to(wide)
