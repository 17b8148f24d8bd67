"""A mixture of experts: a router, feed-forward networks that see the tokens sent to them, and the losses that balance the router.

Nothing is dropped and no expert has a capacity (Gale et al. 2022): the rows of all experts lie beside each other, and two grouped products
serve them all. Each token has exactly ``experts_per_token`` rows, so both ways, there and back, are gathers: no atomics, and the same bits
each run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.ops import checks
from pytransformer.ops.backend import requested_backend
from pytransformer.ops.grouped_linear import grouped_linear

from . import expert_loop
from .feed_forward import FeedForward, activate, check_positive, is_gated
from .linear import Linear


class Experts(nn.Module):
    """The weights of all experts, as one tensor for each projection.

    Weights: ``gate_up_proj`` (num_experts, 2 · expert, hidden) with rows [gate; up], or ``up_proj`` (num_experts, expert, hidden);
    ``down_proj`` (num_experts, hidden, expert); with ``bias`` also ``gate_up_bias`` (num_experts, 2 · expert) or ``up_bias``, and
    ``down_bias`` (num_experts, hidden).

    Args: see :class:`MixtureOfExperts`.
    """

    down_proj: Tensor
    down_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        activation_limit: float = 7.0,
        activation_alpha: float = 1.702,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.dropout, self.num_experts = activation, dropout, num_experts
        self.activation_limit = check_positive("activation_limit", activation_limit)
        self.activation_alpha = check_positive("activation_alpha", activation_alpha)
        self._first = "gate_up" if is_gated(activation) else "up"
        inner = 2 * expert_size if is_gated(activation) else expert_size
        for name, rows, columns in ((self._first, inner, hidden_size), ("down", hidden_size, expert_size)):
            weight = torch.empty(num_experts, rows, columns, device=device, dtype=dtype)
            self.register_parameter(f"{name}_proj", nn.Parameter(weight))
            vector = nn.Parameter(torch.empty(num_experts, rows, device=device, dtype=dtype)) if bias else None
            self.register_parameter(f"{name}_bias", vector)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as ``torch.nn.Linear`` begins: uniform within ± 1 / sqrt(columns)."""
        for name in (self._first, "down"):
            weight = getattr(self, f"{name}_proj")
            bound = 1 / math.sqrt(weight.shape[-1])
            for parameter in (weight, getattr(self, f"{name}_bias")):
                if parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """``Σ_j weights[t, j] · expert_{chosen[t, j]}(x[t])``.

        Args:
            x: (tokens, hidden).
            chosen: (tokens, experts_per_token) int64, experts.
            weights: (tokens, experts_per_token) float32; the sum is in float32 too, and rounded once.

        Returns:
            (tokens, hidden) in the dtype of the experts' outputs.
        """
        routing = self._sorted(chosen)
        first_weight: Tensor = getattr(self, f"{self._first}_proj")
        first_bias: Tensor | None = getattr(self, f"{self._first}_bias")
        projections = expert_loop.Projections(first_weight, first_bias, self.down_proj, self.down_bias)
        drops = self.training and self.dropout > 0.0
        if not drops and expert_loop.serves(x, weights, projections):
            activation = expert_loop.Activation(self.activation, self._activate)
            return expert_loop.run(x, weights, routing, projections, activation, _combined)
        # These ops have no CUDA kernel; a model under use_backend("cuda") must run.
        backend = "torch" if requested_backend(None) == "cuda" else None
        order, places, offsets = routing
        rows = dispatch(x, order, places)
        inner = self._activate(grouped_linear(rows, first_weight, offsets, bias=first_bias, backend=backend))
        if drops:
            inner = F.dropout(inner, self.dropout)
        y = grouped_linear(inner, self.down_proj, offsets, bias=self.down_bias, backend=backend)
        return combine(y, weights, order, places)

    def _activate(self, inner: Tensor) -> Tensor:
        return activate(inner, self.activation, self.activation_limit, self.activation_alpha)

    def _sorted(self, chosen: Tensor) -> expert_loop.Routing:
        flat = chosen.reshape(-1)
        by_expert, order = flat.sort(stable=True)
        numbers = torch.arange(flat.shape[0], device=flat.device)
        places = torch.zeros_like(order).scatter(0, order, numbers).view(chosen.shape)
        # Counted by searching what is sorted: a histogram would make the host wait for the device.
        experts = torch.arange(self.num_experts + 1, device=flat.device)
        return expert_loop.Routing(order, places, torch.searchsorted(by_expert, experts, out_int32=True))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, activation={self.activation}, dropout={self.dropout}"


