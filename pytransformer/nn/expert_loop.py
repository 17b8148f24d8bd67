"""Experts on a CPU, one after another: what an expert needs stays in the caches from its first product to its last.

The grouped way makes each step for all experts before the next, so that between two products tensors of all rows go to memory and come
back, fresh pages each time. A CPU has no reason to: its products of one expert's rows are as fast as those of all. Here an expert's rows
are gathered, multiplied, activated and multiplied again, and the backward pass goes through it likewise; the activation's result is made
again there instead of kept. Each product is written where it belongs: no gradient as large as all experts for each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pytransformer.ops.backend import is_plain, requested_backend
from pytransformer.ops.precision import is_autocasting

Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


class Routing(NamedTuple):
    """Which rows the experts have.

    Attributes:
        order: int64 (rows), of each row, by expert, its place among all (token, choice).
        places: int64 (tokens, experts_per_token), of each (token, choice) its row.
        offsets: int32 (num_experts + 1), the first row of each expert, and the number of rows.
    """

    order: Tensor
    places: Tensor
    offsets: Tensor

    @property
    def tokens(self) -> Tensor:
        """int64 (rows), the token of each row."""
        return self.order // self.places.shape[1]


class Activation(NamedTuple):
    """A name of :func:`pytransformer.nn.feed_forward.activate`, and what a call of it makes of a tensor."""

    name: str
    activate: Callable[[Tensor], Tensor]


class Projections(NamedTuple):
    """The experts' weights (num_experts, rows, columns) and biases (num_experts, rows)."""

    first: Tensor
    first_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def serves(x: Tensor, weights: Tensor, projections: Projections) -> bool:
    """Whether the loop may be taken: eager tensors of a CPU, all of one dtype, that no transform, mode or autocast has a say in."""
    if x.device.type != "cpu" or requested_backend(None) not in (None, "torch", "cuda") or is_autocasting("cpu"):
        return False
    same = all(each is None or each.dtype == x.dtype for each in projections)
    return same and is_plain(x, weights, *projections)


def run(
    x: Tensor, weights: Tensor, routing: Routing, projections: Projections, activation: Activation, combine: Combine
) -> Tensor:
    """``combine`` of all experts' outputs.

    Args:
        x: (tokens, hidden).
        weights: (tokens, experts_per_token).
        routing: who goes where.
        projections: of one dtype with x; see :func:`serves`.
        activation: between the projections.
        combine: of (rows, hidden), weights and ``routing.places``, the sums (tokens, hidden).
    """
    result: Tensor = _Loop.apply(x, weights, *projections, routing, activation, combine)  # type: ignore[no-untyped-call]
    return result


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, first: Tensor, first_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
        routing: Routing, activation: Activation, combine: Combine,
    ) -> Tensor:  # fmt: skip
        keeps = any(ctx.needs_input_grad)
        tokens = routing.tokens
        y = x.new_empty(tokens.shape[0], down.shape[1])
        # A tensor for each expert, as large as the allocator takes from what it holds: one for all would be of new pages each time.
        kept = []
        for expert, rows in _experts(routing.offsets):
            hidden = _linear(x.index_select(0, tokens[rows]), first, first_bias, expert)
            _linear(activation.activate(hidden), down, down_bias, expert, out=y[rows])
            if keeps:
                kept.append(hidden)
        ctx.save_for_backward(x, weights, first, first_bias, down, down_bias, y if keeps else None, *kept)
        ctx.routing, ctx.activation = routing, activation
        return combine(y, weights, routing.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        x, weights, first, first_bias, down, down_bias, y, *kept = ctx.saved_tensors
        order, places, offsets = ctx.routing
        tokens = ctx.routing.tokens
        wants_x, wants_weights, *wants = ctx.needs_input_grad[:6]
        wide = weights.dtype
        factors = weights.reshape(-1).index_select(0, order)[:, None]
        dx = x.new_empty(tokens.shape[0], x.shape[1]) if wants_x else None
        dfactors = weights.new_empty(tokens.shape[0]) if wants_weights else None
        found = [
            torch.empty_like(each) if want else None for each, want in zip((first, first_bias, down, down_bias), wants)
        ]
        dfirst, dfirst_bias, ddown, ddown_bias = found
        _zero_those_without_rows(found, offsets)
        for (expert, rows), hidden in zip(_experts(offsets), kept):
            token = tokens[rows]
            weighted = dout.index_select(0, token).to(wide)
            if dfactors is not None:
                torch.sum(weighted * y[rows].to(wide), dim=-1, out=dfactors[rows])
            dy = weighted.mul_(factors[rows]).to(y.dtype)
            active, dhidden = activation_and_gradient(hidden, dy @ down[expert], ctx.activation)
            _gradients(dy, active, ddown, ddown_bias, expert)
            if dfirst is not None or dfirst_bias is not None:
                _gradients(dhidden, x.index_select(0, token), dfirst, dfirst_bias, expert)
            if dx is not None:
                torch.mm(dhidden, first[expert], out=dx[rows])
        if dx is not None:
            dx = F.embedding_bag(places, dx, mode="sum")
        if dfactors is not None:
            dfactors = dfactors.index_select(0, places.reshape(-1)).view(places.shape)
        return dx, dfactors, *found, None, None, None


def activation_and_gradient(hidden: Tensor, dactive: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """What the activation makes of ``hidden``, and the gradient of ``hidden``; overwrites ``dactive``."""
    if activation.name != "swiglu":
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            active = activation.activate(leaf)
        return active.detach(), torch.autograd.grad(active, leaf, dactive)[0]
    # As autograd has it, but written into the halves of one tensor, which it would put together in another.
    gate, up = hidden.chunk(2, dim=-1)
    activated, dhidden = F.silu(gate), torch.empty_like(hidden)
    dgate, dup = dhidden.chunk(2, dim=-1)
    torch.mul(dactive, activated, out=dup)
    torch.ops.aten.silu_backward.grad_input(dactive.mul_(up), gate, grad_input=dgate)
    return activated.mul_(up), dhidden


def _zero_those_without_rows(gradients: list[Tensor | None], offsets: Tensor) -> None:
    for expert in (offsets.diff() == 0).nonzero().flatten().tolist():
        for gradient in gradients:
            if gradient is not None:
                gradient[expert].zero_()


def _experts(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with them."""
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if start < end:
            yield expert, slice(start, end)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, out: Tensor | None = None) -> Tensor:
    transposed = weight[expert].t()
    return torch.mm(x, transposed, out=out) if bias is None else torch.addmm(bias[expert], x, transposed, out=out)


def _gradients(dy: Tensor, x: Tensor, dweight: Tensor | None, dbias: Tensor | None, expert: int) -> None:
    if dweight is not None:
        torch.mm(dy.t(), x, out=dweight[expert])
    if dbias is not None:
        torch.sum(dy, dim=0, out=dbias[expert])
