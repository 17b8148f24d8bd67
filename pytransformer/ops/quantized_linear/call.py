"""A call of quantized_linear and of its gradient, and the checks of every argument on the host, each error naming what is allowed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks
from pytransformer.ops.precision import autocast_to_lower

GROUP_SIZES = (32, 64, 128)


class QuantizedLinearCall(NamedTuple):
    """The arguments of one call; ``x``: (rows, in_features)."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None


class QuantizedLinearGradientCall(NamedTuple):
    """A call of the backward pass to x; ``dy``: (rows, out_features), any strides."""

    dy: Tensor
    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None


def in_features(weight: Tensor) -> int:
    """Columns of the weight that the codes stand for."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def check_quantized_linear(call: QuantizedLinearCall) -> QuantizedLinearCall:
    """Checks a call as the user gave it; see ``quantized_linear`` for the errors. Under autocast x and bias are cast to its dtype."""
    x = checks.check_tensor("x", call.x, ndim=2, dtypes=checks.FLOAT_DTYPES_AND_DOUBLE, layout="(…, in_features)")
    weight, scale, zero_point = check_codes(call.weight, call.scale, call.zero_point, x.device)
    checks.check_shape("x", x, (None, in_features(weight)), "(…, in_features of weight)")
    if torch.is_grad_enabled() and scale.requires_grad:
        raise RuntimeError("quantized_linear has no gradient of scale, but scale requires grad: give scale.detach()")
    x = autocast_to_lower(x)
    bias = call.bias
    if bias is not None:
        bias = checks.check_tensor(
            "bias", bias, ndim=1, dtypes=checks.FLOAT_DTYPES_AND_DOUBLE, device=x.device, layout="(out_features)"
        )
        checks.check_shape("bias", bias, (weight.shape[0],), "(out_features of weight)")
        bias = autocast_to_lower(bias)
        checks.check_same_dtype("bias", bias, "x", x)
    return QuantizedLinearCall(x, weight, scale, zero_point, bias)


def check_codes(
    weight: object, scale: object, zero_point: object, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes with their scales and zero points, as :func:`quantized_linear` takes them."""
    weight = checks.check_tensor(
        "weight", weight, ndim=2, dtypes=(torch.int8, torch.uint8), device=device,
        layout="int8 (out_features, in_features) or uint8 (out_features, in_features / 2)",
    )  # fmt: skip
    if 0 in weight.shape:
        raise ValueError(f"weight must have at least one output and input feature, got shape {tuple(weight.shape)}")
    floats = checks.FLOAT_DTYPES_AND_DOUBLE
    if weight.dtype == torch.int8:
        scale = checks.check_tensor(
            "scale", scale, ndim=1, dtypes=floats, device=weight.device, layout="(out_features) with int8 codes"
        )
        checks.check_shape("scale", scale, (weight.shape[0],), "(out_features of weight)")
        if zero_point is not None:
            raise ValueError("zero_point is for 4-bit codes (a uint8 weight): leave it out with an int8 weight")
    else:
        layout = "(out_features, in_features / group_size) with 4-bit codes"
        scale = checks.check_tensor("scale", scale, ndim=2, dtypes=floats, device=weight.device, layout=layout)
        checks.check_shape("scale", scale, (weight.shape[0], None), "(out_features of weight, groups)")
        columns, groups = in_features(weight), scale.shape[1]
        if columns not in [groups * size for size in GROUP_SIZES]:
            raise ValueError(
                f"scale must divide the {columns} columns of weight into groups of {', '.join(map(str, GROUP_SIZES))}, "
                f"got {groups} groups"
            )
        if zero_point is not None:
            zero_point = checks.check_tensor(
                "zero_point", zero_point, ndim=2, dtypes=(torch.uint8,), device=weight.device, layout="that of scale"
            )
            checks.check_shape("zero_point", zero_point, scale.shape, "scale.shape")
            checks.check_values("zero_point", zero_point, 0, 15, "4-bit codes")
    for name, tensor in (("weight", weight), ("scale", scale), ("zero_point", zero_point)):
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
    return weight, scale, zero_point