class MixtureOfExperts(nn.Module):
    """Each token goes to the experts that its router prefers, and their outputs are added up by the router's weights.

    The router is a linear layer and a softmax over all experts in float32; of it the largest ``experts_per_token`` count, divided by their
    sum with ``norm_topk_prob`` (then the same as a softmax over the chosen logits alone, which is how GPT-OSS writes it). Sources: Shazeer
    et al. 2017, Jiang et al. 2024 (Mixtral).

    Args:
        hidden_size, expert_size: widths outside and inside an expert.
        num_experts, experts_per_token: how many there are, and how many of them serve a token.
        activation: as of :class:`FeedForward`.
        bias: on both projections of each expert.
        router_bias: on the router's projection.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        shared_expert_size: width of an expert that every token goes to besides; 0 = none.
        shared_expert_gate: its output times σ(x · w) (Qwen2-MoE).
        activation_limit, activation_alpha: of "swiglu_clamped".
        dropout: rate after the activation, in training.

    Weights: ``router``, a linear layer (num_experts, hidden); ``experts``, see :class:`Experts`; ``shared_expert``, a
    :class:`FeedForward`; ``shared_expert_gate``, a linear layer (1, hidden).

    Raises:
        TypeError: a size that is no int, a flag that is none.
        ValueError: a size below 1; more experts for each token than there are; a gate without a shared expert; an unknown activation.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        experts_per_token: int = 2,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        router_bias: bool = False,
        norm_topk_prob: bool = True,
        shared_expert_size: int = 0,
        shared_expert_gate: bool = False,
        activation_limit: float = 7.0,
        activation_alpha: float = 1.702,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size = checks.check_int("hidden_size", hidden_size, minimum=1)
        expert_size = checks.check_int("expert_size", expert_size, minimum=1)
        self.num_experts = checks.check_int("num_experts", num_experts, minimum=1)
        self.experts_per_token = checks.check_int(
            "experts_per_token", experts_per_token, minimum=1, maximum=self.num_experts
        )
        shared_expert_size = checks.check_int("shared_expert_size", shared_expert_size, minimum=0)
        self.norm_topk_prob = checks.check_bool("norm_topk_prob", norm_topk_prob)
        if checks.check_bool("shared_expert_gate", shared_expert_gate) and shared_expert_size == 0:
            raise ValueError("shared_expert_gate=True needs a shared expert, got shared_expert_size=0")
        shape: dict[str, Any] = {"device": device, "dtype": dtype}
        inner: dict[str, Any] = {
            "activation": activation, "bias": bias, "activation_limit": activation_limit, "activation_alpha": activation_alpha,
            "dropout": dropout,
        }  # fmt: skip
        self.router = Linear(hidden_size, self.num_experts, bias=router_bias, **shape)
        self.experts = Experts(hidden_size, expert_size, self.num_experts, **inner, **shape)
        self.shared_expert = self.shared_expert_gate = None
        if shared_expert_size > 0:
            self.shared_expert = FeedForward(hidden_size, shared_expert_size, **inner, **shape)
        if shared_expert_gate:
            self.shared_expert_gate = Linear(hidden_size, 1, bias=False, **shape)

    def forward(self, x: Tensor, *, router_logits: list[Tensor] | None = None) -> Tensor:
        """(…, hidden) -> (…, hidden).

        Args:
            x: (…, hidden).
            router_logits: a list to which the router's logits, (tokens, num_experts), are appended, for the losses.
        """
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)
        if router_logits is not None:
            router_logits.append(logits)
        weights, chosen = self.route(logits)
        out = self.experts(tokens, chosen, weights)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
            out = out + shared
        return out.view(x.shape)  # type: ignore[no-any-return]

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits (tokens, num_experts) the weights, at least float32, and the experts, int64: (tokens, experts_per_token) both."""
        weights, chosen = _probabilities(logits).topk(self.experts_per_token, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen

    def extra_repr(self) -> str:
        return f"experts_per_token={self.experts_per_token}, norm_topk_prob={self.norm_topk_prob}"


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


# --- There and back. autograd knows of no index that it is a permutation: of a gather it would make an addition into zeros. ---------------


class _Dispatch(torch.autograd.Function):
    """(tokens, hidden) to (tokens · experts_per_token, hidden), by expert; the gradient of a token is the sum of those of its rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        return x.index_select(0, order // places.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return F.embedding_bag(places, gradients[0], mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """(rows, hidden) by expert to (tokens, hidden): the rows of each token times its weights, added up in float32."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, weights: Tensor, order: Tensor, places: Tensor) -> Tensor:
        return _combined(y, weights, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, order, places = ctx.saved_tensors
        rows = gradients[0].to(weights.dtype).index_select(0, order // places.shape[1])
        dweights = (rows * y.to(weights.dtype)).sum(dim=-1)
        dy = rows * weights.reshape(-1).index_select(0, order)[:, None]
        return dy.to(y.dtype), dweights.index_select(0, places.reshape(-1)).view(places.shape), None, None


# torch's apply has no types.
dispatch: Callable[..., Tensor] = _Dispatch.apply
combine: Callable[..., Tensor] = _Combine.apply


def _combined(y: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    if y.dtype == weights.dtype:
        return F.embedding_bag(places, y, mode="sum", per_sample_weights=weights)
    total = torch.zeros((), dtype=weights.dtype, device=y.device)
    for place, weight in zip(places.unbind(1), weights.unbind(1)):
        total = total + y.index_select(0, place) * weight[:, None]
    return total.to(y.dtype)


# --- Losses -----------------------------------------------------------------------------------------------------------------------------


def load_balancing_loss(router_logits: Sequence[Tensor], experts_per_token: int, mask: Tensor | None = None) -> Tensor:
    """``E · Σ_e f_e · P_e``, the mean over layers: experts_per_token if all experts are chosen equally often, E · P_e of one chosen alone.

    With f_e the number of times that expert e is chosen, for each token, and P_e its mean probability (Fedus et al. 2021, summed over the
    choices of a token as transformers has it). transformers' Mixtral takes f and P over the tokens of all layers at once, where an expert
    that one layer prefers and another avoids looks balanced; here each layer has a loss of its own. With one layer they are the same.

    Args:
        router_logits: of each layer (tokens, num_experts), before the softmax.
        experts_per_token: how many are chosen.
        mask: as many elements as tokens, True or 1 where a token counts; None = all.

    Returns:
        A scalar, at least float32. NaN if no token counts.

    Raises:
        ValueError: no layers, logits or a mask whose shapes do not fit, more experts chosen than there are.
    """
    losses = []
    for probabilities, counts in _by_layer(router_logits, mask):
        num_experts = probabilities.shape[-1]
        checks.check_int("experts_per_token", experts_per_token, minimum=1, maximum=num_experts)
        chosen = probabilities.topk(experts_per_token, dim=-1).indices
        is_chosen = torch.zeros_like(probabilities).scatter(1, chosen, 1.0)
        total = counts.sum()
        frequency = (is_chosen * counts).sum(dim=0) / total
        losses.append(num_experts * (frequency * ((probabilities * counts).sum(dim=0) / total)).sum())
    return torch.stack(losses).mean()


def router_z_loss(router_logits: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """The mean over tokens and layers of ``(log Σ_e exp logits_e)²``, which keeps the logits small (Zoph et al. 2022).

    Args, Returns, Raises: as of :func:`load_balancing_loss`.
    """
    losses = []
    for logits, (probabilities, counts) in zip(router_logits, _by_layer(router_logits, mask)):
        squares = logits.to(probabilities.dtype).logsumexp(dim=-1, keepdim=True).square()
        losses.append((squares * counts).sum() / counts.sum())
    return torch.stack(losses).mean()


def _by_layer(router_logits: Sequence[Tensor], mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Of each layer the probabilities (tokens, num_experts), and (tokens, 1) 1 where a token counts, else 0."""
    if len(router_logits) == 0:
        raise ValueError("router_logits must hold the logits of at least one layer, got none")
    found = []
    for layer, logits in enumerate(router_logits):
        name = f"router_logits[{layer}]"
        checks.check_tensor(name, logits, ndim=2, dtypes=checks.FLOAT_DTYPES_AND_DOUBLE, layout="(tokens, num_experts)")
        if mask is not None and mask.numel() != logits.shape[0]:
            raise ValueError(
                f"mask must have an element for each of the {logits.shape[0]} tokens of {name}, got shape {tuple(mask.shape)}"
            )
        probabilities = _probabilities(logits)
        counts = probabilities.new_ones(logits.shape[0]) if mask is None else mask.reshape(-1).to(probabilities)
        found.append((probabilities, counts[:, None]))
    return found
