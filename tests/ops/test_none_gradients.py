"""A gradient that is None, as of an output whose user (a reentrant checkpoint, an op without one for it) sends nothing back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pytransformer
from pytransformer.ops import op as hall
from pytransformer.ops import overview  # noqa: F401 (imports every op)
from tests.ops.attention_cases import qkv

BACKENDS = ("reference", "torch", "triton")


class Send(torch.autograd.Function):
    """The sum of some tensors; sends a gradient to those that are named, and None to the rest."""

    @staticmethod
    def forward(ctx: Any, reaches: tuple[bool, ...], *tensors: Tensor) -> Tensor:
        ctx.reaches, ctx.likes = reaches, [torch.empty_like(tensor) for tensor in tensors]
        return torch.stack([tensor.double().sum() for tensor in tensors]).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = zip(ctx.reaches, ctx.likes)
        return None, *(
            torch.ones_like(like) * gradients[0].to(like.dtype) if reaches else None for reaches, like in found
        )


@dataclass(frozen=True)
class Differentiated:
    """A call whose outputs have gradients.

    Attributes:
        rules: names of the registered ops whose rule it takes.
        inputs: draws what is differentiated.
        call: of the inputs and a backend, its outputs.
        backends: that serve it.
    """

    rules: tuple[str, ...]
    inputs: Callable[[], dict[str, Tensor]]
    call: Callable[..., tuple[Tensor, ...]]
    backends: tuple[str, ...] = BACKENDS


def loss(reduction: str) -> Callable[..., tuple[Tensor, ...]]:
    targets = torch.tensor([1, 2, 0, 4])
    return lambda backend, **tensors: (
        pytransformer.linear_cross_entropy(
            **tensors, targets=targets.to(tensors["x"].device), reduction=reduction, backend=backend
        ),
    )


def head() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 16), "weight": torch.randn(9, 16), "bias": torch.randn(9)}


def rotate(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    cos, sin = (table.to(q.device) for table in pytransformer.rope_tables(8, 6))
    rotated_q, rotated_k = pytransformer.rope(q, k, cos, sin, backend=backend)
    assert rotated_k is not None
    return rotated_q, rotated_k


def norm(name: str) -> Callable[..., tuple[Tensor, ...]]:
    function: Callable[..., Any] = getattr(pytransformer, name)

    def call(backend: str, **tensors: Tensor) -> tuple[Tensor, ...]:
        found = function(**tensors, backend=backend)
        return found if isinstance(found, tuple) else (found,)

    return call


def linear(backend: str, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    found: Any = pytransformer.linear_attention(q, k, v, decay=decay[: k.shape[2]], return_state=True, backend=backend)
    return found[0], *found[1]


CALLS = {
    "attention": Differentiated(
        ("attention_forward",),
        lambda: {**qkv(1, 5, 6), "bias": torch.randn(5, 6), "alibi_slopes": torch.rand(2), "sinks": torch.randn(2)},
        lambda backend, **tensors: pytransformer.attention(**tensors, return_lse=True, backend=backend),
        ("reference", "triton"),
    ),
    "attention without lse": Differentiated(
        ("attention_forward",),
        lambda: qkv(1, 5, 6),
        lambda backend, **tensors: (pytransformer.attention(**tensors, backend=backend),),
    ),
    "layer_norm": Differentiated(
        ("norm_forward",),
        lambda: {"x": torch.randn(4, 16), "weight": torch.randn(16), "bias": torch.randn(16), "residual": torch.randn(4, 16)},
        norm("layer_norm"),
    ),
    "rms_norm": Differentiated(
        ("norm_forward",),
        lambda: {"x": torch.randn(4, 16), "weight": torch.randn(16), "residual": torch.randn(4, 16)},
        norm("rms_norm"),
    ),
    "rms_norm without a residual": Differentiated(
        ("norm_forward",), lambda: {"x": torch.randn(4, 16), "weight": torch.randn(16)}, norm("rms_norm")
    ),
    "rope": Differentiated(("rope",), lambda: {"q": torch.randn(1, 6, 2, 16), "k": torch.randn(1, 6, 1, 16)}, rotate),
    "swiglu": Differentiated(
        ("activation_forward",),
        lambda: {"gate": torch.randn(4, 16), "up": torch.randn(4, 16)},
        lambda backend, **tensors: (pytransformer.swiglu(**tensors, backend=backend),),
    ),
    "grouped_linear": Differentiated(
        ("grouped_linear_forward",),
        lambda: {"x": torch.randn(6, 16), "weight": torch.randn(3, 8, 16), "bias": torch.randn(3, 8)},
        lambda backend, **tensors: (
            pytransformer.grouped_linear(
                **tensors, offsets=torch.tensor([0, 2, 2, 6], dtype=torch.int32, device=tensors["x"].device), backend=backend
            ),
        ),
    ),
    "quantized_linear": Differentiated(
        ("quantized_linear_forward",),
        lambda: {"x": torch.randn(6, 16), "bias": torch.randn(8)},
        lambda backend, **tensors: (
            pytransformer.quantized_linear(
                **tensors, weight=torch.ones(8, 16, dtype=torch.int8, device=tensors["x"].device),
                scale=torch.ones(8, device=tensors["x"].device), backend=backend,
            ),
        ),
    ),
    "linear_attention": Differentiated(
        ("linear_attention",), lambda: {**qkv(1, 5, 5), "decay": torch.rand(2)}, linear, ("torch", "triton")
    ),
    "linear_cross_entropy": Differentiated(("linear_cross_entropy_total",), head, loss("mean")),
    "linear_cross_entropy, none": Differentiated(("linear_cross_entropy_losses",), head, loss("none")),
}  # fmt: skip
PLACES = [
    pytest.param(name, backend, id=f"{name}-{backend}") for name, call in CALLS.items() for backend in call.backends
]


def test_every_rule_is_here() -> None:
    """What the hall has learned to differentiate since must be tried too."""
    rules = {op.registered.name for op in hall._EVERY if op.rule is not None}
    assert rules == {rule for call in CALLS.values() for rule in call.rules}


def leaves(call: Differentiated, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.to(device).requires_grad_() for name, tensor in call.inputs().items()}


@pytest.mark.parametrize(("name", "backend"), PLACES)
def test_a_gradient_that_is_none_counts_as_none_at_all(name: str, backend: str, device: torch.device) -> None:
    """Of each output in turn: the inputs get the gradients of the other outputs alone, as if this one had not been used."""
    call = CALLS[name]
    count = len(call.call(backend, **leaves(call, device)))
    for dropped in range(count):
        reaches = tuple(index != dropped for index in range(count))
        sent, alone = leaves(call, device), leaves(call, device)
        Send.apply(reaches, *call.call(backend, **sent)).backward()
        outputs = call.call(backend, **alone)
        used = [output.double().sum() for output, want in zip(outputs, reaches) if want]
        if used:
            torch.stack(used).sum().backward()
        for key, leaf in sent.items():
            expected = alone[key].grad
            if expected is None:
                assert leaf.grad is None or not leaf.grad.any(), key
            else:
                assert leaf.grad is not None, key
                torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize(("name", "backend"), PLACES)
def test_a_reentrant_checkpoint_that_only_looks_at_the_result(name: str, backend: str, device: torch.device) -> None:
    """No gradient flows into the op, and the other way into the leaf keeps its own."""
    call = CALLS[name]
    tensors = leaves(call, device)
    first = next(iter(tensors.values()))
    inner = first * 1.0
    outputs = call.call(backend, **tensors)

    def look(inner: Tensor, *outputs: Tensor) -> Tensor:
        return inner * sum(torch.sigmoid(output.detach().float()).mean() for output in outputs)

    result = checkpoint(look, inner, *outputs, use_reentrant=True)
    result.sum().backward()
    factor = sum(torch.sigmoid(output.detach().float()).mean() for output in outputs)
    torch.testing.assert_close(first.grad, torch.ones_like(first) * factor)
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in list(tensors.values())[1:])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_second_derivative_that_nobody_asks_for_is_not_refused(backend: str, device: torch.device) -> None:
    """With create_graph the backward pass is recorded; a None that reaches it is no second derivative."""
    q, k, v = leaves(CALLS["attention without lse"], device).values()
    gradient = torch.autograd.grad(pytransformer.attention(q, k, v, backend=backend).sum(), q, create_graph=True)[0]
    Send.apply((False, True), gradient, q * 2).backward()
    torch.testing.assert_close(q.grad, torch.full_like(q, 2.0))
