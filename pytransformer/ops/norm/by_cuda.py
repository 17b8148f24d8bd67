"""The norms by the CUDA extension's ops, which check their arguments themselves: lean ones for inference, and two that train."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pytransformer import extension
from pytransformer.ops.backend import Backend, Limit, Outputs
from pytransformer.ops.norm.call import NormCall, NormGradientCall, NormResult, no_float64_at_all


@functools.cache
def _op(name: str) -> Any:
    # What OpOverload.__call__ calls: a tenth of the time of a small call is in that step.
    return extension.op(name)._op


def _run(call: NormCall) -> Outputs:
    y, s, mean, rstd = _op("norm_forward")(*call)
    return y, None if call.residual is None else s, None if call.is_rms else mean, rstd


def _gradients(call: NormGradientCall) -> Outputs:
    dy, ds, s, weight, mean, rstd, *options = call
    found: Outputs = _op("norm_backward")(dy, ds, s, weight, rstd if mean is None else mean, rstd, *options)
    return found


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, weight_offset: float, is_rms: bool
) -> NormResult:  # fmt: skip
    result: NormResult
    if is_rms and residual is None:
        result = _op("rms_norm")(x, weight, eps, weight_offset)
    elif is_rms:
        result = _op("add_rms_norm")(x, residual, weight, eps, weight_offset)
    elif residual is None:
        result = _op("layer_norm")(x, weight, bias, eps)
    else:
        result = _op("add_layer_norm")(x, residual, weight, bias, eps)
    return result


def _fake_norm(x: Tensor, *others: Any) -> Tensor:
    for other in others:
        if isinstance(other, Tensor) and other.device != x.device:
            # A tensor on the meta device among real ones brings the call here.
            raise RuntimeError("all tensors must be on the device of the first")
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_add_norm(x: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _fake_norm(x, residual, *others), torch.empty(x.shape, dtype=residual.dtype, device=x.device)


def _fake_forward(
    x: Tensor, weight: Any, bias: Any, residual: Tensor | None, eps: float, weight_offset: float, is_rms: bool
) -> tuple[Tensor, ...]:
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    s = rstd.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    mean = rstd.new_empty(0) if is_rms else torch.empty_like(rstd)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), s, mean, rstd


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    _, _, s, weight, _, rstd, _, _, want_dweight, dbias_dtype = args
    width, none = s.shape[-1], rstd.new_empty(0)
    dweight = none if weight is None or not want_dweight else rstd.new_empty(width, dtype=weight.dtype)
    dbias = rstd.new_empty(0) if dbias_dtype is None else rstd.new_empty(width, dtype=dbias_dtype)
    return torch.empty(s.shape, dtype=s.dtype, device=s.device), dweight, dbias


for _name, _function in (
    ("layer_norm", _fake_norm),
    ("rms_norm", _fake_norm),
    ("add_layer_norm", _fake_add_norm),
    ("add_rms_norm", _fake_add_norm),
    ("norm_forward", _fake_forward),
    ("norm_backward", _fake_backward),
):
    extension.register_fake(_name, _function)

BACKEND = Backend("cuda", _run, (Limit("float64", no_float64_at_all),), direct=_norm)
GRADIENTS = Backend("cuda", _gradients)
