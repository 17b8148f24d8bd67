"""A call of grouped_linear and of its gradient, and the checks of every argument on the host, each error naming what is allowed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pytransformer.ops import checks
from pytransformer.ops.precision import autocast_to_lower

_WEIGHT_LAYOUT = "(groups, out_features, in_features)"


class GroupedLinearCall(NamedTuple):
    """The arguments of one call."""

    x: Tensor
    weight: Tensor
    offsets: Tensor
    bias: Tensor | None


class GroupedLinearGradientCall(NamedTuple):
    """A call of the backward pass; ``dy``: the gradient of y, any strides; ``want_...``: what to compute."""

    dy: Tensor
    x: Tensor
    weight: Tensor
    offsets: Tensor
    want_dx: bool
    want_dweight: bool
    want_dbias: bool


def check_grouped_linear(call: GroupedLinearCall) -> GroupedLinearCall:
    """Checks a call as the user gave it; see ``grouped_linear`` for the errors. Under autocast its floats are cast to its dtype."""
    dtypes = checks.FLOAT_DTYPES_AND_DOUBLE
    x = checks.check_tensor("x", call.x, ndim=2, dtypes=dtypes, layout="(total, in_features)")
    weight = checks.check_tensor("weight", call.weight, ndim=3, dtypes=dtypes, device=x.device, layout=_WEIGHT_LAYOUT)
    if weight.shape[0] == 0 or weight.shape[1] == 0 or weight.shape[2] == 0:
        raise ValueError(
            f"weight must have at least one group, output and input feature, got shape {tuple(weight.shape)}"
        )
    checks.check_shape("x", x, (None, weight.shape[2]), "(total, in_features of weight)")
    x, weight = autocast_to_lower(x), autocast_to_lower(weight)
    checks.check_same_dtype("weight", weight, "x", x)
    checks.check_last_dim_contiguous("x", x)
    checks.check_last_dim_contiguous("weight", weight)
    bias = call.bias
    if bias is not None:
        bias = checks.check_tensor(
            "bias", bias, ndim=2, dtypes=dtypes, device=x.device, layout="(groups, out_features)"
        )
        checks.check_shape("bias", bias, weight.shape[:2], "weight.shape[:2]")
        bias = autocast_to_lower(bias)
        checks.check_same_dtype("bias", bias, "x", x)
    offsets = checks.check_cu_seqlens("offsets", call.offsets, x.shape[0], x.device, weight.shape[0], "groups")
    return GroupedLinearCall(x, weight, offsets, bias)
