"""Cross-entropy of a linear head without its logits.

A sum or mean computes the gradients along with the losses: 6·T·H·V FLOP for T tokens, H features and V words, and of memory one chunk's
logits and the weight's gradient in float32. How: chunks.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.ops.backend import Outputs
from pytransformer.ops.linear_cross_entropy import by_torch, by_triton
from pytransformer.ops.linear_cross_entropy.call import GradientCall, LossesCall, TotalCall, check_loss
from pytransformer.ops.op import Op
from pytransformer.ops.registered import Differentiable, RegisteredOp, like

REDUCTIONS = ("mean", "sum", "none")
SCALED_AT_ONCE = 2**26  # elements of a gradient


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the logits ``softcap(x Wᵀ + bias)`` against ``targets``, the logits never materialised as a whole.

    With lse = log Σ exp(logits), the loss of one token is
    ``(1 - label_smoothing) · (lse - logits[target]) + label_smoothing · mean(lse - logits) + z_loss · lse²``.
    Differentiable once with respect to x, weight and bias; the gradient of the weight is accumulated in float32.

    Args:
        x: (..., hidden_size), float32, float16 or bfloat16 (or float64); last dimension contiguous. Under autocast x, weight and bias are
            cast to its dtype, as for a linear layer.
        weight: (vocab_size, hidden_size), dtype of x; last dimension contiguous.
        targets: int64 or int32 (...), token ids below vocab_size, or ``ignore_index``.
        bias: (vocab_size), dtype of x.
        ignore_index: targets of this value have loss 0 and gradient 0 and do not count in the mean.
        label_smoothing: 0 to 1, probability spread evenly over the vocabulary (Szegedy et al. 2016), as in ``F.cross_entropy``.
        softcap: c > 0 replaces a logit s by c · tanh(s / c) (Gemma 2).
        z_loss: weight, at least 0, of lse², which keeps the logits from drifting (Chowdhery et al. 2022).
        reduction: "mean" over the tokens that are not ignored; "sum"; "none". If all are ignored or there are none, the mean is NaN, as in
            ``F.cross_entropy``, and the gradients are 0.
        backend: "triton", "torch" or "reference"; None = Triton on a GPU and torch elsewhere, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise. Where targets out of range are not looked for (on a GPU), Triton gives NaN for them.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or with reduction "none" the shape of targets.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or strides that do not fit, targets out of range (on a CPU, or with PYTRANSFORMER_DEBUG=1), options out
            of range, an unknown reduction.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    tensors, options = (x, weight, targets, bias), (ignore_index, label_smoothing, softcap, z_loss)
    if reduction == "none":
        return _LOSSES((*tensors, *options), backend)  # type: ignore[no-any-return]
    given = (*tensors, _is_wanted(x), _is_wanted(weight), _is_wanted(bias), *options)
    return (_MEAN if reduction == "mean" else _SUM)(given, backend)  # type: ignore[no-any-return]


def _is_wanted(tensor: Any) -> bool:
    """Whether the gradient is to be computed along with the loss; inside torch.func a tensor does not always know."""
    if not isinstance(tensor, Tensor):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and tensor.requires_grad


# --- The loss of each token; its gradient is not known before the backward pass, which computes the logits again. -----------------------


def _losses_outputs(call: LossesCall, backend: str) -> tuple[Any, ...]:
    return ((call.targets.shape, torch.promote_types(call.x.dtype, torch.float32)),)


def _gradient_outputs(call: GradientCall, backend: str) -> tuple[Any, ...]:
    dtype = call.x.dtype
    return (
        like(call.x) if call.want_dx else None,
        (call.weight.shape, dtype) if call.want_dweight else None,
        (call.weight.shape[:1], dtype) if call.want_dbias else None,
    )


def _save_call(ctx: Any, call: LossesCall, outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*call[:4])
    ctx.options = call[4:]


def _losses_gradients(ctx: Any, run: Any, dlosses: Tensor) -> dict[str, Tensor | None]:
    wants_x, wants_weight, _, wants_bias = ctx.needs_input_grad[:4]
    wanted = (wants_x, wants_weight, wants_bias)
    return _named(run(dlosses, *ctx.saved_tensors, *wanted, *ctx.options, ctx.backend), wanted)


def _named(gradients: Outputs, wanted: tuple[bool, ...]) -> dict[str, Tensor | None]:
    return {name: grad for name, grad, want in zip(("x", "weight", "bias"), gradients, wanted) if want}


# --- Their sum: the gradients come in the same pass, unscaled so that float16 does not underflow. ---------------------------------------


def _total_outputs(call: TotalCall, backend: str) -> tuple[Any, ...]:
    wide = torch.promote_types(call.x.dtype, torch.float32)
    return (
        ((), wide),
        like(call.x) if call.want_dx else None,
        (call.weight.shape, wide) if call.want_dweight else None,
        (call.weight.shape[:1], wide) if call.want_dbias else None,
    )


def _save_gradients(ctx: Any, call: TotalCall, outputs: tuple[Tensor, ...]) -> None:
    gradients = outputs[1:]
    ctx.mark_non_differentiable(*gradients)
    # The inputs only to see a second derivative coming.
    ctx.save_for_backward(*gradients, call.x, call.weight, call.bias)
    ctx.wanted = call[4:7]


def _total_gradients(ctx: Any, run: Any, dtotal: Tensor, *_: Any) -> dict[str, Tensor | None]:
    return _named(run(dtotal, *ctx.saved_tensors), ctx.wanted)


def _scale(
    dtotal: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    return tuple(_scaled(gradient, dtotal, x.dtype) for gradient in (dx, dweight, dbias))


def _scaled(gradient: Tensor, dtotal: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient · dtotal`` in ``dtype``."""
    if gradient.dtype == dtype or gradient.numel() <= SCALED_AT_ONCE or torch.compiler.is_compiling():
        return (gradient * dtotal).to(dtype)
    # The product in float32 would be as large as the weight's float32 gradient, the largest tensor of a training step: in parts it isn't.
    result = torch.empty_like(gradient, dtype=dtype)
    rows = max(1, SCALED_AT_ONCE // gradient.shape[-1])
    for start in range(0, gradient.shape[0], rows):
        torch.mul(gradient[start : start + rows], dtotal, out=result[start : start + rows])
    return result


def _mean(call: TotalCall, outputs: Outputs) -> Tensor:
    total, count = outputs[0], (call.targets != call.ignore_index).sum()
    assert total is not None
    # Not total / count: of no tokens that is NaN as it should be, but so would be the gradients.
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


# --- The ops. ---------------------------------------------------------------------------------------------------------------------------

_TITLE = "linear_cross_entropy"
_OPTIONS: dict[str, Any] = {"grads": ("x", "weight", "bias"), "values": ("targets",), "casts": True}
_FOR_LOSSES = (by_triton.WAYS.losses, by_torch.WAYS.losses, by_torch.REFERENCE_LOSSES)
_FOR_TOTAL = (by_triton.WAYS.total, by_torch.WAYS.total, by_torch.REFERENCE_TOTAL)
_losses_op = RegisteredOp(f"{_TITLE}_losses", LossesCall, _FOR_LOSSES, _losses_outputs, 1)
_total_op = RegisteredOp(f"{_TITLE}_total", TotalCall, _FOR_TOTAL, _total_outputs, 4)
_backward_op = RegisteredOp(
    f"{_TITLE}_backward", GradientCall, (by_triton.WAYS.gradients, by_torch.WAYS.gradients), _gradient_outputs, 3
)
_losses_rule = Differentiable(_losses_op, _save_call, _losses_gradients, _backward_op, _TITLE)
_total_rule = Differentiable(_total_op, _save_gradients, _total_gradients, _scale, _TITLE)
_LOSSES = Op(_TITLE, _losses_op, check_loss, _FOR_LOSSES, rule=_losses_rule, **_OPTIONS)
_SUM = Op(_TITLE, _total_op, check_loss, _FOR_TOTAL, rule=_total_rule, **_OPTIONS)
_MEAN = Op(_TITLE, _total_op, check_loss, _FOR_TOTAL, result=_mean, rule=_total_rule, **_OPTIONS)
CHOICE = _MEAN.choice
