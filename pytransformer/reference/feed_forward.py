"""The feed-forward network of a transformer block, naive: two linear layers and a nonlinearity, applied to every position by itself.

Sources: Vaswani et al. 2017 (ReLU), Hendrycks and Gimpel 2016 (GELU), Shazeer 2020 (gated variants), gpt-oss (the clamped SwiGLU).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def activate(name: str, x: Tensor, *, limit: float = 7.0, alpha: float = 1.702) -> Tensor:
    """The nonlinearity of a feed-forward network. A gated one takes [gate; up] and gives activation(gate) · up.

    ``limit`` and ``alpha`` are those of "swiglu_clamped": (up + 1) · gate · σ(alpha · gate), gate at most and |up| at most ``limit``.
    """
    if name == "relu":
        return x.clamp(min=0)
    if name == "gelu":  # x · Φ(x), Φ the normal distribution function
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":  # GPT-2's approximation of it
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "silu":
        return x * torch.sigmoid(x)
    gate, up = x.chunk(2, dim=-1)
    if name == "swiglu":
        return activate("silu", gate) * up
    if name == "geglu":
        return activate("gelu", gate) * up
    if name == "geglu_tanh":
        return activate("gelu_tanh", gate) * up
    if name == "reglu":
        return activate("relu", gate) * up
    if name == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    raise ValueError(
        "activation must be relu, gelu, gelu_tanh, silu, swiglu, geglu, geglu_tanh, reglu or swiglu_clamped, "
        f"got {name!r}"
    )


def is_gated(activation: str) -> bool:
    """Whether the activation takes [gate; up], twice its output's width."""
    return "glu" in activation


class FeedForward(nn.Module):
    """down_proj(activation(up_proj(x))): two linear layers applied to every position by itself.

    Parameters: up_proj (intermediate, hidden), or for gated activations gate_up_proj (2 · intermediate, hidden) with rows
    [gate; up]; down_proj (hidden, intermediate). ``intermediate_size`` is the configuration's unless given.
    """

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        intermediate = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gated = is_gated(config.activation)
        if self.gated:
            self.gate_up_proj = nn.Linear(config.hidden_size, 2 * intermediate, bias=config.mlp_bias)
        else:
            self.up_proj = nn.Linear(config.hidden_size, intermediate, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        inner = self.gate_up_proj(x) if self.gated else self.up_proj(x)
        inner = activate(config.activation, inner, limit=config.activation_limit, alpha=config.activation_alpha)
        inner = torch.dropout(inner, config.feed_forward_dropout, self.training)
        return self.down_proj(inner)  # type: ignore[no-any-return]
