"""The backward pass of attention as a registered op: of what the forward pass returned, its call, and the gradients of its outputs."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.ops.attention import by_cuda, by_torch, by_triton
from pytransformer.ops.attention.call import AttentionCall, is_empty, is_packed
from pytransformer.ops.attention.padding import padded_backward
from pytransformer.ops.backend import Backend, Outputs
from pytransformer.ops.registered import RegisteredOp, like

_BEFORE = {"dout": Tensor, "dlse": Tensor | None, "out": Tensor, "lse": Tensor}
_FIELDS = {**_BEFORE, **typing.get_type_hints(AttentionCall), "wants_bias": bool, "wants_slopes": bool}
GradientCall: Any = NamedTuple("GradientCall", list(_FIELDS.items()))  # type: ignore[misc]


def _call(gradient_call: Any) -> AttentionCall:
    return AttentionCall(*gradient_call[len(_BEFORE) : -2])


def _outputs(given: Any, backend: str) -> tuple[Any, ...]:
    bias, slopes = _wanted(given)
    return tuple(like(tensor) for tensor in (given.q, given.k, given.v, bias, given.sinks, slopes))


def _wanted(given: Any) -> tuple[Tensor | None, Tensor | None]:
    """(bias, alibi_slopes), of each None where there is none or it needs no gradient."""
    return given.bias if given.wants_bias else None, given.alibi_slopes if given.wants_slopes else None


def _of_nothing(given: Any) -> Outputs:
    bias, slopes = _wanted(given)
    differentiable = (given.q, given.k, given.v, bias, given.sinks, slopes)
    dq, dk, dv, dbias, dsinks, dslopes = (
        None if tensor is None else torch.zeros_like(tensor) for tensor in differentiable
    )
    if dsinks is not None and given.dlse is not None and given.dlse.numel() > 0:
        axes = (-1,) if is_packed(given) else (0, -1)
        dsinks = given.dlse.sum(dim=axes).to(dsinks.dtype)
    return dq, dk, dv, dbias, dsinks, dslopes


def _unless_empty(run: Callable[[Any, AttentionCall], Sequence[Tensor | None]]) -> Callable[[Any], Outputs]:
    def backward(given: Any) -> Outputs:
        gradients = _of_nothing(given) if is_empty(given) else run(given, _call(given))
        return tuple(None if gradient is None else gradient.contiguous() for gradient in gradients)

    return backward


attention_backward = RegisteredOp(
    "attention_backward",
    GradientCall,
    (
        Backend("triton", _unless_empty(padded_backward(by_triton.backward))),
        Backend("cuda", _unless_empty(padded_backward(by_cuda.backward))),
        Backend("torch", _unless_empty(by_torch.backward)),
        Backend("reference", _unless_empty(by_torch.reference_backward)),
    ),
    _outputs,
    6,
)
