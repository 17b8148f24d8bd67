"""A call of the norms and of their gradient, and the checks of every argument on the host, each error naming what is allowed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks

NormResult = Tensor | tuple[Tensor, Tensor]


class NormCall(NamedTuple):
    """A call of either norm.

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


class NormGradientCall(NamedTuple):
    """A call of the backward pass.

    Attributes:
        dy: gradient of y, any strides.
        ds: gradient of the returned sum, or None.
        s: what was normalised: x, or the returned sum.
        weight: as in the forward pass.
        mean, rstd: of each row, float32; no mean for RMSNorm.
        weight_offset, is_rms: as in the forward pass.
        want_dweight: whether the weight's gradient is wanted.
        dbias_dtype: dtype of the bias whose gradient is wanted, or None.
    """

    dy: Tensor
    ds: Tensor | None
    s: Tensor
    weight: Tensor | None
    mean: Tensor | None
    rstd: Tensor
    weight_offset: float
    is_rms: bool
    want_dweight: bool
    dbias_dtype: torch.dtype | None


def check_norm(call: NormCall) -> NormCall:
    """Checks a call as the user gave it; see ``layer_norm`` for the errors."""
    x, weight, bias, residual, eps, weight_offset, is_rms = call
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


def no_float64_at_all(call: NormCall) -> str | None:
    """An ``exceeds`` of the kernels: of no tensor."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in call[:4]):
        return "float64 is served by torch and the reference; the kernels compute in float32"
    return None
