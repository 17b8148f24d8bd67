"""A linear layer whose weight is held as 8- or 4-bit codes, in plain PyTorch.

Sources: Dettmers et al. 2022, LLM.int8() (a scale for each row of the weight); Frantar et al. 2022, GPTQ (4-bit codes with a scale and a
zero point for each group of columns).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dequantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The weight (out_features, in_features) that codes stand for: (code - zero_point) · scale.

    Args:
        weight, scale, zero_point: as of :func:`quantized_linear`.
        dtype: in which it is computed and returned; by default that of ``scale``.
    """
    scale = scale.to(dtype or scale.dtype)
    if weight.dtype == torch.int8:
        return weight.to(scale.dtype) * scale[:, None]
    rows, groups = scale.shape
    parts = weight.view(rows, groups, -1)
    codes = torch.cat((parts & 15, parts >> 4), dim=-1).to(scale.dtype)  # (out_features, groups, group_size)
    zero = 8 if zero_point is None else zero_point[:, :, None].to(scale.dtype)
    return ((codes - zero) * scale[:, :, None]).flatten(1)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x times the transpose of the weight that the codes stand for, plus bias.

    Args:
        x: (…, in_features).
        weight: int8 (out_features, in_features): codes -128 to 127; or uint8 (out_features, in_features / 2): two codes 0 to 15 a byte. Of
            each group of ``group_size`` columns, byte j holds column j in its low half and column j + group_size / 2 in its high one.
        scale: floats (out_features) for int8; (out_features, in_features / group_size) for 4 bits.
        zero_point: uint8 (out_features, in_features / group_size), 0 to 15: the code that means 0; ``None`` = 8. None with int8.
        bias: (out_features).

    Returns:
        (…, out_features) in x's dtype.
    """
    return F.linear(x, dequantize(weight, scale, zero_point, x.dtype), bias)
