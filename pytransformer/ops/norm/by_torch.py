"""The norms by torch's own, on operands of one dtype, which compute in float32 and round once, and by the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.backend import Backend, Outputs, always, is_plain
from pytransformer.ops.norm.call import NormCall
from pytransformer.ops.precision import is_autocasting
from pytransformer.ops.registered import records_backward


def _norm(call: NormCall) -> Outputs:
    """y and s. The statistics stay with autograd, which differentiates torch's own functions."""
    x, weight, bias, residual = call.x, call.weight, call.bias, call.residual
    # 16-bit sums are computed in float32 and rounded once by torch itself.
    s = x if residual is None else (x + residual).to(residual.dtype)
    if weight is not None and call.weight_offset != 0.0:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + call.weight_offset
    dtype = x.dtype
    mixed = s.dtype != dtype or any(vector is not None and vector.dtype != dtype for vector in (weight, bias))
    # On a CPU torch sums the gradients of 16-bit weights in 16 bits, which loses them: off by 0.5 where the sum of 600 rows is 25.
    inaccurate = dtype.itemsize == 2 and x.device.type == "cpu" and torch.is_grad_enabled()
    if mixed or inaccurate:
        dtypes = [tensor.dtype for tensor in (s, weight, bias) if tensor is not None]
        wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
        weight, bias = (None if vector is None else vector.to(wide) for vector in (weight, bias))
        y = _norm_of_one_dtype(call, s.to(wide), weight, bias).to(dtype)
    else:
        y = _norm_of_one_dtype(call, s, weight, bias)
    return y, None if residual is None else s, None, None


def _norm_of_one_dtype(call: NormCall, s: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    width = s.shape[-1:]
    if not call.is_rms:
        return F.layer_norm(s, width, weight, bias, call.eps)
    trains = torch.is_grad_enabled() and (s.requires_grad or (weight is not None and weight.requires_grad))
    if trains and s.device.type == "cpu" and s.numel() > 0 and is_plain(s, weight):
        y: Tensor = _CpuRmsNorm.apply(s, weight, call.eps)[0]  # type: ignore[no-untyped-call]
        return y
    return F.rms_norm(s, width, weight, call.eps)


class _CpuRmsNorm(torch.autograd.Function):
    """RMSNorm for training on a CPU, float32 or float64: torch has no fused one there, and its composite takes twice as long."""

    @staticmethod
    def forward(s: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
        rstd = norm.square_().div_(s.shape[-1]).add_(eps).rsqrt_()
        y = s * rstd
        return y if weight is None else y.mul_(weight), rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        s, weight, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(s, weight, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:  # whoever used y has no gradient for it, like a reentrant checkpoint that only looks at it
            return None, None, None
        s, weight, rstd = ctx.saved_tensors
        if records_backward():
            # A derivative of the gradient is wanted: torch's own composite has one.
            wanted = [tensor for tensor in (s, weight) if tensor is not None and tensor.requires_grad]
            gradients = iter(
                torch.autograd.grad(F.rms_norm(s, s.shape[-1:], weight, ctx.eps), wanted, dy, create_graph=True)
            )
            needed = [tensor is not None and tensor.requires_grad for tensor in (s, weight)]
            ds, dweight = (next(gradients) if need else None for need in needed)
            return ds, dweight, None
        width = s.shape[-1]
        xhat = (s * rstd).reshape(-1, width)
        dy = dy.reshape(-1, width)
        weighted = dy * xhat
        dweight = weighted.sum(dim=0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        # g · xhat summed over each row, with g = dy · weight
        row_sums = weighted.sum(dim=1) if weight is None else torch.mv(weighted, weight)
        g = dy if weight is None else dy * weight
        ds = torch.addcmul(g, xhat, row_sums.div_(width)[:, None], value=-1).mul_(rstd.view(-1, 1))
        return ds.view(s.shape), dweight, None


def _norm_by_reference(call: NormCall) -> Outputs:
    x, weight, bias, residual, eps, weight_offset, is_rms = call
    if is_rms:
        found = reference.rms_norm(x, weight, eps=eps, weight_offset=weight_offset, residual=residual)
    else:
        found = reference.layer_norm(x, weight, bias, eps=eps, residual=residual)
    y, s = found if isinstance(found, tuple) else (found, None)
    return y, s, None, None


def _plan(call: NormCall) -> Callable[[NormCall], Tensor | tuple[Tensor, Tensor]]:
    """All that a kept launch spares is the checks."""
    options = call[_NUM_TENSORS:]

    def launch(given: NormCall) -> Any:
        # The hall keeps launches of norms under autocast too, which would turn the results of torch's norms to float32.
        if is_autocasting(given[0].device.type):
            with torch.autocast(given[0].device.type, enabled=False):
                return launch(given)
        y, s, *_ = _norm(NormCall(*given[:_NUM_TENSORS], *options))  # type: ignore[arg-type]
        return y if s is None else (y, s)

    return launch


_NUM_TENSORS = NormCall._fields.index("eps")
BACKEND = Backend("torch", _norm, plan=_plan, is_transparent=always)
REFERENCE = Backend("reference", _norm_by_reference, is_transparent=always)
