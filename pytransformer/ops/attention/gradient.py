"""The backward pass of attention as a registered op: of what the forward pass returned, its call, and the gradients of its outputs."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.ops.attention import by_cuda, by_torch, by_triton
from pytransformer.ops.attention.call import AttentionCall, is_empty, is_packed
from pytransformer.ops.backend import Backend, Outputs
from pytransformer.ops.registered import RegisteredOp, like

_BEFORE = {"dout": Tensor, "dlse": Tensor | None, "out": Tensor, "lse": Tensor}
_FIELDS = {**_BEFORE, **typing.get_type_hints(AttentionCall), "wants_bias": bool}
GradientCall: Any = NamedTuple("GradientCall", list(_FIELDS.items()))  # type: ignore[misc]


def _call(gradient_call: Any) -> AttentionCall:
    return AttentionCall(*gradient_call[len(_BEFORE) : -1])


def _outputs(given: Any, backend: str) -> tuple[Any, ...]:
    bias = given.bias if given.wants_bias else None
    return tuple(like(tensor) for tensor in (given.q, given.k, given.v, bias, given.sinks))


def _of_nothing(given: Any) -> Outputs:
    differentiable = (given.q, given.k, given.v, given.bias if given.wants_bias else None)
    gradients = [None if tensor is None else torch.zeros_like(tensor) for tensor in differentiable]
    if given.sinks is None:
        return (*gradients, None)
    if given.dlse is None or given.dlse.numel() == 0:
        return (*gradients, torch.zeros_like(given.sinks))
    axes = (-1,) if is_packed(given) else (0, -1)
    return (*gradients, given.dlse.sum(dim=axes).to(given.sinks.dtype))


def _unless_empty(run: Callable[[Any, AttentionCall], Sequence[Tensor | None]]) -> Callable[[Any], Outputs]:
    def backward(given: Any) -> Outputs:
        gradients = _of_nothing(given) if is_empty(given) else run(given, _call(given))
        return tuple(None if gradient is None else gradient.contiguous() for gradient in gradients)

    return backward


attention_backward = RegisteredOp(
    "attention_backward",
    GradientCall,
    (
        Backend("triton", _unless_empty(by_triton.backward)),
        Backend("cuda", _unless_empty(by_cuda.backward)),
        Backend("torch", _unless_empty(by_torch.backward)),
        Backend("reference", _unless_empty(by_torch.reference_backward)),
    ),
    _outputs,
    5,
)
