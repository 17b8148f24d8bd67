"""A linear layer for each group of rows: the experts of a mixture, without a loop over them and without dropping a token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pytransformer.ops.grouped_linear import by_torch, by_triton
from pytransformer.ops.grouped_linear.call import GroupedLinearCall, GroupedLinearGradientCall, check_grouped_linear
from pytransformer.ops.op import Op
from pytransformer.ops.registered import Differentiable, RegisteredOp, like


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Rows ``offsets[g]`` to ``offsets[g + 1]`` of x times the transpose of ``weight[g]``, plus ``bias[g]``.

    The experts of a mixture (Gale et al. 2022): groups of any size, empty ones too, and all rows in one. Products are added up in float32
    and rounded once. Differentiable once with respect to x, weight and bias (by the reference any number of times); the gradient of each
    group's weight is written where it belongs, and has the same bits each run.

    Args:
        x: (total, in_features), float32, float16 or bfloat16 (or float64: torch and reference), the rows of a group beside each other;
            last dimension contiguous. Under autocast x, weight and bias are cast to its dtype, as for a linear layer.
        weight: (groups, out_features, in_features), dtype of x; last dimension contiguous.
        offsets: int32 (groups + 1), contiguous: 0, where the second group starts, …, total; never decreasing. Triton's kernels, and torch
            in bfloat16 without bias and with features that are multiples of 8, leave them on the GPU; otherwise the host waits for them.
        bias: (groups, out_features), dtype of x.
        backend: "triton", "torch" or "reference"; None = Triton on a GPU and torch elsewhere, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise.

    Returns:
        (total, out_features) in x's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or strides that do not fit; offsets that do not run from 0 to total (on a CPU, or with
            PYTRANSFORMER_DEBUG=1).
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    return _GROUPED_LINEAR((x, weight, offsets, bias), backend)  # type: ignore[no-any-return]


def _outputs(call: GroupedLinearCall, backend: str) -> tuple[Any, ...]:
    return (((call.x.shape[0], call.weight.shape[1]), call.x.dtype),)


def _gradient_outputs(call: GroupedLinearGradientCall, backend: str) -> tuple[Any, ...]:
    return (
        like(call.x) if call.want_dx else None,
        like(call.weight) if call.want_dweight else None,
        (call.weight.shape[:2], call.weight.dtype) if call.want_dbias else None,
    )


def _save(ctx: Any, call: GroupedLinearCall, outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(call.x, call.weight, call.offsets)
    ctx.has_bias = call.bias is not None


def _gradients(ctx: Any, run: Any, dy: Tensor) -> dict[str, Tensor | None]:
    wants_x, wants_weight, _, wants_bias = ctx.needs_input_grad[:4]
    wanted = (wants_x, wants_weight, wants_bias and ctx.has_bias)
    found = run(dy, *ctx.saved_tensors, *wanted, ctx.backend)
    return {name: gradient for name, gradient, want in zip(("x", "weight", "bias"), found, wanted) if want}


_BACKENDS = (by_triton.BACKEND, by_torch.BACKEND, by_torch.REFERENCE)
_FORWARD = RegisteredOp("grouped_linear_forward", GroupedLinearCall, _BACKENDS, _outputs, 1)
_BACKWARD = RegisteredOp(
    "grouped_linear_backward",
    GroupedLinearGradientCall,
    (by_triton.BACKWARD, by_torch.BACKWARD),
    _gradient_outputs,
    3,
)
_GROUPED_LINEAR = Op(
    "grouped_linear",
    _FORWARD,
    check_grouped_linear,
    _BACKENDS,
    rule=Differentiable(_FORWARD, _save, _gradients, _BACKWARD, "grouped_linear"),
    grads=("x", "weight", "bias"),
    values=("offsets",),
    casts=True,
)
CHOICE = _GROUPED_LINEAR.choice
