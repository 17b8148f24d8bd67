"""GELU and the gated activations of feed-forward networks, in plain PyTorch.

Sources: Hendrycks and Gimpel 2016 (GELU and its tanh form), Shazeer 2020 (SwiGLU, GEGLU).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) · up with silu(x) = x / (1 + exp(-x)).

    Args:
        gate: (..., width); without ``up`` (..., 2 · width), whose last dimension holds [gate; up].
        up: like gate.

    Returns:
        (..., width) in gate's dtype.
    """
    gate, up = _halves(gate, up)
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """gelu(gate) · up.

    Args:
        gate, up: as in :func:`swiglu`.
        approximate: as in :func:`gelu`.

    Returns:
        (..., width) in gate's dtype.
    """
    gate, up = _halves(gate, up)
    return F.gelu(gate, approximate=approximate) * up


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x · Φ(x), Φ the normal distribution's cumulative function.

    Args:
        x: any shape.
        approximate: "none": Φ(x) = (1 + erf(x / √2)) / 2; "tanh": Φ(x) ≈ (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2.

    Returns:
        A tensor like x.
    """
    return F.gelu(x, approximate=approximate)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return first, second
