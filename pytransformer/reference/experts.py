"""A mixture of experts in the place of a feed-forward network, naive: a loop over the experts.

Sources: Shazeer et al. 2017 (sparsely gated experts), Fedus et al. 2021 (Switch: the balancing loss), Zoph et al. 2022 (ST-MoE: the
router's z-loss), Jiang et al. 2024 (Mixtral: softmax, top-k, renormalised), Qwen2-MoE (a shared expert with a gate of its own).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .feed_forward import FeedForward, activate, is_gated


class ExpertWeights(nn.Module):
    """The weights of all experts, stacked: (experts, out, in) matrices and (experts, out) biases, named as in the fused model."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.expert_size
        first, rows = ("gate_up", 2 * width) if is_gated(config.activation) else ("up", width)
        self.first = first
        shapes: dict[str, tuple[int, ...]] = {
            f"{first}_proj": (experts, rows, hidden),
            "down_proj": (experts, hidden, width),
        }
        if config.mlp_bias:
            shapes |= {f"{first}_bias": (experts, rows), "down_bias": (experts, hidden)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def of(self, layer: str, expert: int) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out) or None of one expert's layer, "first" or "down"."""
        layer = self.first if layer == "first" else layer
        bias = getattr(self, f"{layer}_bias", None)
        return getattr(self, f"{layer}_proj")[expert], None if bias is None else bias[expert]


class Experts(nn.Module):
    """Each token goes to the experts_per_token experts that the router likes best, and their outputs are added by weight::

        p = softmax(W x + b) in float32;   y = Σ_{e in top-k of p} w_e · expert_e(x)  (+ shared expert)

    with w_e = p_e, divided by the sum of the chosen p_e if ``norm_topk_prob``. A shared expert is a feed-forward network that every token
    passes; with ``shared_expert_gate`` its output is multiplied by σ(g·x). No token is dropped.

    Parameters: router (experts, hidden); experts.gate_up_proj or up_proj, experts.down_proj and biases (:class:`ExpertWeights`);
    shared_expert, shared_expert_gate (1, hidden).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=config.router_bias)
        self.experts = ExpertWeights(config)
        if config.shared_expert_size:
            self.shared_expert = FeedForward(config, config.shared_expert_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, seqlen, hidden) -> the same, and the router's logits (batch, seqlen, experts) for the losses below."""
        logits = self.router(x)
        weights, chosen = route(logits, self.config.experts_per_token, renormalise=self.config.norm_topk_prob)
        y = torch.zeros_like(x)
        for expert in range(self.config.num_experts):
            # 0 for the tokens that did not choose this expert: what it says of them is computed and thrown away.
            weight = (weights * (chosen == expert)).sum(dim=-1, keepdim=True)
            y = y + weight.to(x.dtype) * self.run(expert, x)
        if self.config.shared_expert_size:
            shared = self.shared_expert(x)
            y = y + (torch.sigmoid(self.shared_expert_gate(x)) * shared if self.config.shared_expert_gate else shared)
        return y, logits

    def run(self, expert: int, x: Tensor) -> Tensor:
        """One expert: a feed-forward network."""
        config = self.config
        inner = nn.functional.linear(x, *self.experts.of("first", expert))
        inner = activate(config.activation, inner, limit=config.activation_limit, alpha=config.activation_alpha)
        inner = torch.dropout(inner, config.feed_forward_dropout, self.training)
        return nn.functional.linear(inner, *self.experts.of("down", expert))


def route(logits: Tensor, experts_per_token: int, *, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the chosen experts, both (..., experts_per_token); the weights float32 (float64 for float64)."""
    weights, chosen = probabilities(logits).topk(experts_per_token, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True) if renormalise else weights, chosen


def probabilities(logits: Tensor) -> Tensor:
    """The router's softmax, at least in float32."""
    return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def load_balancing_loss(
    router_logits: Sequence[Tensor], experts_per_token: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Mean over the layers of E · Σ_e f_e · P_e, E the number of experts: smallest where the load is even.

    f_e is the number of times that tokens chose expert e, divided by the number of tokens, and P_e the mean of its probability. Even
    routing gives ``experts_per_token``, all tokens to the same experts up to E. Each layer is judged by itself: taken together, opposite
    imbalances of two layers would cancel. f_e has no gradient.

    Args:
        router_logits: for each sparse layer (batch, seqlen, experts) or (tokens, experts).
        experts_per_token: k.
        attention_mask: (batch, seqlen), True or 1 = a real token; padding does not count.
    """
    losses = []
    for logits in router_logits:
        logits = _of_real_tokens(logits, attention_mask)
        p = probabilities(logits)
        _, chosen = route(logits, experts_per_token, renormalise=False)
        num_experts = logits.shape[-1]
        f = torch.stack([(chosen == expert).sum() for expert in range(num_experts)]).to(p.dtype) / len(logits)
        losses.append(num_experts * (f * p.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def router_z_loss(router_logits: Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """Mean over the layers, and over the tokens, of (log Σ_e exp(logit_e))², which keeps the router's logits small.

    Args:
        router_logits, attention_mask: as in :func:`load_balancing_loss`.
    """
    losses = []
    for logits in router_logits:
        logits = _of_real_tokens(logits, attention_mask)
        lse = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        losses.append((lse * lse).mean())
    return torch.stack(losses).mean()


def _of_real_tokens(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(tokens, experts)."""
    logits = logits.flatten(0, -2)
    return logits if attention_mask is None else logits[attention_mask.flatten().bool()]
