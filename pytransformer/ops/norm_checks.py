"""The host-side checks of the norms: every argument, each error naming what is allowed."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pytransformer.ops import checks

NormResult = Tensor | tuple[Tensor, Tensor]


class NormCall(NamedTuple):
    """A checked call of either op.

    Attributes:
        x, weight, bias, residual: the tensors, or None.
        eps: added to the variance or mean square.
        weight_offset: added to the weight.
        is_rms: RMSNorm, else LayerNorm.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    eps: float
    weight_offset: float
    is_rms: bool


# A function rather than a property: the tracer of torch 2.10 follows no property of a NamedTuple.
def tensors_of(call: NormCall) -> tuple[Tensor | None, ...]:
    """x, weight, bias and residual."""
    return call.x, call.weight, call.bias, call.residual


def check_norm(
    x: Any, weight: Any, bias: Any, *, eps: Any, weight_offset: Any, residual: Any, is_rms: bool
) -> NormCall:
    """Checks a call as the user gave it; see ``layer_norm`` for the errors."""
    dtypes = checks.FLOAT_DTYPES_AND_DOUBLE
    checks.check_tensor("x", x, dtypes=dtypes)
    if x.ndim == 0:
        raise ValueError("x must have at least 1 dimension: (..., width), got shape ()")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            checks.check_tensor(name, vector, ndim=1, dtypes=dtypes, device=x.device, layout="(width)")
            checks.check_shape(name, vector, x.shape[-1:], "(width,), the last dimension of x,")
    if residual is not None:
        checks.check_tensor("residual", residual, dtypes=dtypes, device=x.device)
        checks.check_shape("residual", residual, x.shape, "of x")
    eps = checks.check_float("eps", eps, minimum=0.0)
    weight_offset = checks.check_float("weight_offset", weight_offset)
    return NormCall(x, weight, bias, residual, float(eps), float(weight_offset), is_rms)
