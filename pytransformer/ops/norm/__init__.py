"""LayerNorm and RMSNorm over the last dimension, optionally of the sum with a residual. Float32 arithmetic, one rounding at the end."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from pytransformer.ops.backend import Outputs
from pytransformer.ops.norm import by_cuda, by_torch, by_triton
from pytransformer.ops.norm.call import NormCall, NormGradientCall, NormResult, check_norm
from pytransformer.ops.op import Op
from pytransformer.ops.registered import Differentiable, RegisteredOp, like


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., residual: None = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., residual: Tensor, backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., residual: Tensor | None, backend: str | None = ...,
) -> NormResult: ...  # fmt: skip
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> NormResult:
    """``(s - mean(s)) / sqrt(var(s) + eps) · weight + bias`` over the last dimension, of s = x or x + residual (Ba et al. 2016).

    The sum s is rounded to residual's dtype before it is normalised, so that the next block adds to exactly what this one has normalised.
    The variance divides by the width, not width - 1, and is taken from centred values. Differentiable once with the backends "cuda"
    and "triton"; keeps its dtype under autocast.

    Args:
        x: (..., width), float32, float16 or bfloat16 (or float64), any strides, at least one dimension. With width 0 or no rows the result
            is empty and the gradients of weight and bias are 0.
        weight, bias: (width), each of any of these dtypes; None = 1 and 0. Float32 weights with a 16-bit x are usual.
        eps: at least 0, added to the variance.
        residual: shape of x, any of these dtypes.
        backend: "cuda", "triton", "torch" or "reference"; None = the first of them that can serve, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise.

    Returns:
        y in x's shape and dtype; with a residual (y, s), s in residual's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, eps negative or not finite.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    return _LAYER_NORM((x, weight, bias, residual, eps, 0.0, False), backend)  # type: ignore[no-any-return]


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., *,
    eps: float = ..., weight_offset: float = ..., residual: None = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., *,
    eps: float = ..., weight_offset: float = ..., residual: Tensor, backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., *,
    eps: float = ..., weight_offset: float = ..., residual: Tensor | None, backend: str | None = ...,
) -> NormResult: ...  # fmt: skip
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> NormResult:
    """``s / sqrt(mean(s²) + eps) · (weight + weight_offset)`` over the last dimension, of s = x or x + residual (Zhang, Sennrich 2019).

    The sum s is rounded to residual's dtype before it is normalised. The product with the weight is taken in float32, before the only
    rounding. Differentiable once with the backends "cuda" and "triton"; keeps its dtype under autocast.

    Args:
        x: (..., width), float32, float16 or bfloat16 (or float64), any strides, at least one dimension. For QK-norm
            (..., num_heads, head_dim). With width 0 or no rows the result is empty and the gradient of weight is 0.
        weight: (width), any of these dtypes; None = no multiplication (then ``weight_offset`` has no effect).
        eps: at least 0, added to the mean square.
        weight_offset: added to the weight in float32: 1.0 for Gemma, whose weights are stored as differences from 1.
        residual: shape of x, any of these dtypes.
        backend: "cuda", "triton", "torch" or "reference"; None = the first of them that can serve, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise.

    Returns:
        y in x's shape and dtype; with a residual (y, s), s in residual's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, eps negative, eps or weight_offset not finite.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    return _RMS_NORM((x, weight, None, residual, eps, weight_offset, True), backend)  # type: ignore[no-any-return]


# --- The ops, of both norms: a forward and a backward pass, which keeps the sum (or x) and the statistics of its rows. ------------------


def _outputs(call: NormCall, backend: str) -> tuple[Any, ...]:
    rows = (call.x.shape[:-1], torch.float32)
    s = None if call.residual is None else (call.x.shape, call.residual.dtype)
    return like(call.x), s, None if call.is_rms else rows, rows


def _gradient_outputs(call: NormGradientCall, backend: str) -> tuple[Any, ...]:
    width, weight = call.s.shape[-1:], call.weight
    dweight = None if weight is None or not call.want_dweight else (width, weight.dtype)
    return like(call.s), dweight, None if call.dbias_dtype is None else (width, call.dbias_dtype)


def _save(ctx: Any, call: NormCall, outputs: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, _, ctx.weight_offset, ctx.is_rms = call
    _, s, mean, rstd = outputs
    if residual is None:
        ctx.mark_non_differentiable(s, mean, rstd)
    else:
        ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x if residual is None else s, weight, None if ctx.is_rms else mean, rstd)
    ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, run: Any, dy: Tensor | None, ds: Tensor | None, *_: Any) -> dict[str, Tensor | None]:
    s, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(s, dtype=ctx.x_dtype)
    # torch.compile brings zeros of an output that there is not, and that is empty then.
    if not ctx.has_residual:
        ds = None
    wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
    dbias_dtype = ctx.bias_dtype if wants_bias else None
    total, dweight, dbias = run(
        dy, ds, s, weight, mean, rstd, ctx.weight_offset, ctx.is_rms, wants_weight, dbias_dtype, ctx.backend
    )
    return {
        "x": total.to(ctx.x_dtype) if wants_x else None,
        "weight": dweight if wants_weight else None,
        "bias": dbias if wants_bias else None,
        "residual": total if wants_residual else None,
    }


def _result(call: NormCall, outputs: Outputs) -> Any:
    return outputs[0] if call.residual is None else outputs[:2]


_TENSORS = ("x", "weight", "bias", "residual")
_BACKENDS = (by_cuda.BACKEND, by_triton.BACKEND, by_torch.BACKEND, by_torch.REFERENCE)
_FORWARD = RegisteredOp("norm_forward", NormCall, _BACKENDS, _outputs, 4)
_BACKWARD = RegisteredOp(
    "norm_backward", NormGradientCall, (by_cuda.GRADIENTS, by_triton.GRADIENTS), _gradient_outputs, 3
)
_RULE = Differentiable(_FORWARD, _save, _gradients, _BACKWARD, "layer_norm and rms_norm")
_LAYER_NORM, _RMS_NORM = (
    Op(name, _FORWARD, check_norm, _BACKENDS, result=_result, rule=_RULE, grads=_TENSORS)
    for name in ("layer_norm", "rms_norm")
)
LAYER_NORM_CHOICE, RMS_NORM_CHOICE = _LAYER_NORM.choice, _RMS_NORM.choice
