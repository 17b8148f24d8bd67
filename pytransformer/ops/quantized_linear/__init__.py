"""A linear layer whose weight is read as 8- or 4-bit codes: a quarter, or an eighth, of the bytes of 16 or 32 bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pytransformer.ops.op import Op
from pytransformer.ops.quantized_linear import by_torch, by_triton
from pytransformer.ops.quantized_linear.call import (
    QuantizedLinearCall,
    QuantizedLinearGradientCall,
    check_quantized_linear,
    in_features,
)
from pytransformer.ops.registered import Differentiable, RegisteredOp


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x times the transpose of (weight - zero_point) · scale, plus bias; the weight is never made as a whole.

    Products are added up in float32 and rounded once. Differentiable once with respect to x and bias (by the reference any number of
    times), as adapters beside a frozen weight need it (Dettmers et al. 2023, QLoRA); codes, scales and zero points have no gradient.

    Args:
        x: (…, in_features), float32, float16 or bfloat16 (or float64: torch and reference). Under autocast x and bias are cast to its
            dtype, as for a linear layer.
        weight: int8 (out_features, in_features), codes -128 to 127 with a scale for each row; or uint8 (out_features, in_features / 2), two
            codes 0 to 15 a byte with a scale for each group of 32, 64 or 128 columns. Of a group, byte j holds column j in its low half and
            column j + group_size / 2 in its high one. Contiguous.
        scale: (out_features), or for 4 bits (out_features, in_features / group_size); any floating dtype, contiguous. Taken to float32.
        zero_point: uint8, shape of scale, 0 to 15: the code that means 0; ``None`` = 8. 4 bits only.
        bias: (out_features), dtype of x.
        backend: "triton", "torch" or "reference"; None = Triton on a GPU and torch elsewhere, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise.

    Returns:
        (…, out_features) in x's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or strides that do not fit; a zero point above 15 (on a CPU, or with PYTRANSFORMER_DEBUG=1).
        RuntimeError: scale requires a gradient.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    if not isinstance(x, Tensor) or x.ndim in (0, 2):
        return _QUANTIZED_LINEAR((x, weight, scale, zero_point, bias), backend)  # type: ignore[no-any-return]
    y: Tensor = _QUANTIZED_LINEAR((x.reshape(-1, x.shape[-1]), weight, scale, zero_point, bias), backend)
    return y.view(*x.shape[:-1], y.shape[-1])


def _outputs(call: QuantizedLinearCall, backend: str) -> tuple[Any, ...]:
    return (((call.x.shape[0], call.weight.shape[0]), call.x.dtype),)


def _gradient_outputs(call: QuantizedLinearGradientCall, backend: str) -> tuple[Any, ...]:
    return (((call.dy.shape[0], in_features(call.weight)), call.dy.dtype),)


def _save(ctx: Any, call: QuantizedLinearCall, outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(call.weight, call.scale, call.zero_point)
    ctx.has_bias = call.bias is not None


def _gradients(ctx: Any, run: Any, dy: Tensor) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    if ctx.needs_input_grad[0]:
        (found["x"],) = run(dy, *ctx.saved_tensors, ctx.backend)
    if ctx.needs_input_grad[4] and ctx.has_bias:
        found["bias"] = dy.sum(dim=0)
    return found


_BACKENDS = (by_triton.BACKEND, by_torch.BACKEND, by_torch.REFERENCE)
_FORWARD = RegisteredOp("quantized_linear_forward", QuantizedLinearCall, _BACKENDS, _outputs, 1)
_BACKWARD = RegisteredOp(
    "quantized_linear_backward",
    QuantizedLinearGradientCall,
    (by_triton.BACKWARD, by_torch.BACKWARD),
    _gradient_outputs,
    1,
)
_QUANTIZED_LINEAR = Op(
    "quantized_linear",
    _FORWARD,
    check_quantized_linear,
    _BACKENDS,
    rule=Differentiable(_FORWARD, _save, _gradients, _BACKWARD, "quantized_linear"),
    grads=("x", "bias"),
    values=("zero_point",),
    casts=True,
)
CHOICE = _QUANTIZED_LINEAR.choice
