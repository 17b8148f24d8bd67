"""A linear layer for each group of rows, in plain PyTorch: what the experts of a mixture compute.

Source: Gale et al. 2022, MegaBlocks (experts without a capacity: groups of any size, none dropped).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Rows ``offsets[g]`` to ``offsets[g + 1]`` of x times the transpose of ``weight[g]``, plus ``bias[g]``.

    Args:
        x: (total, in_features), the rows of a group beside each other.
        weight: (groups, out_features, in_features), dtype of x.
        offsets: int32 (groups + 1), from 0 to total, never decreasing; a group may be empty.
        bias: (groups, out_features), dtype of x.

    Returns:
        (total, out_features) in x's dtype.
    """
    bounds = itertools.pairwise(offsets.tolist())
    biases = itertools.repeat(None) if bias is None else bias
    return torch.cat([F.linear(x[start:end], w, b) for (start, end), w, b in zip(bounds, weight, biases)])
