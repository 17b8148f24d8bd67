"""The position-wise feed-forward network, plain or gated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.ops.activation import geglu, gelu, swiglu
from pytransformer.ops.backend import requested_backend

from .linear import Linear


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) · up(x))`` (Shazeer 2020) with gate and up in one projection.

    Args:
        hidden_size, intermediate_size: widths outside and inside.
        activation: "relu", "gelu", "gelu_tanh", "swiglu", "geglu" or "geglu_tanh".
        bias: on both projections.
        dropout: rate after the activation, in training.

    Weights: ``up_proj`` (intermediate, hidden), or ``gate_up_proj`` (2 · intermediate, hidden) with rows [gate; up]; ``down_proj``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = dropout
        if activation in ("swiglu", "geglu", "geglu_tanh"):
            self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias, device=device, dtype=dtype)
        elif activation in ("relu", "gelu", "gelu_tanh"):
            self.up_proj = Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        else:
            raise ValueError(
                f"activation must be 'relu', 'gelu', 'gelu_tanh', 'swiglu', 'geglu' or 'geglu_tanh', got {activation!r}"
            )
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden) -> (…, hidden)."""
        inner = self._inner(x)
        if self.training and self.dropout > 0.0:
            inner = F.dropout(inner, self.dropout)
        return self.down_proj(inner)  # type: ignore[no-any-return]

    def _inner(self, x: Tensor) -> Tensor:
        if self.activation == "relu":
            return F.relu(self.up_proj(x))
        # A model under use_backend("cuda") must run, though these ops have no CUDA kernel.
        backend = "torch" if requested_backend(None) == "cuda" else None
        approximate = "tanh" if self.activation.endswith("_tanh") else "none"
        if self.activation in ("gelu", "gelu_tanh"):
            return gelu(self.up_proj(x), approximate=approximate, backend=backend)
        # Gate and up stay one tensor, and so does their gradient.
        gate_and_up: Tensor = self.gate_up_proj(x)
        if self.activation == "swiglu":
            return swiglu(gate_and_up, backend=backend)
        return geglu(gate_and_up, approximate=approximate, backend=backend)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, dropout={self.dropout}"
