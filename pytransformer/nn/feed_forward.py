"""The position-wise feed-forward network, plain or gated, and the activations that it shares with experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.ops import checks
from pytransformer.ops.activation import geglu, gelu, swiglu
from pytransformer.ops.backend import requested_backend

from .linear import Linear

PLAIN_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped")


def is_gated(activation: str) -> bool:
    """Whether an activation takes [gate; up]; ValueError for an unknown one."""
    if activation not in (*PLAIN_ACTIVATIONS, *GATED_ACTIVATIONS):
        names = ", ".join(map(repr, (*PLAIN_ACTIVATIONS, *GATED_ACTIVATIONS)))
        raise ValueError(f"activation must be one of {names}, got {activation!r}")
    return activation in GATED_ACTIVATIONS


def activate(x: Tensor, activation: str, limit: float = 7.0, alpha: float = 1.702) -> Tensor:
    """What a feed-forward network does between its projections.

    =================  ==============================================================================================
    "relu"             max(x, 0)
    "gelu"             x · Φ(x); "gelu_tanh": its tanh form
    "silu"             x · σ(x)
    "swiglu"           silu(gate) · up; "geglu", "geglu_tanh", "reglu": with gelu and relu (Shazeer 2020)
    "swiglu_clamped"   (up + 1) · gate · σ(alpha · gate), gate at most ``limit``, up within ± ``limit`` (GPT-OSS)
    =================  ==============================================================================================

    Args:
        x: (…, width), or for a gated activation (…, 2 · width), [gate; up].
        activation: a name of the table, which :func:`is_gated` checks.
        limit, alpha: of "swiglu_clamped".

    Returns:
        (…, width).
    """
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    if activation in ("reglu", "swiglu_clamped"):
        gate, up = x.chunk(2, dim=-1)
        if activation == "reglu":
            return F.relu(gate) * up
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(alpha * gate))
    # A model under use_backend("cuda") must run, though these ops have no CUDA kernel.
    backend = "torch" if requested_backend(None) == "cuda" else None
    if activation == "swiglu":
        return swiglu(x, backend=backend)
    approximate = "tanh" if activation.endswith("_tanh") else "none"
    return (gelu if activation.startswith("gelu") else geglu)(x, approximate=approximate, backend=backend)


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) · up(x))`` (Shazeer 2020) with gate and up in one projection.

    Args:
        hidden_size, intermediate_size: widths outside and inside.
        activation: "relu", "gelu", "gelu_tanh", "silu", or gated: "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped"; see
            :func:`activate`.
        bias: on both projections.
        dropout: rate after the activation, in training.
        activation_limit, activation_alpha: of "swiglu_clamped".

    Weights: ``up_proj`` (intermediate, hidden), or ``gate_up_proj`` (2 · intermediate, hidden) with rows [gate; up]; ``down_proj``.

    Raises:
        ValueError: an unknown activation; a limit or alpha that is not above 0.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        activation_limit: float = 7.0,
        activation_alpha: float = 1.702,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.activation_limit = check_positive("activation_limit", activation_limit)
        self.activation_alpha = check_positive("activation_alpha", activation_alpha)
        self.dropout = dropout
        if is_gated(activation):
            # Gate and up stay one tensor, and so does their gradient.
            self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias, device=device, dtype=dtype)
        else:
            self.up_proj = Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden) -> (…, hidden)."""
        projection = self.gate_up_proj if self.activation in GATED_ACTIVATIONS else self.up_proj
        inner = activate(projection(x), self.activation, self.activation_limit, self.activation_alpha)
        if self.training and self.dropout > 0.0:
            inner = F.dropout(inner, self.dropout)
        return self.down_proj(inner)  # type: ignore[no-any-return]

    def product(self, *, packed: bool = True) -> Callable[[Tensor], Tensor] | None:
        """:meth:`forward` in evaluation mode as a function that checks nothing, with the weights of this moment (:meth:`Linear.product`).

        ``None`` for a gated network, and where something else stands in the place of a projection.
        """
        if (
            self.activation in GATED_ACTIVATIONS
            or type(self.up_proj) is not Linear
            or type(self.down_proj) is not Linear
        ):
            return None
        up = self.up_proj.product(self.activation, packed=packed)
        down = self.down_proj.product(packed=packed)
        return lambda x: down(up(x))

    def extra_repr(self) -> str:
        return f"activation={self.activation}, dropout={self.dropout}"


def check_positive(name: str, value: float) -> float:
    """A finite number above 0 as Python's; ValueError otherwise."""
    checked = checks.check_float(name, value)
    if checked <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return checked
